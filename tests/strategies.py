"""What hypothesis draws from in more than one test file."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from archsearch.architecture import MAX_INPUT_SIZE, MAX_WIDTH, Architecture

NAME_CHARACTERS = "abcXYZ019._-/:@[]#'\"é中 "

AWKWARD = [
    "no", "on", "1e3", "0o17", "0x1f", "017", "1:30", "~", "null", "", " a", "a ", "- b", "2020-01-01",
    ".inf", "<<", "*a", "&a", "!b", "a: b", "a #b", "é", "\x85", "\u2028", "\ufeff", "\n", "a\n\n b\n", "😀",
    "'", '"', "{", "%x", "---", "=", "1_000", "+1", "5402e10123456789",
]  # fmt: skip


def names(max_size: int = 24) -> st.SearchStrategy[str]:
    """Names of models and groups: printable, without spaces at the ends."""
    return st.text(NAME_CHARACTERS, min_size=1, max_size=max_size).filter(lambda name: name == name.strip())


def finite_floats() -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False)


def integers64() -> st.SearchStrategy[int]:
    return st.integers(-(2**63) + 1, 2**63 - 1)


def scalars() -> st.SearchStrategy[Any]:
    """Plain values, with the texts that YAML readers like to mistake."""
    awkward = st.sampled_from(AWKWARD)
    text = st.text(st.characters(codec="utf-8"), max_size=40)
    return st.none() | st.booleans() | integers64() | finite_floats() | awkward | text


def widths(max_groups: int = 8) -> st.SearchStrategy[dict[str, tuple[int, int]]]:
    """(width, size) by group."""
    pair = st.integers(1, MAX_WIDTH).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size)))
    return st.dictionaries(names(), pair, max_size=max_groups)


def provenances() -> st.SearchStrategy[dict[str, Any]]:
    fields = st.text("abc XY_.é", min_size=1, max_size=8)
    inner = st.recursive(
        scalars(),
        lambda part: st.lists(part, max_size=3) | st.dictionaries(fields, part, max_size=3),
        max_leaves=6,
    )
    return st.dictionaries(fields, inner, max_size=4).filter(lambda data: levels(data) <= 4)


def levels(value: Any) -> int:
    """How deep collections are nested in each other."""
    if isinstance(value, dict):
        return 1 + max(map(levels, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(levels, value), default=0)
    return 0


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    groups = draw(widths())
    amount = st.integers(1, 2**53).flatmap(
        lambda reference: st.fixed_dictionaries(
            {"value": st.integers(0, reference), "reference": st.just(reference)}
        )
    )
    return Architecture.create(
        model=draw(names()),
        arguments=draw(
            st.dictionaries(
                st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,10}", fullmatch=True),
                scalars() | st.lists(integers64(), max_size=4),
                max_size=4,
            )
        ),
        input_shape=draw(st.lists(st.integers(1, MAX_INPUT_SIZE), min_size=1, max_size=5)),
        widths={name: width for name, (width, _) in groups.items()},
        sizes={name: size for name, (_, size) in groups.items()},
        cost=draw(
            st.dictionaries(st.sampled_from(["macs", "params", "peak_activation_bytes"]), amount, max_size=3)
        ),
        provenance=draw(provenances()),
    )
