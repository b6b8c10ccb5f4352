"""Random numbers and kernels that come out the same every time."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a seed in ``[0, 2**63)`` that belongs to these parts alone.

    Hashing keeps the streams of neighbouring parts unrelated, which ``seed + epoch`` does not: there, epoch 1
    of seed 0 is epoch 0 of seed 1.
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def stream(*parts: int | str) -> Iterator[None]:
    """Draw torch's numbers on the CPU from the stream of these parts; afterwards the old one goes on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(*parts))
        yield


def seed_globals(seed: int) -> None:
    """Set the global generators of Python, NumPy and torch, which dropout and its like draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Run the body with deterministic kernels; put flags and global generators back afterwards.

    On the CPU an operation without a deterministic kernel raises. On a GPU torch only warns about it, since
    common networks need a few of them there.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its flag is a property that the types do not know
    fill = memory.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without
    try:
        torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
        # Filling fresh memory finds reads of it in tests; here it costs time and changes no result.
        memory.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
