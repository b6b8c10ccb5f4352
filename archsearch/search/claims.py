"""Which driver carries out which trial, where several drivers work on one study.

Each driver beats: it changes one value of the study every few seconds. A driver whose value has stood still
for the whole time of ``grace_s`` that another one *watched* it is dead, and its trials are taken over. Only
the watcher's own monotonic clock is read, and what it saw before the server was away does not count. So
clocks that differ or jump, and a server that stops for an hour, cost no living driver its trials.

The name of a driver stays with its run directory, which a kernel lock keeps for one process: the same
command after a kill finds its own trials at once.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from archsearch import files
from archsearch.errors import PreemptedError, StorageError
from archsearch.search.storage import Patient, advisory_lock

DRIVER: Final = "driver"
"""The user attribute of a trial that names the driver that carries it out."""

NOTE: Final = "driver.json"
"""The file of a run that takes part in a shared study."""

BEAT: Final = "archsearch:beat:"
BEAT_S: Final = 10.0
GRACE_S: Final = 60.0


class Claims(Protocol):
    """What the driver asks before it asks the study.

    Attributes:
        salt: Differs between drivers, whose samplers would draw the same points from the same seed.
    """

    salt: int

    def ask(self, room: Callable[[], bool]) -> Trial | None:
        """Ask the study for a trial, if there is room; no other driver asks in between."""

    def mine(self, trial: FrozenTrial) -> bool:
        """Return whether this driver carries out a running trial."""

    def left(self) -> list[FrozenTrial]:
        """Take over the running trials of dead drivers, and return them."""

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Keep the other drivers from asking and enqueueing until the end."""


def tell(
    study: optuna.Study, number: int, value: float | None = None, state: TrialState | None = None
) -> None:
    """Tell the end of a trial; one that had ended before stays as it is.

    A driver that was paused for long finds that another one has taken its trial over, and an end that was
    told while the server died is told twice. A task is a pure function, so both ends are the same.
    """
    with unless_ended():
        study.tell(number, value, state=state, skip_if_finished=True)


def unless_ended() -> contextlib.AbstractContextManager[None]:
    """Return a context that leaves quietly where a trial takes nothing more, since its end was told."""
    return contextlib.suppress(UpdateFinishedTrialError)


class Alone:
    """The claims of the only driver of a study: all trials are its own."""

    salt = 0

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def ask(self, room: Callable[[], bool]) -> Trial | None:
        """Ask the study for a trial, if there is room."""
        return self._study.ask() if room() else None

    def mine(self, trial: FrozenTrial) -> bool:
        """Return True."""
        return True

    def left(self) -> list[FrozenTrial]:
        """Return nothing."""
        return []

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()


