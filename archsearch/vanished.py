"""What stands in the place of a module whose residual branch is gone: zeros.

The code of the model still calls it, and still adds what comes out to the shortcut, in place perhaps. So the
zeros have a shape that fits: that of the same module where each group of the branch has one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Resize(NamedTuple):
    """The size of one dimension of an output, ``(input * times + plus) // over``."""

    times: int
    plus: int
    over: int = 1

    def __call__(self, size: int) -> int:
        """Return the output's size for an input's."""
        return (size * self.times + self.plus) // self.over


SAME = Resize(1, 0)


def fixed(size: int) -> Resize:
    """Return the rule of a size that no input changes."""
    return Resize(0, size)


class Vanished(nn.Module):
    """Zeros, whatever comes in; no parameters, no work.

    The fixed sizes are those of a buffer that no state dict holds. So a trace of the small network knows them
    as channels, and they can be cut again.

    Args:
        sizes: How each dimension of the output follows from the same one of the first input.
        like: A tensor of the dtype and device of the zeros.
    """

    zeros: Tensor

    def __init__(self, sizes: Sequence[Resize], like: Tensor) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        shape = [1 if size.times else size.plus for size in sizes]
        self.register_buffer("zeros", like.new_zeros(shape), persistent=False)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """Map ``(N, ...)`` to zeros ``(N, ...)``; other arguments are not looked at."""
        times = [
            x.shape[dim] if size == SAME else size(x.shape[dim]) if size.times else 1
            for dim, size in enumerate(self.sizes)
        ]
        return self.zeros.repeat(times)


def window(conv: nn.modules.conv._ConvNd, axis: int) -> Resize:
    """Return how a convolution changes one spatial size (the formula of torch's documentation)."""
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    stride = conv.stride[axis]
    if isinstance(conv.padding, str):  # "same" or "valid"
        padded = reach if conv.padding == "same" else 0
    else:
        padded = 2 * conv.padding[axis]
    if conv.transposed:
        return Resize(stride, reach + 1 - stride - padded + conv.output_padding[axis])
    return Resize(1, padded - reach - 1 + stride, stride)
