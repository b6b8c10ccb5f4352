"""The data sets that torchvision knows to fetch; it compares the MD5 of what it gets."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from archsearch.errors import ResourceError


def torchvision_class(name: str) -> Any:
    """Return the class ``name`` of ``torchvision.datasets``."""
    import torchvision.datasets  # one second to import, and only wanted here

    return getattr(torchvision.datasets, name)


def open_set(name: str, directory: Path, *, train: bool = True, download: bool = False) -> Any:
    """Return torchvision's data set ``name`` in ``directory``; its errors pass through."""
    with warnings.catch_warnings():
        # The published CIFAR files hold dtypes as the numpy of 2009 wrote them.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        return torchvision_class(name)(root=str(directory), train=train, download=download)


def fetch(name: str, directory: Path) -> None:
    """Download and unpack torchvision's data set ``name`` into ``directory``, unless it is there already.

    Raises:
        ResourceError: If that fails.
    """
    try:
        open_set(name, directory, download=True)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        raise ResourceError(
            f"{name} could not be downloaded to {directory} ({error}); "
            "try again, or put its files there by hand"
        ) from error
