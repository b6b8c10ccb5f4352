"""The sizes of a convolution in groups, after channels have gone.

A weight alone does not say how: groups get narrower, all alike, or whole groups go. In a depthwise
convolution a group is one channel, and always goes as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ConvolutionSizes(NamedTuple):
    """The arguments of a convolution that say its channels."""

    in_channels: int
    out_channels: int
    groups: int

    def fitted(self, weight: Sequence[int], *, transposed: bool, whole_groups: bool) -> ConvolutionSizes:
        """Return the sizes that go with a smaller weight.

        Args:
            weight: Its shape, ``(C_out, C_in / groups, ...)`` or transposed ``(C_in, C_out / groups, ...)``.
            transposed: Whether the convolution is.
            whole_groups: Whether whole groups went.
        """
        rows, columns = weight[:2]
        groups = self.groups
        depthwise = groups == self.in_channels > 1
        if depthwise or (whole_groups and groups > 1):
            groups = rows // ((self.in_channels if transposed else self.out_channels) // groups)
        if transposed:
            return ConvolutionSizes(rows, columns * groups, groups)
        return ConvolutionSizes(columns * groups, rows, groups)
