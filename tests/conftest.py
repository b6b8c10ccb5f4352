"""What all tests share: settings of hypothesis, and fixtures that several files ask for.

Hypothesis has no time limit on shared machines, and takes the same examples in every CI run.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# A shell in the background, or nohup, lets the tests ignore signals that some of them send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: on the CPU the number decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def without_pictures() -> Iterator[None]:
    """Leave out the pictures of a search: they have tests of their own, and take long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("archsearch.search.driver.missing", lambda: "not drawn in these tests")
        patch.setattr("archsearch.search.driver.annotate_trial", lambda *given: None)
        yield
