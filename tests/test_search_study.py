from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from archsearch.errors import IntegrityError, StorageError
from archsearch.files import _host_tag
from archsearch.search import storage
from archsearch.search.reading import reading
from archsearch.search.study import IDENTITY, opened

IDENTITIES: dict[str, Any] = {"model": "lenet5", "recipe": {"lr": 0.05, "epochs": 3, "milestones": [0.5]}}


def with_recipe(**changes: Any) -> dict[str, Any]:
    return {**IDENTITIES, "recipe": {**IDENTITIES["recipe"], **changes}}


def test_a_search_that_failed_before_its_first_trial_may_be_given_other_settings(tmp_path: Path) -> None:
    with opened(tmp_path, IDENTITIES):
        pass  # the reference diverges
    with opened(tmp_path, with_recipe(lr=0.01)) as study:
        assert study.user_attrs[IDENTITY]["recipe"]["lr"] == 0.01
        study.ask()
    with pytest.raises(IntegrityError, match="another search"), opened(tmp_path, IDENTITIES):
        pass


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (with_recipe(lr=0.01), r"another search: recipe\.lr was 0\.05 and now is 0\.01; give another --out"),
        (with_recipe(milestones=[0.75]), r"recipe\.milestones was \[0\.5\] and now is \[0\.75\]"),
        ({"model": "lenet5"}, r"recipe was \{'lr'.* and now is None"),
        ({**IDENTITIES, "ties": [["a", "b"]]}, r"ties was None and now is \[\['a', 'b'\]\]"),
    ],
)
def test_what_makes_it_another_search_is_told_and_nothing_else(
    tmp_path: Path, now: dict[str, Any], message: str
) -> None:
    with opened(tmp_path, IDENTITIES) as study:
        study.ask()
    with pytest.raises(IntegrityError, match=message) as caught, opened(tmp_path, now):
        pass
    assert "epochs" not in str(caught.value) or "recipe was" in str(caught.value)


def test_a_damaged_file_is_told_by_its_name_to_who_searches_and_who_looks(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("no database")
    with pytest.raises(
        StorageError, match=r"study\.db: cannot be opened as a study \(file is not a database"
    ):
        storage.storage(tmp_path, None, print).__enter__()
    with (
        pytest.raises(StorageError, match=r"study\.db: cannot be read as a study \(file is not"),
        reading(tmp_path),
    ):
        pass


def test_a_driver_waits_as_long_for_who_reads_as_they_for_it(tmp_path: Path) -> None:
    with storage.storage(tmp_path, None, print) as place, place.engine.connect() as connection:
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 1000 * storage.WAIT_S


def test_what_a_killed_driver_was_writing_is_swept(tmp_path: Path) -> None:
    left = tmp_path / f".archsearch-{_host_tag()}-4194305-{'0' * 16}.tmp"  # a process that cannot be
    left.touch()
    with opened(tmp_path, IDENTITIES):
        assert not left.exists()
