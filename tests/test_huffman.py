from __future__ import annotations

import heapq
import itertools
import math
import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archsearch.compression.huffman import BLOCK, code_lengths, decode, encode
from archsearch.errors import IntegrityError

Counts = npt.NDArray[np.int64]


def naive_bits(counts: list[int]) -> int:
    """Return the length of the text under Huffman's algorithm: the sum of all merged weights."""
    heap = [count for count in counts if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def words_one_by_one(lengths: npt.NDArray[np.uint8]) -> dict[int, str]:
    """Return canonical words as texts: count up, and append zeros where words get longer."""
    words: dict[int, str] = {}
    code, before = -1, 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda symbol: (lengths[symbol], symbol)):
        code = (code + 1) << (int(lengths[symbol]) - before)
        before = int(lengths[symbol])
        words[int(symbol)] = f"{code:0{before}b}"
    return words


def round_trip(symbols: npt.NDArray[np.uint8]) -> bytes:
    lengths = code_lengths(np.bincount(symbols, minlength=1))
    stream = encode(symbols, lengths)
    assert np.array_equal(decode(stream, len(symbols), lengths), symbols)
    return stream


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=256).filter(any))
def test_the_expected_length_is_that_of_huffmans_algorithm_and_within_a_bit_of_the_entropy(
    counts: list[int],
) -> None:
    lengths = code_lengths(np.array(counts)).astype(int)
    assert all((length > 0) == (count > 0) for length, count in zip(lengths, counts, strict=True))
    total = sum(counts)
    bits = int(np.dot(lengths, counts))
    assert bits == naive_bits(counts)
    entropy = -sum(count / total * math.log2(count / total) for count in counts if count)
    assert entropy - 1e-9 <= bits / total <= entropy + 1  # exactly one more with a single symbol
    kraft = sum(2.0**-length for length in lengths if length)
    assert kraft == (0.5 if np.count_nonzero(counts) == 1 else 1)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=256).filter(lambda c: sum(map(bool, c)) > 1))
def test_no_word_begins_with_another(counts: list[int]) -> None:
    words = sorted(words_one_by_one(code_lengths(np.array(counts))).values())
    assert not any(later.startswith(earlier) for earlier, later in itertools.pairwise(words))


@given(st.binary(max_size=600))
def test_random_symbols_survive_the_round_trip(data: bytes) -> None:
    round_trip(np.frombuffer(data, dtype=np.uint8))


@given(st.integers(0, 3 * BLOCK + 1), st.integers(1, 256), st.integers(0, 2**32 - 1))
def test_streams_of_several_blocks_survive_the_round_trip(count: int, alphabet: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = random.random(alphabet) ** 8 + 1e-9
    round_trip(random.choice(alphabet, count, p=weights / weights.sum()).astype(np.uint8))


def test_a_block_is_its_words_one_after_the_other() -> None:
    symbols = np.frombuffer(b"abracadabra, deep compression" * 300, dtype=np.uint8)
    lengths = code_lengths(np.bincount(symbols))
    words = words_one_by_one(lengths)
    stream = encode(symbols, lengths)
    sizes = np.frombuffer(stream, "<u2", 3)
    first = "".join(words[int(symbol)] for symbol in symbols[:BLOCK])
    assert sizes[0] == math.ceil(len(first) / 8)
    block = "".join(f"{byte:08b}" for byte in stream[6 : 6 + int(sizes[0])])
    assert block == first.ljust(8 * int(sizes[0]), "0")


def test_very_long_words_survive_the_round_trip() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 26:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    assert code_lengths(np.array(fibonacci)).max() == 25
    symbols = np.repeat(np.arange(26), fibonacci).astype(np.uint8)
    round_trip(np.random.default_rng(0).permutation(symbols))


def test_one_symbol_takes_one_bit() -> None:
    stream = round_trip(np.full(800, 7, dtype=np.uint8))
    assert len(stream) == 2 + 100


def test_equal_counts_give_equal_codes() -> None:
    assert code_lengths(np.array([5, 5, 5])).tolist() == [2, 2, 1]


@pytest.mark.parametrize(
    "lengths",
    [
        [1, 1, 1],  # three words of one bit
        [1, 2],  # a word is missing
        [0, 0],
        [200, 200],
        [58] * 2 + list(range(57, 0, -1)),  # complete, but too long to read
    ],
)
def test_lengths_that_are_no_code_are_refused(lengths: list[int]) -> None:
    with pytest.raises(IntegrityError, match="no complete prefix code"):
        decode(bytes(4), 3, np.array(lengths, dtype=np.uint8))


def test_a_stream_of_the_wrong_size_is_refused() -> None:
    symbols = np.arange(200, dtype=np.uint8)
    lengths = code_lengths(np.bincount(symbols))
    stream = encode(symbols, lengths)
    with pytest.raises(IntegrityError, match="blocks have"):
        decode(stream + b"\0", 200, lengths)
    with pytest.raises(IntegrityError, match="blocks have"):
        decode(stream[:-1], 200, lengths)
    with pytest.raises(IntegrityError, match="cannot hold"):
        decode(stream, 10**12, lengths)
    with pytest.raises(IntegrityError, match="does not end"):
        decode(stream, 100, lengths)
    with pytest.raises(IntegrityError, match="for no symbol"):
        decode(stream, 0, lengths)


@given(st.binary(min_size=1, max_size=200), st.integers(1, 3000), st.binary(min_size=1, max_size=40))
def test_garbage_is_decoded_or_refused_and_nothing_else(stream: bytes, count: int, lengths: bytes) -> None:
    try:
        symbols = decode(stream, count, np.frombuffer(lengths, dtype=np.uint8))
    except IntegrityError:
        return
    assert len(symbols) == count


@given(st.binary(min_size=1, max_size=200), st.integers(1, 3000))
def test_garbage_under_a_sound_code_is_decoded_or_refused(stream: bytes, count: int) -> None:
    lengths = np.array([1, 2, 3, 3], dtype=np.uint8)
    size = np.array([len(stream)], dtype="<u2").tobytes()
    try:
        symbols = decode(size + stream, count, lengths)
    except IntegrityError:
        return
    assert len(symbols) == count
    assert symbols.max() < 4


@pytest.mark.slow
def test_ten_million_weights_take_seconds() -> None:
    random = np.random.default_rng(0)
    symbols = np.clip(np.abs(random.normal(0, 40, 10_000_000)), 0, 255).astype(np.uint8)
    start = time.perf_counter()
    round_trip(symbols)
    assert time.perf_counter() - start < 10  # half a second where nothing else runs
