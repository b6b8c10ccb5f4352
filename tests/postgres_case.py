"""A real PostgreSQL for a test: on loopback, a random port, in a directory that goes away again."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

PASSWORD = "correct-horse:battery/staple"
QUOTED = "correct-horse%3Abattery%2Fstaple"
OWNERS = ("postgres", "nobody")
"""Who may own the server where the tests run as root, which PostgreSQL refuses to run as."""


class Server:
    """One cluster with one database ``studies`` of the user ``searcher``, who needs the password."""

    def __init__(self, directory: Path, binaries: Path, owner: str | None) -> None:
        self._data, self._binaries, self._owner = directory / "data", binaries, owner
        self.port = free_port()
        secret = directory / "password"
        secret.write_text(PASSWORD)
        if owner is not None:
            shutil.chown(directory, owner)
            shutil.chown(secret, owner)
        initdb = ["initdb", "-D", str(self._data), "-U", "searcher", "-A", "scram-sha-256", "--no-sync"]
        self._run([*initdb, f"--pwfile={secret}", "--no-locale", "-E", "UTF8"])
        self.start()
        self._psql("CREATE DATABASE studies")

    @property
    def url(self) -> str:
        return f"postgresql://searcher:{QUOTED}@127.0.0.1:{self.port}/studies"

    @property
    def public_url(self) -> str:
        return f"postgresql://searcher@127.0.0.1:{self.port}/studies"

    def start(self) -> None:
        settings = f"-h 127.0.0.1 -p {self.port} -k {self._data} -c fsync=off -c max_wal_size=64MB"
        self._run(
            ["pg_ctl", "-D", str(self._data), "-l", str(self._data / "log"), "-w", "-o", settings, "start"]
        )

    def stop(self, mode: str = "fast") -> None:
        """Stop it; ``immediate`` is what a kill does."""
        self._run(["pg_ctl", "-D", str(self._data), "-w", "-m", mode, "stop"])

    def is_up(self) -> bool:
        return self._call(["pg_ctl", "-D", str(self._data), "status"]).returncode == 0

    def _psql(self, statement: str) -> None:
        words = ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "searcher", "-d", "postgres", "-q"]
        self._run([*words, "-c", statement], PGPASSWORD=PASSWORD)

    def _run(self, words: Sequence[str], **environment: str) -> None:
        done = self._call(words, **environment)
        assert done.returncode == 0, f"{words[0]}: {done.stdout}{done.stderr}"

    def _call(self, words: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._binaries / words[0]), *words[1:]],
            user=self._owner,
            env={**os.environ, **environment, "LC_ALL": "C"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if words[-1] != "start" else subprocess.DEVNULL,
            stderr=subprocess.PIPE if words[-1] != "start" else subprocess.DEVNULL,
            text=True,
            timeout=120,
        )


@contextmanager
def running_server() -> Iterator[Server]:
    """Start a server; skip the test where there is none to start."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed: initdb and pg_ctl are nowhere")
    owner = next((name for name in OWNERS if _exists(name)), None) if os.geteuid() == 0 else None
    if os.geteuid() == 0 and owner is None:
        pytest.skip("PostgreSQL does not run as root, and there is no other user here")
    # Not in tmp_path, which nobody else may enter.
    with tempfile.TemporaryDirectory(prefix="archsearch-postgres-") as name:
        server = Server(Path(name), binaries, owner)
        try:
            yield server
        finally:
            if server.is_up():
                server.stop("immediate")


def find_binaries() -> Path | None:
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    on_path = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    return next((place for place in [*on_path, *installed] if (place / "initdb").exists()), None)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
