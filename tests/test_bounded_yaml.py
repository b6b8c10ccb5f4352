from __future__ import annotations

import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import scalars

from archsearch.bounded_yaml import MAX_EVENTS, dump, parse, shown
from archsearch.errors import SpecError

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [*a, *a]}}\n" for i in range(30))

HOSTILE = {
    "billion laughs": (LAUGHS, ":1: a: the anchor &a is not allowed"),
    "merge bomb": (MERGES, "anchor"),
    "merge key": ("a: 1\nb:\n  <<: {x: 1}\n", ":3: b: the merge key << is not allowed"),
    "alias without anchor": ("a: *b\n", "alias *b is not allowed"),
    "self reference": ("a: &a [*a]", "anchor"),
    "flow nesting": ("a: " + "[" * 100_000, "nested deeper than 32"),
    "mapping nesting": ("a: " + "{a: " * 100_000, "nested deeper than 32"),
    "block nesting": ("\n".join(" " * i + "a:" for i in range(600)), "nested deeper than 32"),
    "sequence nesting": ("a:\n" + "- " * 50_000, "nested deeper than 32"),
    "question marks": ("? " * 100_000, "name"),
    "python tag": ("a: !!python/object/apply:os.system ['true']", "tag tag:yaml.org,2002:python"),
    "core tag": ("a: !!int '3'", "tag"),
    "local tag": ("a: !x 3", "tag !x is not allowed"),
    "non-specific tag": ("a: ! 3", "tag"),
    "tag on a mapping": ("a: !!map {}", "tag"),
    "duplicate key": ("a: 1\nb: 2\na: 3\n", ":3: 'a' stands here a second time"),
    "nested duplicate key": ("a:\n  b: 1\n  b: 2\n", ":3: a: 'b' stands here a second time"),
    "duplicate key in other quotes": ("a: 1\n'a': 2\n", ":2: 'a' stands here a second time"),
    "huge integer": ("a: " + "9" * 4000, "does not fit into 64 bits"),
    "integer over 64 bits": ("a: 9223372036854775808", "does not fit"),
    "long hexadecimal": ("a: 0x" + "f" * 4000, "does not fit"),
    "sexagesimal is no number but long": ("a: " + "1:" * 300_000 + "1", "characters: at most 4096"),
    "nan": ("a: .nan", ":1: a: the number .nan is not finite"),
    "infinity": ("a: -.inf", "not finite"),
    "overflow": ("a: 1e999", "not finite"),
    "NUL": ("a: 1\nb: \0", ":2: is not YAML"),
    "control character": ("a: \x01", "is not YAML"),
    "half a surrogate": ("a: \ud800", "is not YAML"),
    "long scalar": ("a: " + "x" * 5000, "5000 characters: at most 4096"),
    "long key": ("'" + "x" * 5000 + "': 1", "5000 characters"),
    "many events": ("a: [" + "1," * MAX_EVENTS + "1]", "more than 40000 YAML events"),
    "list as key": ("[a, b]: 1", "name must be a plain word"),
    "mapping as key": ("? {a: 1}\n: 1", "name must be a plain word"),
    "second document": ("a: 1\n---\nb: 2\n", ":2: a second YAML document"),
    "nothing": ("", "is empty"),
    "comments alone": ("# nothing\n", "is empty"),
    "null": ("~", "is empty"),
    "list": ("- a\n- b\n", "must hold fields"),
    "scalar": ("hello", "must hold fields"),
    "not closed": ("a: [1, 2", ":1: is not YAML"),
    "bad indentation": ("a: 1\n  b: 2\n", ":2: is not YAML"),
    "tab": ("a:\n\tb: 1\n", ":2: is not YAML"),
    "unknown escape": ('a: "\\q"', "is not YAML"),
    "colon in a plain value": ("a: b: c", "is not YAML"),
    "undefined tag handle": ("a: !x!y 1", "is not YAML"),
    "bad directive": ("%YAML 9.9\n---\na: 1", "is not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_gets_one_line_in_less_than_a_second(case: str) -> None:
    text, expected = HOSTILE[case]
    start = time.process_time()
    with pytest.raises(SpecError) as caught:
        parse(text, "arch.yaml")
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert message.startswith("arch.yaml:")
    assert expected in message
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("NO", "NO"), ("on", "on"), ("y", "y"),
        ("true", True), ("False", False), ("tRUE", "tRUE"),
        ("", None), ("~", None), ("Null", None), ("nULL", "nULL"),
        ("017", 17), ("0o17", 15), ("0x1F", 31), ("0b1", "0b1"), ("+12", 12), ("-0", 0),
        ("1e3", 1000.0), ("1.", 1.0), (".5", 0.5), ("-1.5E-3", -0.0015), (".", "."), ("1e", "1e"),
        ("1_000", "1_000"), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("=", "="),
        ("'1'", "1"), ('"true"', "true"), ("9223372036854775807", 2**63 - 1),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    read = parse(f"a: {text}", "f").data["a"]
    assert read == value
    assert type(read) is type(value)


def test_keys_are_strings_as_they_stand() -> None:
    assert parse("0: a\nno: b\n1e3: c\nnull: d\n", "f").data == {"0": "a", "no": "b", "1e3": "c", "null": "d"}


def test_every_value_knows_its_line() -> None:
    text = "a: 1\nb:\n  c:\n    - x\n    - {y: 2}\n\nd: [1,\n  2]\n"
    document = parse(text, "f")
    assert document.lines == {
        (): 1, ("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", 0): 4, ("b", "c", 1): 5, ("b", "c", 1, "y"): 5,
        ("d",): 7, ("d", 0): 7, ("d", 1): 8,
    }  # fmt: skip
    assert str(document.error(("b", "c", 0), "is odd")) == "f:4: b.c.0: is odd"
    assert str(document.error(("b", "missing", "far"), "is odd")) == "f:2: b.missing.far: is odd"
    assert str(document.error((), "is odd")) == "f:1: is odd"


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter() -> None:
    assert parse("a: 1\r\nb: x\r\n", "f").data == {"a": 1, "b": "x"}


@given(st.text(max_size=200) | st.text("ab:-?[]{}&*!|>'\"%@`#,\n \t0e~<", max_size=200))
def test_no_text_makes_another_exception(text: str) -> None:
    try:
        data = parse(text, "f").data
    except SpecError as error:
        assert str(error).isprintable()
    else:
        assert isinstance(data, dict)


@given(st.text("ab:-[]{}|>'\"#,\n 0e~.", max_size=60))
def test_what_is_accepted_agrees_with_pyyaml_in_structure(text: str) -> None:
    """With every scalar taken as text, so that only the structure is compared."""
    try:
        ours = parse(text, "f").data
    except SpecError:
        return
    theirs = yaml.load(text, Loader=yaml.BaseLoader)

    def as_text(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_text(part) for key, part in value.items()}
        if isinstance(value, list):
            return [as_text(part) for part in value]
        return "" if isinstance(value, (bool, int, float, str, type(None))) else value

    assert as_text(ours) == as_text(theirs)


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=160),
        st.recursive(
            scalars(),
            lambda part: (
                st.lists(part, max_size=3) | st.dictionaries(st.text("ab 0:'", max_size=5), part, max_size=3)
            ),
            max_leaves=8,
        ),
        max_size=5,
    )
)
def test_plain_data_read_back_equal_and_with_equal_types(data: dict[str, Any]) -> None:
    text = dump(data)
    assert "\r" not in text
    read = parse(text, "f").data
    assert repr(read) == repr(data)  # repr tells 1 from 1.0 and True, and shows the order
    assert dump(read) == text


@given(st.dictionaries(st.text("abc", min_size=1, max_size=4), scalars(), min_size=1, max_size=4))
def test_strings_stay_strings_for_yaml_1_1_readers_too(data: dict[str, Any]) -> None:
    data = {name: value for name, value in data.items() if isinstance(value, str)}
    assert yaml.safe_load(dump(data)) == data


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), object(), (1, 2), {1, 2}, b"x", 2**70, {1: 2}, "\ud800", {"a": complex(1)}],
)
def test_data_that_would_read_back_as_something_else_are_not_written(value: Any) -> None:
    with pytest.raises(SpecError):
        dump({"a": value})


def test_data_that_hold_themselves_are_not_written() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(SpecError):
        dump({"a": loop})


def test_entries_of_a_section_stand_on_one_line_each() -> None:
    data = {"shape": [3, 32], "widths": {"a": {"w": 1, "s": 2}, "b": {"w": 3, "s": 4}}, "empty": {}}
    assert dump(data) == "shape: [3, 32]\nwidths:\n  a: {w: 1, s: 2}\n  b: {w: 3, s: 4}\nempty: {}\n"


def test_a_value_is_shown_on_one_short_line() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10**6)) == 61
    assert shown({"a": 1}) == "{'a': 1}"
