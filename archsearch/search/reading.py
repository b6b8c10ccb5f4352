"""A study that is only looked at: a search that is running in the same directory is not disturbed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from archsearch.errors import StorageError, UsageError
from archsearch.search.claims import shared_study
from archsearch.search.storage import FILE, VARIABLE, WAIT_S, address, looked_at, reason


@contextlib.contextmanager
def read_only(run: Path) -> Iterator[RDBStorage]:
    """Open the storage of a run's study so that SQLite itself refuses to write; nothing is created.

    Raises:
        UsageError: If there is no study.
        StorageError: If it cannot be read.
    """
    path = (run / FILE).resolve()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if shared_study(run) is not None:
        if (url := address(None)) is None:
            raise UsageError(f"{run}: its study is shared: set ${VARIABLE} to the address of its database")
        with looked_at(url) as shared:
            yield shared
        return
    if not path.is_file():
        raise UsageError(f"{run}: has no search ({FILE}): give the --out of one")
    place = URL.create("sqlite", database=f"file:{quote(str(path))}", query={"mode": "ro", "uri": "true"})
    options = {"connect_args": {"timeout": WAIT_S}}
    try:
        storage = RDBStorage(place.render_as_string(), engine_kwargs=options, skip_table_creation=True)
        try:
            yield storage
        finally:
            storage.engine.dispose()
    except (SQLAlchemyError, StorageInternalError) as error:
        raise StorageError(
            f"{path}: cannot be read as a study ({reason(error)}); "
            "if a search was killed there, going on with it mends the file"
        ) from error


@contextlib.contextmanager
def reading(run: Path) -> Iterator[optuna.Study]:
    """Yield the study of a run, read-only.

    Raises:
        UsageError: If there is none.
        StorageError: If it cannot be read.
    """
    with read_only(run) as storage:
        names = [study.study_name for study in storage.get_all_studies()]
        if (shared := shared_study(run)) is not None:
            names = [name for name in names if name == shared]
        if not names:
            raise StorageError(f"{run}: has no study yet: wait until the search has begun")
        yield optuna.load_study(study_name=names[0], storage=storage)
