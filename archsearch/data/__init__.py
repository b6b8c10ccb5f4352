"""Images in fixed splits, delivered in batches that a seed decides.

A name becomes a ``DataSource`` with three splits, and a split becomes batches::

    source = load_data("digits")
    for images, labels in source.train.batches(128, seed=0, epoch=3, train=True):
        ...

The training split alone is shuffled and augmented. Its order and every random crop follow from ``(seed,
epoch, sample)`` and from nothing else: not from the number of workers, not from the rank that happens to hold
a sample, and not from where in the epoch one starts. The test set is not loaded before ``source.test`` is
used.

Own images come in as tensors (``in_memory``), as loaders (``from_loaders``), or as a registered data set: a
function from ``DataRequest`` to ``DataSource`` with ``@DATASETS.register("name")``, or the entry-point group
``archsearch.datasets``.
"""

from __future__ import annotations

from archsearch.data import cifar, digits, idx, imagefolder  # noqa: F401  they register themselves
from archsearch.data.augmentation import Augmentation
from archsearch.data.loaders import from_loaders
from archsearch.data.source import DATASETS, DataRequest, DataSource, Split, load_data
from archsearch.data.tensors import in_memory

__all__ = [
    "DATASETS",
    "Augmentation",
    "DataRequest",
    "DataSource",
    "Split",
    "from_loaders",
    "in_memory",
    "load_data",
]
