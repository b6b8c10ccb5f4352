"""What a task needs of a cluster's node."""

from __future__ import annotations

from dataclasses import dataclass

from archsearch.errors import UsageError
from archsearch.search.engines.engine import Order


@dataclass(frozen=True)
class Resources:
    """What is asked of a cluster.

    Attributes:
        jobs: Tasks at once.
        cpus: Cores of a task, which are its threads.
        gpus: Of a task; with more than one its training is data-parallel.
    """

    jobs: int = 1
    cpus: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        for option, number, least in [
            ("--jobs", self.jobs, 1),
            ("--cpus-per-task", self.cpus, 1),
            ("--gpus-per-task", self.gpus, 0),
        ]:
            if number < least:
                raise UsageError(f"{option} {number}: at least {least}")

    @property
    def processes(self) -> int:
        """Processes of a task's training: one a GPU."""
        return max(1, self.gpus)

    @classmethod
    def of(cls, order: Order) -> Resources:
        """Return what an order asks for.

        Raises:
            UsageError: If a number is too small, or the trainings' device and the GPUs do not go together.
        """
        needs = cls(order.jobs, int(order.options.get("cpus") or 1), int(order.options.get("gpus") or 0))
        if needs.gpus and order.device == "cpu":
            raise UsageError(f"--gpus-per-task {needs.gpus}: with --device cpu nothing runs on a GPU")
        if not needs.gpus and order.device.startswith("cuda"):
            raise UsageError(
                f"--device {order.device}: tasks on a cluster see no GPU without --gpus-per-task 1"
            )
        return needs
