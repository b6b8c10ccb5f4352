"""A layer's weights as a few values in a few places, and what they take at each stage of the coding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from archsearch.compression.huffman import code_lengths, encode
from archsearch.compression.relative import distances
from archsearch.compression.sharing import k_means, nearest
from archsearch.errors import UsageError

Bytes = npt.NDArray[np.uint8]
WEIGHT_BITS = 32


@dataclass(frozen=True, eq=False)
class Shared:
    """The quantised weights of one layer.

    Attributes:
        shape: Of the parameter.
        bits: Of a code: the codebook has ``2 ** bits`` entries. Its first is the zero of the fillers.
        index_bits: Of a relative index.
        centroids: The other entries, float32 ``(k,)``, ``k < 2 ** bits``.
        codes: Which entry each surviving weight has, ``(n,)``, from 1 to ``k``.
        places: Where it stands in the flattened parameter, ``(n,)``, rising.
    """

    shape: tuple[int, ...]
    bits: int
    index_bits: int
    centroids: npt.NDArray[np.float32]
    codes: Bytes
    places: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        for what, bits in (("bits", self.bits), ("index bits", self.index_bits)):
            if not 1 <= bits <= 8:
                raise UsageError(f"{what}: must be from 1 to 8, not {bits}")

    @classmethod
    def share(cls, weight: Tensor, mask: Tensor, bits: int, index_bits: int) -> Shared:
        """Cluster the surviving weights of a layer.

        Args:
            weight: float32; not changed.
            mask: Boolean of the same shape, ``True`` where the weight survives.
            bits: Of a code.
            index_bits: Of a relative index.
        """
        if weight.dtype != torch.float32:
            raise UsageError(f"weights of {weight.dtype} cannot be shared: convert the network to float32")
        places = np.flatnonzero(mask.cpu().numpy())
        values = weight.detach().cpu().numpy().reshape(-1)[places]
        centroids = k_means(values, 2**bits - 1).astype(np.float32)
        used, codes = np.unique(nearest(values, centroids.astype(np.float64)), return_inverse=True)
        return cls(
            tuple(weight.shape), bits, index_bits, centroids[used], (codes + 1).astype(np.uint8), places
        )

    def with_centroids(self, centroids: npt.NDArray[np.float32]) -> Shared:
        """Return the same sharing of other values."""
        return Shared(self.shape, self.bits, self.index_bits, centroids, self.codes, self.places)

    @property
    def size(self) -> int:
        """Weights of the layer, zeros included."""
        return math.prod(self.shape)

    def table(self) -> Tensor:
        """Return the codebook, float32 ``(k + 1,)``."""
        return torch.from_numpy(np.concatenate([np.zeros(1, dtype=np.float32), self.centroids]))

    def code_map(self) -> Tensor:
        """Return the code of every weight, int64 of the parameter's shape, 0 where it was pruned."""
        flat = np.zeros(self.size, dtype=np.int64)
        flat[self.places] = self.codes
        return torch.from_numpy(flat).view(self.shape)

    def dense(self) -> Tensor:
        """Return the quantised weights, float32 of the parameter's shape."""
        flat = np.zeros(self.size, dtype=np.float32)
        flat[self.places] = self.centroids[self.codes.astype(np.int64) - 1]
        return torch.from_numpy(flat).view(self.shape)

    @cached_property
    def coded(self) -> Coded:
        """What goes into the file."""
        gaps, is_weight = distances(self.places, self.size, self.index_bits)
        codes = np.zeros(len(gaps), dtype=np.uint8)
        codes[is_weight] = self.codes
        words, gap_words = (code_lengths(np.bincount(symbols, minlength=1)) for symbols in (codes, gaps))
        return Coded(len(gaps), words, gap_words, encode(codes, words), encode(gaps, gap_words))

    def stage_bits(self) -> Stages:
        """Return the bits that the layer takes at each stage, as the paper counts them.

        Pruned: 32 bits a surviving weight. Shared: the denominator of the paper's equation 1,
        ``n log2(k) + k b``, with ``k = 2 ** bits`` and ``n`` surviving weights. Indexed: the same with an
        index for each, fillers included. Coded: the bytes of the file.
        """
        survivors, codebook = len(self.codes), 2**self.bits * WEIGHT_BITS
        return Stages(
            original=self.size * WEIGHT_BITS,
            pruned=survivors * WEIGHT_BITS,
            shared=survivors * self.bits + codebook,
            indexed=self.coded.entries * (self.bits + self.index_bits) + codebook,
            coded=8 * (self.centroids.nbytes + self.coded.nbytes),
        )


@dataclass(frozen=True, eq=False)
class Coded:
    """Codes and distances as Huffman streams.

    Attributes:
        entries: Surviving weights and fillers.
        code_words: Length of the word of each code, as ``huffman.code_lengths``.
        gap_words: The same of each distance.
        codes: The stream of the codes.
        gaps: The stream of the distances.
    """

    entries: int
    code_words: Bytes
    gap_words: Bytes
    codes: bytes
    gaps: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of words and streams together."""
        return len(self.code_words) + len(self.gap_words) + len(self.codes) + len(self.gaps)


@dataclass(frozen=True)
class Stages:
    """Bits at each stage; they add up over layers."""

    original: int = 0
    pruned: int = 0
    shared: int = 0
    indexed: int = 0
    coded: int = 0

    def __add__(self, other: Stages) -> Stages:
        return Stages(*(mine + theirs for mine, theirs in zip(self.bits(), other.bits(), strict=True)))

    def bits(self) -> tuple[int, ...]:
        """Return all of them in order."""
        return self.original, self.pruned, self.shared, self.indexed, self.coded


def sharing_ratio(weights: int, values: int, weight_bits: int = WEIGHT_BITS) -> float:
    """Return how many times less space shared weights take (Han et al., ICLR 2016, equation 1).

    Args:
        weights: How many there are.
        values: How many different ones.
        weight_bits: Of one that is not shared.
    """
    return weights * weight_bits / (weights * math.log2(values) + values * weight_bits)