class Shared:
    """The claims of one driver among others; a context in which it beats.

    Args:
        study: In the storage.
        storage: Of the study.
        name: Of this driver; no two that live have the same.
        beat_s: Seconds between two beats.
        grace_s: Seconds that a driver is watched without a beat before it counts as dead.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: Patient,
        name: str,
        *,
        beat_s: float = BEAT_S,
        grace_s: float = GRACE_S,
    ) -> None:
        self.name, self.salt = name, zlib.crc32(name.encode())
        self._study, self._storage = study, storage
        self._id = storage.get_study_id_from_name(study.study_name)
        self._beat_s, self._grace_s = beat_s, grace_s
        self._watched: dict[str, tuple[object, float]] = {}
        self._losses = storage.losses
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="archsearch-beat", daemon=True)

    def __enter__(self) -> Shared:  # noqa: PYI034  # typing.Self is Python 3.11
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._storage.closing.set()  # a beat that waits for the server waits no longer
        self._thread.join(timeout=2 * BEAT_S)

    def ask(self, room: Callable[[], bool]) -> Trial | None:
        """Ask the study for a trial and claim it, if there is room."""
        while True:
            with self.turn() as held:
                if not room():
                    return None
                trial = self._study.ask()
                trial.set_user_attr(DRIVER, self.name)
                kept = held()
            if kept:
                return trial
            # The server was away meanwhile, and another driver may have seen the same room.
            tell(self._study, trial.number, state=TrialState.FAIL)

    def mine(self, trial: FrozenTrial) -> bool:
        """Return whether this driver has claimed a trial."""
        return trial.user_attrs.get(DRIVER) == self.name

    def left(self) -> list[FrozenTrial]:
        """Take over the running trials of dead drivers, and return them.

        A trial that nobody claimed for as long is the remainder of a driver that died while it asked. Unless
        it was enqueued, nothing is known of it, and it ends here.
        """
        beats = self._storage.get_study_system_attrs(self._id)
        if self._losses != self._storage.losses:
            self._watched.clear()  # nobody could beat
            self._losses = self._storage.losses
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        owners = {trial.number: trial.user_attrs.get(DRIVER) for trial in running}
        dead = {
            number: owner
            for number, owner in owners.items()
            if owner != self.name
            and self._stood_still(f"trial {number} of {owner}", beats.get(_key(owner)) if owner else None)
        }
        if not dead:
            return []
        taken = []
        with self.turn():
            for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
                # Another driver may have been faster.
                if trial.number not in dead or trial.user_attrs.get(DRIVER) != dead[trial.number]:
                    continue
                if not trial.user_attrs:
                    tell(self._study, trial.number, state=TrialState.FAIL)
                else:
                    self._storage.set_trial_user_attr(trial._trial_id, DRIVER, self.name)
                    taken.append(trial)
        return taken

    @contextlib.contextmanager
    def turn(self) -> Iterator[Callable[[], bool]]:
        """Hold the study's lock in the database; yields whether it is still held."""
        with contextlib.ExitStack() as stack:
            yield self._storage.patiently(
                lambda: stack.enter_context(advisory_lock(self._storage.engine, self._id))
            )

    def _stood_still(self, what: str, beat: object) -> bool:
        now_s = time.monotonic()
        before, since_s = self._watched.get(what, (None, now_s))
        if what not in self._watched or before != beat:
            self._watched[what] = (beat, now_s)
            return False
        return now_s - since_s > self._grace_s

    def _beat(self) -> None:
        # Any new value will do: it is compared for equality alone.
        self._storage.set_study_system_attr(self._id, _key(self.name), secrets.token_hex(4))

    def _beat_on(self) -> None:
        # One that the end finds without its server is no longer worth anything.
        with contextlib.suppress(PreemptedError):
            while not self._over.wait(self._beat_s):
                self._beat()


@contextlib.contextmanager
def claims(study: optuna.Study, storage: RDBStorage, directory: Path) -> Iterator[Alone | Shared]:
    """Open a driver's claims on the trials of a study.

    Args:
        study: In ``storage``.
        storage: As from ``storage.storage``.
        directory: Of the run, held by this process; it keeps the name of the driver.
    """
    if isinstance(storage, Patient):
        with Shared(study, storage, driver_name(directory, study.study_name)) as shared:
            yield shared
    else:
        yield Alone(study)


def beats(study: optuna.Study) -> dict[str, object]:
    """Return the last beat of each driver that a shared study ever had, by its name."""
    attributes = study._storage.get_study_system_attrs(study._study_id)
    return {key.removeprefix(BEAT): beat for key, beat in attributes.items() if key.startswith(BEAT)}


def driver_name(directory: Path, study: str) -> str:
    """Return the name of the driver of a run directory, always the same; note which study it shares."""
    before = noted(directory)
    name = before.get(DRIVER) or f"{socket.gethostname()[:40]}-{secrets.token_hex(4)}"
    if before != (now := {DRIVER: name, "study": study}):
        files.write_json(directory / NOTE, now)
    return name


def shared_study(directory: Path) -> str | None:
    """Return the name of the shared study that the driver of a run directory works on, if it does."""
    return noted(directory).get("study")


def noted(directory: Path) -> dict[str, str]:
    """Return what a run directory notes of its part in a shared study: its driver and the study, or nothing.

    Raises:
        StorageError: If the note is damaged.
    """
    path = directory / NOTE
    if not path.exists():
        return {}
    data: Any = files.read_json(path, StorageError)
    if not isinstance(data, dict) or not all(isinstance(text, str) for text in data.values()):
        raise StorageError(f"{files.named(path)}: does not name the driver of this run: delete this file")
    return data


def _key(driver: str) -> str:
    return BEAT + driver
