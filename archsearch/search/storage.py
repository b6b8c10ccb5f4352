"""Where a study is kept: in a file of the run directory, or in a PostgreSQL that several drivers share.

A password is in ``$ARCHSEARCH_STORAGE``, ``$PGPASSWORD`` or ``~/.pgpass``, and in no option, message, file
or attribute: no text of ours ever holds more of an address than host, port and database.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    OperationalError,
    PendingRollbackError,
    SQLAlchemyError,
)

from archsearch.errors import PreemptedError, StorageError, UsageError
from archsearch.training.signals import leave, requested

FILE: Final = "study.db"
VARIABLE: Final = "ARCHSEARCH_STORAGE"
SECRETS: Final = (VARIABLE, "PGPASSWORD", "PGPASSFILE", "PGSSLPASSWORD")
"""Environment variables that no worker needs and none gets."""

QUERY_SECRETS: Final = ("password", "sslpassword")
"""Parts of an address that are as secret as its password."""

LOCKS: Final = 0x61726368 << 24
"""The first of our advisory locks ("arch" in ASCII), that of the tables; those of the studies follow."""

WAIT_S: Final = 60.0
"""How long SQLite waits for another process, such as a dashboard that reads, before it gives up."""

AWAY: Final = "search stopped while its database was away; no trial is lost, and the same command goes on"
RETRY_S: Final = 2.0
REMIND_S: Final = 60.0
CONNECTION: Final = {
    "application_name": "archsearch",
    "connect_timeout": "10",
    # A server that vanished without a word is noticed within a minute.
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
}
SERVER_KEEPALIVES: Final = {
    "tcp_keepalives_idle": 30,
    "tcp_keepalives_interval": 10,
    "tcp_keepalives_count": 3,
}

Say = Callable[[str], None]
Result = TypeVar("Result")


def address(option: str | None) -> URL | None:
    """Return the database that a user names, by ``--storage`` or else ``$ARCHSEARCH_STORAGE``.

    Returns:
        None where neither is given: the study is then in its run directory.

    Raises:
        UsageError: If it is no PostgreSQL, or a password stands in the option.
    """
    given = option or os.environ.get(VARIABLE)
    if not given:
        return None
    source = "--storage" if option else f"${VARIABLE}"
    try:
        url = make_url(given)
    except (SQLAlchemyError, ValueError):
        # The parser's own message would repeat a part of the address, which may be the password.
        raise UsageError(
            f"{source}: is no address: give postgresql://USER@HOST:PORT/DATABASE, "
            "with the characters : / @ % # ? of a name or password as %3A and so on"
        ) from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise UsageError(
            f"{source}: is {url.get_backend_name()}: several drivers share a PostgreSQL only, "
            "postgresql://USER@HOST:PORT/DATABASE; without it the study is in the run directory"
        )
    if option and (url.password is not None or any(name in url.query for name in QUERY_SECRETS)):
        raise UsageError(
            "--storage: has a password, which everybody on this machine sees in the list of processes: "
            f"leave it out and set $PGPASSWORD or ~/.pgpass, or give the whole address as ${VARIABLE}"
        )
    return url.set(drivername="postgresql+psycopg")


def named(url: URL) -> str:
    """Return an address for a message: host, port and database, and nothing secret."""
    return f"postgresql://{url.host or ''}{f':{url.port}' if url.port else ''}/{url.database or ''}"


def study_name(url: URL | None, identity: Mapping[str, Any]) -> str:
    """Return the name of a study: a database holds many, told apart by what decides their values."""
    if url is None:
        return "search"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"{identity.get('model', 'search')} {digest}"


@contextlib.contextmanager
def storage(directory: Path, url: URL | None, say: Say) -> Iterator[RDBStorage]:
    """Open the storage of a study and close it at the end.

    Args:
        directory: Of the run, which holds the study where there is no ``url``.
        url: As from ``address``.
        say: Is told when the server is lost and when it is back.

    Raises:
        UsageError: If the package for PostgreSQL is missing.
        StorageError: If the server cannot be reached now, or the file is damaged.
    """
    opened = _in_file((directory / FILE).resolve()) if url is None else _connected(url, say)
    try:
        yield opened
    finally:
        opened.engine.dispose()


@contextlib.contextmanager
def looked_at(url: URL) -> Iterator[RDBStorage]:
    """Open a shared database so that the server itself refuses to write.

    Raises:
        UsageError: If the package for PostgreSQL is missing.
        StorageError: If it cannot be read.
    """
    options = _options(url)
    options["connect_args"]["options"] = "-c default_transaction_read_only=on"
    try:
        opened = RDBStorage(
            url.render_as_string(hide_password=False), engine_kwargs=options, skip_table_creation=True
        )
        try:
            yield opened
        finally:
            opened.engine.dispose()
    except (SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(f"{named(url)}: cannot be read: {reason(error, url)}") from None


def _options(url: URL) -> dict[str, Any]:
    if find_spec("psycopg") is None:
        raise UsageError(
            "a study in PostgreSQL needs the package psycopg: pip install 'archsearch[postgresql]'"
        )
    return {
        "connect_args": {name: value for name, value in CONNECTION.items() if name not in url.query},
        "pool_pre_ping": True,  # a connection that died while nobody looked is replaced unseen
    }


def _in_file(path: Path) -> RDBStorage:
    address = URL.create("sqlite", database=str(path)).render_as_string()
    try:
        return RDBStorage(address, engine_kwargs={"connect_args": {"timeout": WAIT_S}})
    except (SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(
            f"{path}: cannot be opened as a study ({reason(error)}): move this file away; trainings in the "
            "store are found again by the same command"
        ) from error


def _connected(url: URL, say: Say) -> Patient:
    options = _options(url)
    engine = create_engine(url, **options)
    try:
        # Two drivers that start at once would both create the tables.
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCKS})
            return Patient(url, options, say)
    except SQLAlchemyError as error:
        raise StorageError(
            f"{named(url)}: cannot be opened: {reason(error, url)}; is the server up, and are user, "
            f"database and password (${VARIABLE}, $PGPASSWORD or ~/.pgpass) right?"
        ) from None
    finally:
        engine.dispose()


class Patient(RDBStorage):
    """An Optuna storage that waits for its server: what was asked is done when the server is back.

    A call that the server answered just before it died is done twice. That is harmless: attributes and
    parameters are set to what they are, a second end of a trial is refused, and a trial that was created or
    started twice has one twin that no driver claims, which ``claims`` looks after.

    Nobody waits for ever: a signal that asks the process to stop, which is else looked for between two calls,
    ends the wait of the main thread, and ``closing`` that of all others.

    Attributes:
        losses: How often the server was lost.
        closing: Set when nothing more is worth waiting for.

    Args:
        url: Of the server.
        options: For SQLAlchemy's engine.
        say: Is told when the server is lost and when it is back.
    """

    def __init__(self, url: URL, options: dict[str, Any], say: Say) -> None:
        self.losses = 0
        self.closing = threading.Event()
        self._server, self._say = url, say
        self._lost_s: float | None = None  # since when; several threads ask
        self._said_s = 0.0
        self._guard = threading.Lock()
        super().__init__(url.render_as_string(hide_password=False), engine_kwargs=options)

    def patiently(self, call: Callable[[], Result]) -> Result:
        """Return what ``call`` returns, however long the server is away.

        Raises:
            KeyboardInterrupt: If SIGINT came while it was away.
            PreemptedError: If another signal came, or the storage is being closed.
        """
        while True:
            try:
                result = call()
            except (SQLAlchemyError, StorageInternalError) as error:
                if not _is_lost(error):
                    raise
                self._note_loss(error)
                self.remove_session()
                self._pause()
            else:
                self._note_return()
                return result

    def _pause(self) -> None:
        """Wait before the server is asked again, unless somebody wants to leave."""
        here = threading.current_thread() is threading.main_thread()
        if here and (signum := requested()):
            leave(signum, AWAY)
        # A signal's handler runs in the middle of a wait, which then goes on to its end.
        if self.closing.wait(RETRY_S):
            raise PreemptedError(AWAY)

    def _note_loss(self, error: Exception) -> None:
        now_s = time.monotonic()
        with self._guard:
            if self._lost_s is None:
                self._lost_s = now_s
                self.losses += 1
            elif now_s - self._said_s < REMIND_S:
                return
            self._said_s = now_s
        self._say(
            f"{named(self._server)}: connection lost ({reason(error, self._server)}); nothing is lost: "
            "waiting for it; or stop, and give the same command later"
        )

    def _note_return(self) -> None:
        if self._lost_s is None:
            return
        with self._guard:
            since_s, self._lost_s = self._lost_s, None
        if since_s is not None:
            self._say(f"{named(self._server)}: is back after {time.monotonic() - since_s:.0f} s")


def _is_lost(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    # Optuna reads trials a second way where the first loses the connection, in the same broken session.
    return isinstance(cause, OperationalError | InterfaceError | PendingRollbackError) or (
        isinstance(cause, DBAPIError) and cause.connection_invalidated
    )


def reason(error: BaseException, url: URL | None = None) -> str:
    """Return an error of the database in one line that holds no password."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    words = " ".join(str(cause.orig if isinstance(cause, DBAPIError) else cause).split())
    secrets = [url.password, *(url.query.get(name) for name in QUERY_SECRETS)] if url is not None else []
    for secret in secrets:
        if secret:
            words = words.replace(str(secret), "***")
    return words[:300]


