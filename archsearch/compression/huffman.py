"""Canonical Huffman codes of small alphabets, coded and decoded many blocks at a time.

Symbols are bytes. A code is fully described by the length of each symbol's word: words of one length are
consecutive numbers in the order of the symbols, shorter ones first (Huffman, 1952; canonical as in RFC 1951,
section 3.2.2). A stream is cut into blocks of ``BLOCK`` symbols, each starting at a whole byte, so that all
blocks are decoded side by side: one symbol of every block with each pass of numpy.
"""

from __future__ import annotations

import heapq
from typing import Final

import numpy as np
import numpy.typing as npt

from archsearch.errors import IntegrityError

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

BLOCK: Final = 4096
"""Symbols of a block. Its size takes two bytes, a thousandth of what the block itself takes."""

MAX_LENGTH: Final = 57
"""Longest word in bits: what one reading of 64 bits holds at any bit of a byte. A word of 58 bits would need
more symbols than the 59th Fibonacci number, some 10^12."""

_BLOCKS_AT_ONCE: Final = 256  # of encoding, which bounds its memory


def code_lengths(counts: npt.NDArray[np.int64]) -> Bytes:
    """Return the length in bits of each symbol's word in an optimal prefix code.

    Args:
        counts: How often each symbol occurs, ``(symbols,)``, at most 256; symbols that never do get no word.

    Returns:
        ``(symbols,)``, 0 where there is no word. A single symbol gets a word of one bit.
    """
    lengths = np.zeros(len(counts), dtype=np.uint8)
    present = np.flatnonzero(counts)
    if len(present) == 1:
        lengths[present] = 1
        return lengths
    # Ties are broken by the order of making, so that equal counts give equal codes everywhere.
    heap = [(int(counts[symbol]), order, [int(symbol)]) for order, symbol in enumerate(present)]
    heapq.heapify(heap)
    for order in range(len(heap), 2 * len(heap) - 1):
        least, _, left = heapq.heappop(heap)
        next_least, _, right = heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (least + next_least, order, left + right))
    return lengths


def encode(symbols: Bytes, lengths: Bytes) -> bytes:
    """Return a stream: the size in bytes of each block as uint16, little end first, then the blocks.

    Args:
        symbols: What to encode, ``(N,)``; each has a word.
        lengths: From ``code_lengths``.
    """
    words, sizes, blocks = _words(lengths), [], []
    for first in range(0, len(symbols), BLOCK * _BLOCKS_AT_ONCE):
        size, data = _encode_blocks(symbols[first : first + BLOCK * _BLOCKS_AT_ONCE], lengths, words)
        sizes.append(size.astype("<u2").tobytes())
        blocks.append(data)
    return b"".join([*sizes, *blocks])


