"""The handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

import torch

from archsearch.data.augmentation import Augmentation
from archsearch.data.order import stratified_split
from archsearch.data.source import DATASETS, DataRequest, DataSource
from archsearch.data.tensors import in_memory, resized

_TEST_SHARE = 0.2
_TEST_SEED = 0  # not the user's: the test set is the same in every run
_LARGEST = 16  # pixels count the ink in 4x4 blocks of a bitmap


@DATASETS.register("digits")
def digits(request: DataRequest) -> DataSource:
    """Open 1,797 grey images of 8x8 pixels in 10 classes (Alpaydin & Kaynak, UCI, 1998).

    One fifth of each class, always the same, is the test set; validation comes out of the rest.
    """
    from sklearn.datasets import load_digits  # one second to import, and only wanted here

    raw = load_digits()
    images = torch.from_numpy(raw.images).mul(255 / _LARGEST).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(raw.target).long()
    native, size = images.shape[-1], request.image_size or images.shape[-1]
    images = resized(images, size)
    rest, test = stratified_split(labels, _TEST_SHARE, _TEST_SEED)
    return in_memory(
        images[rest],
        labels[rest],
        test=(images[test], labels[test]),
        validation_share=request.validation_share,
        train_share=request.train_share,
        seed=request.seed,
        num_classes=10,
        augmentation=Augmentation(pad=round(size / native), cutout=request.cutout),
        name="digits",
        announcement=(
            f"digits: {len(images):,} {native}x{native} images that come with scikit-learn "
            "(embedded; use --data for your own)"
        ),
    )