def _waiting(method: Callable[..., Result]) -> Callable[..., Result]:
    @functools.wraps(method)
    def wait(self: Patient, *args: Any, **kwargs: Any) -> Result:
        return self.patiently(lambda: method(self, *args, **kwargs))

    return wait


# Each is one transaction, which can be asked for again. The private ones are what Optuna's cache calls in
# the place of the public ones of nearly the same names.
TRANSACTIONS: Final = [
    *(name for name in vars(RDBStorage) if name in vars(BaseStorage) and not name.startswith(("__", "_abc"))),
    *("_create_new_trial", "_set_trial_param", "_get_trials", "_get_best_trial_id"),
]
TRANSACTIONS.remove("remove_session")
for _name in TRANSACTIONS:
    setattr(Patient, _name, _waiting(getattr(RDBStorage, _name)))


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Take the secrets out of this process's environment, for as long as something copies it."""
    kept = {name: os.environ.pop(name) for name in SECRETS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextlib.contextmanager
def advisory_lock(engine: Engine, study_id: int) -> Iterator[Callable[[], bool]]:
    """Hold the lock of a study, which dies with the connection; yields whether it is still held."""
    key = {"key": LOCKS + study_id}
    with engine.connect() as connection:
        # A driver whose machine vanished gives the lock back within a minute.
        for name, value in SERVER_KEEPALIVES.items():
            connection.execute(text(f"SET {name} = {value:d}"))
        connection.execute(text("SELECT pg_advisory_lock(:key)"), key)
        try:
            yield lambda: _alive(connection)
        finally:
            with contextlib.suppress(SQLAlchemyError):
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), key)


def _alive(connection: Connection) -> bool:
    try:
        connection.execute(text("SELECT 1"))
    except SQLAlchemyError:
        return False
    return True
