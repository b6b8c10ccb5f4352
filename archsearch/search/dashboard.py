"""Optuna's dashboard for the run of a search: on this machine alone, and read-only unless asked.

A web page anywhere can make a browser send requests to this machine. So a request has to name a host that is
ours (a foreign name that somebody points at 127.0.0.1 is refused), one that comes from another page has to
come from such a host too, and without ``--allow-edit`` nothing but reading is answered at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from archsearch import files
from archsearch.errors import ResourceError, UsageError
from archsearch.search.artifacts import Folders
from archsearch.search.claims import NOTE, shared_study
from archsearch.search.reading import read_only
from archsearch.search.storage import FILE, storage

HOST = "127.0.0.1"
LOCAL = ("127.0.0.1", "localhost", "[::1]")
READING = ("GET", "HEAD")

Start = Callable[..., Any]
App = Callable[[dict[str, Any], Start], Iterable[bytes]]


class Guard:
    """Lets only the requests through to an application that it should answer.

    Args:
        app: Of WSGI.
        hosts: Names that a request may name besides those of this machine.
        allow_edit: Whether anything but reading is answered.
    """

    def __init__(self, app: App, hosts: Sequence[str] = (), *, allow_edit: bool = False) -> None:
        self._app, self._allow_edit = app, allow_edit
        self._hosts = {name.lower() for name in (*LOCAL, *hosts)}

    def __call__(self, environ: dict[str, Any], start_response: Start) -> Iterable[bytes]:
        """Answer a request, or refuse it with 403."""
        why = self._refused(environ)
        if why is not None:
            body = f"archsearch dashboard: {why}\n".encode()
            headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
            start_response("403 Forbidden", headers)
            return [body]

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            # The dashboard would let every web page read the artifacts.
            kept = [pair for pair in headers if pair[0].lower() != "access-control-allow-origin"]
            return start_response(status, [*kept, ("X-Content-Type-Options", "nosniff")], *rest)

        return self._app(environ, start)

    def _refused(self, environ: dict[str, Any]) -> str | None:
        if _name(environ.get("HTTP_HOST", "")) not in self._hosts:
            return "this host name is not served; --allowed-host NAME adds one"
        if environ["REQUEST_METHOD"] in READING:
            return None
        if not self._allow_edit:
            return "this dashboard is read-only; --allow-edit changes that"
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and urlsplit(origin).netloc.lower() != environ["HTTP_HOST"].lower():
            return "this request comes from another page"
        return None


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


class _Server(ThreadingMixIn, WSGIServer):
    """Answers several requests at once: a browser opens connections that it says nothing on."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Keep the terminal free of one line a request."""


@contextlib.contextmanager
def serving(
    run: Path,
    *,
    beside: Sequence[Path] = (),
    port: int = 8080,
    hosts: Sequence[str] = (),
    allow_edit: bool = False,
) -> Iterator[WSGIServer]:
    """Yield a server of a run's dashboard on 127.0.0.1, whose ``serve_forever`` the caller calls.

    Read-only, it may run beside the search. With ``allow_edit`` it holds the run directory as a search does,
    so that a study has one writer at a time.

    Args:
        run: The run directory.
        beside: Run directories of other drivers of its study, whose trials' artifacts are in there.
        port: To listen on; 0 takes a free one.
        hosts: Names that a request may name besides those of this machine.
        allow_edit: Whether studies, notes and artifacts may be changed and deleted.

    Raises:
        UsageError: If there is no study, a directory beside is of another one, or optuna-dashboard is not
            installed.
        StorageError: If the study cannot be read, or is in use and is to be edited.
        ResourceError: If the port is taken.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        raise UsageError(
            "the dashboard needs optuna-dashboard: pip install 'archsearch[dashboard]'"
        ) from None
    with contextlib.ExitStack() as stack:
        if _study_file(run) is None:
            raise UsageError(f"{run}: has no search ({FILE}): give the --out of one")
        study = shared_study(run)
        for other in beside:
            if study is None or shared_study(other) != study:
                raise UsageError(
                    f"{other}: is no run of the study of {run}: several run directories are those of the "
                    "drivers of one shared study"
                )
        if allow_edit:
            if study is not None:
                raise UsageError(f"--allow-edit: the study of {run} is shared by drivers: leave it out")
            stack.enter_context(files.lock(run))
            kept = stack.enter_context(storage(run, None, print))
        else:
            kept = stack.enter_context(read_only(run))
        app = wsgi(kept, artifact_store=Folders([run, *beside]))
        guard = Guard(app, hosts, allow_edit=allow_edit)
        try:
            server = make_server(HOST, port, guard, server_class=_Server, handler_class=_Quiet)
        except (OSError, OverflowError) as error:
            raise ResourceError(f"port {port} of {HOST}: {error}; give another --port, or 0") from error
        stack.callback(server.server_close)
        yield server


def searches(directory: Path) -> list[Path]:
    """Return the run directories of searches in a directory, the one that changed last first."""
    if not directory.is_dir():
        return []
    found = {run: file for run in directory.iterdir() if (file := _study_file(run)) is not None}
    return sorted(found, key=lambda run: found[run].stat().st_mtime, reverse=True)


def runs_of(directory: Path) -> list[Path]:
    """Return a run directory itself, or the searches in a directory that is none, such as a front's."""
    return [directory] if _study_file(directory) is not None else sorted(searches(directory)) or [directory]


def chosen(run: Path) -> tuple[Path, list[Path]]:
    """Return a run directory and the ones that were passed over: itself, or the newest search in it.

    Raises:
        UsageError: If there is no search.
    """
    if _study_file(run) is not None:
        return run, []
    found = searches(run)
    if not found:
        raise UsageError(f"{run}: has no search ({FILE}), and neither has a directory in it: give one")
    return found[0], found[1:]


def _study_file(run: Path) -> Path | None:
    """Return the study of a run, or the file that names the shared one it has."""
    return next((file for file in (run / FILE, run / NOTE) if file.is_file()), None)
