"""The engine that needs no other process: a task is done where it is submitted."""

from __future__ import annotations

from pathlib import Path

import torch

from archsearch.errors import UsageError
from archsearch.search.engines.engine import Order


class Inline:
    """Does each task at once, in the driver's process and with what the driver has in hand.

    Args:
        order: Does the tasks.

    Raises:
        UsageError: If more than one job is asked for.
    """

    slots = 1

    def __init__(self, order: Order) -> None:
        if order.jobs != 1:
            raise UsageError(f"--engine inline --jobs {order.jobs}: this process does one task at a time")
        self.threads = torch.get_num_threads()
        self._perform = order.perform

    def submit(self, task: Path) -> None:
        """Do the task; returns when it is done."""
        self._perform(task)

    def ended(self, task: Path) -> str | None:
        """Return that it ended, since nothing is ever left waiting."""
        return ""

    def cancel(self, task: Path) -> None:
        """Do nothing: there is no task while anybody could ask."""

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