def decode(stream: bytes, count: int, lengths: Bytes, where: str = "a Huffman stream") -> Bytes:
    """Return the ``count`` symbols of a stream that ``encode`` made.

    Raises:
        IntegrityError: If the lengths are no complete prefix code, or the stream is not what they say.
    """
    if count == 0:
        if stream:
            raise IntegrityError(f"{where}: holds {len(stream)} bytes for no symbol")
        return np.zeros(0, dtype=np.uint8)
    symbols, widths, firsts, limits = _table(lengths, where)
    blocks = -(-count // BLOCK)
    if len(stream) < 2 * blocks or count > 8 * len(stream):  # a word has at least one bit
        raise IntegrityError(f"{where}: {len(stream)} bytes cannot hold {count} symbols")
    sizes = np.frombuffer(stream, "<u2", blocks).astype(np.int64)
    ends = np.cumsum(sizes)
    body = stream[2 * blocks :]
    if int(ends[-1]) != len(body):
        raise IntegrityError(f"{where}: its blocks have {int(ends[-1])} bytes, but {len(body)} follow")
    padded = np.frombuffer(body + bytes(16), dtype=np.uint8)
    # One 64-bit reading at every byte; the words of a block never lead further than its end, checked below.
    readings = np.ndarray((len(body) + 9,), dtype=">u8", buffer=padded.data, strides=(1,))
    places = 8 * (ends - sizes)
    last_place = 8 * len(body) + 7
    decoded = np.zeros((min(BLOCK, count), blocks), dtype=np.uint8)
    for row in range(len(decoded)):
        # The last block may be shorter than the others.
        running = blocks if (blocks - 1) * BLOCK + row < count else blocks - 1
        here = places[:running]
        window = readings[here >> 3].astype(np.uint64) << (here & 7).astype(np.uint64)
        kind = np.searchsorted(limits, window, side="right")
        index = firsts[kind] + (window >> (np.uint64(64) - widths[kind])).astype(np.int64)
        decoded[row, :running] = symbols[index]
        places[:running] = np.minimum(here + widths[kind].astype(np.int64), last_place)
    if not (((places + 7) >> 3) == ends).all():
        raise IntegrityError(f"{where}: a block does not end where it should")
    return decoded.T.reshape(-1)[:count]


def _words(lengths: Bytes) -> Words:
    """Return each symbol's word, its first bit being the highest of 64."""
    words = np.zeros(len(lengths), dtype=np.uint64)
    code, width = 0, 0
    for symbol in sorted(np.flatnonzero(lengths).tolist(), key=lambda symbol: (lengths[symbol], symbol)):
        code <<= int(lengths[symbol]) - width
        width = int(lengths[symbol])
        words[symbol] = code << (64 - width)
        code += 1
    return words


def _encode_blocks(symbols: Bytes, lengths: Bytes, words: Words) -> tuple[npt.NDArray[np.int64], bytes]:
    """Return the sizes in bytes of some blocks, and their bytes."""
    starts = np.arange(0, len(symbols), BLOCK)
    widths = lengths[symbols].astype(np.int64)
    sizes = (np.add.reduceat(widths, starts) + 7) >> 3
    ends = np.cumsum(widths)
    # Where each word would begin without alignment, moved by what its block is moved.
    moved = 8 * (np.cumsum(sizes) - sizes) - (ends - widths)[starts]
    places = ends - widths + np.repeat(moved, BLOCK)[: len(symbols)]
    cell, bit = places >> 6, (places & 63).astype(np.uint64)
    word = words[symbols]
    cells = np.zeros(-(-int(sizes.sum()) // 8) + 1, dtype=np.uint64)
    # No word is as long as a cell, so each cell has at least one beginning, and one overflow at most.
    beginnings = np.flatnonzero(np.diff(cell, prepend=-1))
    cells[cell[beginnings]] = np.bitwise_or.reduceat(word >> bit, beginnings)
    over = np.flatnonzero((places & 63) + widths > 64)
    cells[cell[over] + 1] |= word[over] << (np.uint64(64) - bit[over])
    return sizes, cells.astype(">u8").tobytes()[: int(sizes.sum())]


def _table(lengths: Bytes, where: str) -> tuple[Bytes, Words, npt.NDArray[np.int64], Words]:
    """Return what decoding looks up, checked to be a complete prefix code.

    Returns:
        The symbols in the order of their words; and for each length of words, its bits, what is added to
        the number that a word is to give the place of its symbol, and the first reading beyond its words.
    """
    symbols = np.array(
        sorted(np.flatnonzero(lengths).tolist(), key=lambda symbol: (lengths[symbol], symbol)), dtype=np.uint8
    )
    used = lengths[symbols]
    room = sum(1 << (MAX_LENGTH - int(length)) for length in used) if (used <= MAX_LENGTH).all() else -1
    if len(symbols) == 1 and used[0] == 1:  # a single word leaves half of the room; let both bits mean it
        symbols, used, room = np.repeat(symbols, 2), np.repeat(used, 2), 1 << MAX_LENGTH
    if room != 1 << MAX_LENGTH:
        raise IntegrityError(f"{where}: its word lengths are no complete prefix code")
    widths, begin, count = np.unique(used, return_index=True, return_counts=True)
    words = _words(lengths)
    firsts, limits = [], []
    for width, first, many in zip(widths.tolist(), begin.tolist(), count.tolist(), strict=True):
        code = int(words[symbols[first]]) >> (64 - width)
        firsts.append(first - code)
        limits.append((code + many) << (64 - width))
    # The last limit is 2^64 and needs no comparison.
    return (
        symbols,
        widths.astype(np.uint64),
        np.array(firsts, dtype=np.int64),
        np.array(limits[: len(widths) - 1], dtype=np.uint64),
    )
