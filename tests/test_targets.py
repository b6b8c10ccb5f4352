from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archsearch.errors import UsageError
from archsearch.targets import Target


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("0.5", "1/2"),
        ("50%", "1/2"),
        (".25", "1/4"),
        ("12.5 %", "1/8"),
        ("1", "1"),
        ("100%", "1"),
        (0.1, "1/10"),
        ("1.0", "1"),
    ],
)
def test_shares_that_stay(text: str | float, keep: str) -> None:
    target = Target.parse("flops", text)
    assert target.keep == Fraction(keep)
    assert target.limit(8000) == 8000 * Fraction(keep)


@pytest.mark.parametrize(
    ("text", "absolute"),
    [
        ("60M", 60_000_000),
        ("60000000", 60_000_000),
        ("1.5G", 1_500_000_000),
        ("853018", 853_018),
        ("0.27m", 270_000),
        ("4k", 4_000),
        ("2", 2),
        ("64 MB", 64_000_000),
        ("0.1T", 100_000_000_000),
        (125_485_696, 125_485_696),
    ],
)
def test_absolute_limits(text: str | float, absolute: int) -> None:
    target = Target.parse("params", text)
    assert target.absolute == target.limit(10**12) == absolute
    assert target.keep is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "half",
        "0",
        "0%",
        "0M",
        "-0.5",
        "1.5",
        "101%",
        "1e6",
        "0.5.5",
        "nan",
        "inf",
        "5 ms",
        "50%B",
        "%",
        "M",
    ],
)
def test_what_is_neither_is_refused_and_named(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--flops"):
        Target.parse("flops", text)


@given(st.integers(1, 10**4), st.integers(1, 10**15))
def test_a_share_of_a_count_is_exact(hundredths_of_a_percent: int, reference: int) -> None:
    """The limit is the largest count that is at most the share: no rounding of floats in between."""
    target = Target.parse("flops", f"{hundredths_of_a_percent / 100:.2f}%")
    limit = target.limit(reference)
    assert limit * 10**4 <= hundredths_of_a_percent * reference < (limit + 1) * 10**4


def test_the_whole_reference_meets_a_target_of_all_of_it() -> None:
    assert Target.parse("flops", "1").limit(125_485_696) == 125_485_696


def test_a_limit_above_the_reference_is_the_reference() -> None:
    assert Target.parse("params", "1G").limit(1000) == 1000


@pytest.mark.parametrize(
    ("text", "shown"), [("50%", "flops 0.5"), ("60M", "flops 60,000,000"), ("0.333", "flops 0.333")]
)
def test_a_target_prints_as_a_person_would_write_it(text: str, shown: str) -> None:
    assert str(Target.parse("flops", text)) == shown


@pytest.mark.parametrize(
    ("text", "keep", "absolute", "shown"),
    [
        ("0.6", Fraction(3, 5), 0, "latency 0.6"),
        ("60%", Fraction(3, 5), 0, "latency 0.6"),
        ("1.2ms", None, 1_200_000, "latency 1.2 ms"),
        ("800 us", None, 800_000, "latency 0.8 ms"),
        ("2s", None, 2_000_000_000, "latency 2000 ms"),
    ],
)
def test_latencies_are_shares_or_times(text: str, keep: Fraction | None, absolute: int, shown: str) -> None:
    target = Target.parse("latency", text)
    assert (target.keep, target.absolute, str(target)) == (keep, absolute, shown)


@pytest.mark.parametrize("text", ["1.2", "0", "0ms", "ms", "110%", "5M", "-1ms", "1.2 minutes"])
def test_other_latencies_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--latency"):
        Target.parse("latency", text)
