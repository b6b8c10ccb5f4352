"""Ask a running loop to stop at its next safe point."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import NoReturn

from archsearch.errors import PreemptedError

_open: list[StopRequest] = []
"""Those whose contexts this process is in, the innermost last."""


class StopRequest:
    """A context in which the first signal only leaves a note, and the second ends the process at once.

    The handler does nothing else, so that no write and no step is ever cut in two by the first signal.
    Outside the main thread, where Python allows no handlers, the context changes nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.signum = 0  # of the first signal that came
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:  # noqa: PYI034  # typing.Self is Python 3.11
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                before = signal.getsignal(name)
                if before is not signal.SIG_IGN:  # nohup and background shells ignore on purpose
                    self._before[name] = before
                    signal.signal(name, self._note)
            _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self in _open:
            _open.remove(self)
        for name, before in self._before.items():
            signal.signal(name, before)  # type: ignore[arg-type]  # what getsignal gave
        if self.signum and kind is None:  # it came too late for the loop, so it is the caller's
            signal.raise_signal(self.signum)

    def __bool__(self) -> bool:
        return self.signum != 0

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        for name in self._before:
            signal.signal(name, signal.SIG_DFL)


def requested() -> int:
    """Return the signal that asked the main thread to stop and that no loop has answered yet, else 0."""
    return next((each.signum for each in reversed(_open) if each.signum), 0)


def leave(signum: int, message: str) -> NoReturn:
    """Raise what a signal stands for: KeyboardInterrupt, or PreemptedError with a message."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise PreemptedError(message)
