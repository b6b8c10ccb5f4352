"""Labels: which index of which parameter each channel of a tensor stands for.

Every index along every dimension of every parameter and buffer is an *atom*, an int above zero. A traced
tensor carries, for each dimension whose size follows from parameters, one atom per index: a 1-D array. All
other dimensions (batch, space, number of heads) carry nothing and keep their size. While the network runs,
rules tie atoms that must be removed together and freeze atoms that must stay; the connected components of
the ties are the channel units.

Atom 0 stands for a position that is no parameter's, such as a channel of constant padding: what is tied to
it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.weak import WeakTensorKeyDictionary

Atoms: TypeAlias = npt.NDArray[np.int64]
"""One atom per index of a dimension, ``(size,)``; in ties also of higher rank."""

DimLabels: TypeAlias = dict[int, Atoms]
"""The labelled dimensions of a tensor."""

CONSTANT = 0


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer, whose atoms are ``first … first + size - 1``."""

    tensor: str
    dim: int
    first: int
    size: int

    @property
    def atoms(self) -> Atoms:
        """The atoms, ``(size,)``."""
        return np.arange(self.first, self.first + self.size, dtype=np.int64)


class Labels:
    """The atoms of a model, the labels of the tensors of a run, and what is known about them.

    Args:
        tensors: The parameters and buffers by name; a tensor that two modules share comes once.
        whole_groups: Whether a convolution's groups go as a whole, and do not get narrower.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, whole_groups: bool = False) -> None:
        self.whole_groups = whole_groups
        self.slots: list[Slot] = []
        self.ties: list[tuple[Atoms, Atoms]] = []
        self.frozen: list[tuple[Atoms, str]] = []
        self.told_apart: list[Atoms] = []
        self.produced: list[Atoms] = []
        self.consumed: list[Atoms] = []
        self.in_conv_groups: list[Atoms] = []
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._activations: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        next_atom = CONSTANT + 1
        for name, tensor in tensors.items():
            dims: DimLabels = {}
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    slot = Slot(name, dim, next_atom, size)
                    self.slots.append(slot)
                    dims[dim] = slot.atoms
                    next_atom += size
            self._of[tensor] = dims
        self.num_atoms = next_atom

    def of(self, tensor: torch.Tensor) -> DimLabels:
        """Return the labelled dimensions of a tensor; not to be changed."""
        labels: DimLabels = self._of.get(tensor, {})
        return labels

    def set(self, tensor: torch.Tensor, dims: DimLabels) -> None:
        """Say which dimensions of a new tensor are labelled."""
        self._of[tensor] = dims

    def note_activation(self, tensor: torch.Tensor) -> None:
        """Say that a tensor depends on the network's input, and is no function of parameters alone."""
        self._activations[tensor] = True

    def is_activation(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor depends on the network's input."""
        return tensor in self._activations

    def tie(self, left: Atoms, right: Atoms) -> None:
        """Remove these atoms together, index by index; the arrays broadcast."""
        if left is not right:
            self.ties.append((left, right))

    def freeze(self, atoms: Atoms, reason: str) -> None:
        """Never remove these atoms."""
        self.frozen.append((atoms, reason))

    def freeze_all(self, tensors: Iterable[torch.Tensor], reason: str) -> None:
        """Never remove anything that these tensors carry."""
        for tensor in tensors:
            for atoms in self.of(tensor).values():
                self.freeze(atoms, reason)

    def tell_apart(self, atoms: Atoms) -> None:
        """Keep units inside and outside of this part in different groups: code treats them differently."""
        self.told_apart.append(atoms)

    def produces(self, atoms: Atoms) -> None:
        """Say that a layer computes these channels."""
        self.produced.append(atoms)

    def consumes(self, atoms: Atoms) -> None:
        """Say that a layer reads these channels."""
        self.consumed.append(atoms)

    def lie_in_conv_groups(self, atoms: Atoms) -> None:
        """Say that a convolution in groups of several channels makes these channels."""
        self.in_conv_groups.append(atoms)


def blocks(before: Iterable[int], after: Iterable[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the dimensions of two shapes of one size in the smallest blocks of equal size.

    A reshape from ``before`` to ``after`` moves elements inside each block only. Dimensions of size 1 are in
    no block.
    """
    a = [(dim, size) for dim, size in enumerate(before) if size > 1]
    b = [(dim, size) for dim, size in enumerate(after) if size > 1]
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        left, right = [a[i][0]], [b[j][0]]
        product_left, product_right = a[i][1], b[j][1]
        i, j = i + 1, j + 1
        while product_left != product_right:
            if product_left < product_right:
                left.append(a[i][0])
                product_left *= a[i][1]
                i += 1
            else:
                right.append(b[j][0])
                product_right *= b[j][1]
                j += 1
        found.append((left, right))
    return found
