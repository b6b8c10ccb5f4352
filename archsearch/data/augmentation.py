"""Random pad-and-crop, mirror and cutout, for a whole batch at once.

All draws of an epoch are made before its first batch, one row per sample of the split. So a sample meets the
same crop whichever batch, rank or process it comes in, and a pass that starts in the middle needs nothing
replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from archsearch.errors import UsageError


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied (He et al., CVPR 2016, section 4.2; cutout: DeVries & Taylor, 2017).

    Args:
        pad: Zero pixels added on every side before an image-sized part is cut out at random.
        flip: Whether every second image, at random, is mirrored left to right.
        cutout: Side in pixels of a square, centred anywhere in the image, that is set to the mean; 0 for
            none.

    Raises:
        UsageError: If ``pad`` or ``cutout`` is negative.
    """

    pad: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        if self.pad < 0 or self.cutout < 0:
            raise UsageError(
                f"augmentation: pad {self.pad} and cutout {self.cutout} must be at least 0 pixels"
            )

    def draw(self, samples: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
        """Draw the variation of every sample.

        Returns:
            int64 ``(samples, 5)``: top and left of the crop in ``[0, 2 * pad]``, whether to mirror in ``{0,
            1}``, row and column of the centre of the cutout.
        """
        ends = (2 * self.pad + 1, 2 * self.pad + 1, 2 if self.flip else 1, height, width)
        return torch.stack([torch.randint(end, (samples,), generator=generator) for end in ends], dim=1)

    def still(self, samples: int) -> torch.Tensor:
        """Return the draws, as of ``draw``, that leave every sample as it is."""
        return torch.tensor([self.pad, self.pad, 0, 0, 0]).expand(samples, 5)


def mirrored(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mirror those images ``(N, H, W, C)`` whose ``chosen`` ``(N,)`` is not 0; may work in place."""
    if images.is_cuda:  # picking the chosen ones would make the host wait for the device
        return torch.where(chosen.bool().view(-1, 1, 1, 1), images.flip(2), images)
    rows = chosen.nonzero()[:, 0]
    return images.index_copy_(0, rows, images.index_select(0, rows).flip(2))


def cut_out(images: torch.Tensor, side: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Set a square of each image ``(N, H, W, C)`` to 0, in place; what would lie outside is clipped.

    Args:
        images: Normalised, so that 0 is the mean.
        side: Of the square, in pixels.
        rows: Of the centres, ``(N,)``; a square of even side reaches one pixel less to the right and below.
        columns: Of the centres, ``(N,)``.
    """

    def within(length: int, centres: torch.Tensor) -> torch.Tensor:
        offset = torch.arange(length, device=images.device) - centres[:, None]
        return (offset >= -(side // 2)) & (offset < side - side // 2)

    square = within(images.shape[1], rows)[:, :, None] & within(images.shape[2], columns)[:, None, :]
    return images.masked_fill_(square[..., None], 0.0)
