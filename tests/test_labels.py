from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from archsearch.labels import CONSTANT, Labels, blocks

SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=4)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of the same number of elements: the second's factors are shuffled and multiplied."""
    before = draw(SIZES)
    factors = [prime for size in before for prime in {4: [2, 2], 6: [2, 3]}.get(size, [size])]
    factors = draw(st.permutations(factors) | st.just(factors))
    after: list[int] = []
    for factor in factors:
        if len(after) > 0 and draw(st.booleans()):
            after[-1] *= factor
        else:
            after.append(factor)
    return before, after


@given(reshapes())
def test_a_reshape_moves_elements_inside_each_block_only(shapes: tuple[list[int], list[int]]) -> None:
    before, after = shapes
    pairs = blocks(before, after)
    assert [dim for left, _ in pairs for dim in left] == [d for d, size in enumerate(before) if size > 1]
    assert [dim for _, right in pairs for dim in right] == [d for d, size in enumerate(after) if size > 1]
    for left, right in pairs:
        assert math.prod(before[dim] for dim in left) == math.prod(after[dim] for dim in right)


@given(reshapes())
def test_blocks_cannot_be_cut_further(shapes: tuple[list[int], list[int]]) -> None:
    before, after = shapes
    for left, right in blocks(before, after):
        from_left = {math.prod(before[dim] for dim in left[:n]) for n in range(1, len(left))}
        from_right = {math.prod(after[dim] for dim in right[:n]) for n in range(1, len(right))}
        assert not from_left & from_right


def test_every_index_of_every_longer_dimension_is_one_atom() -> None:
    labels = Labels({"a": torch.zeros(2, 1, 3), "b": torch.zeros(()), "c": torch.zeros(4)})
    assert [(slot.tensor, slot.dim, slot.size) for slot in labels.slots] == [
        ("a", 0, 2),
        ("a", 2, 3),
        ("c", 0, 4),
    ]
    atoms = [atom for slot in labels.slots for atom in slot.atoms.tolist()]
    assert atoms == list(range(CONSTANT + 1, CONSTANT + 10))
    assert labels.num_atoms == 10
