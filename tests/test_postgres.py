from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import optuna
import pytest
from engine_case import until
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState
from postgres_case import PASSWORD, QUOTED, Server, free_port, running_server
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import OperationalError

from archsearch.errors import PreemptedError, StorageError, UsageError
from archsearch.search import storage as storages
from archsearch.search.claims import DRIVER, Alone, Shared, claims, driver_name, shared_study, tell
from archsearch.search.dashboard import serving
from archsearch.search.reading import reading
from archsearch.search.storage import Patient, address, named, storage, study_name
from archsearch.training.signals import StopRequest

pytest.importorskip("psycopg", reason="the extra 'postgresql' is not installed")


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(storages, "RETRY_S", 0.1)
    monkeypatch.setenv(storages.VARIABLE, running.url)
    if not running.is_up():
        running.start()
    return running


class Driver:
    """One driver of a study as far as the study sees it."""

    def __init__(self, stack: ExitStack, name: str, study: str, *, grace_s: float = 60.0) -> None:
        self.said: list[str] = []
        self.storage = stack.enter_context(storage(Path(), address(None), self.said.append))
        assert isinstance(self.storage, Patient)
        self.study = optuna.create_study(study_name=study, storage=self.storage, load_if_exists=True)
        self.claims = Shared(self.study, self.storage, name, beat_s=0.1, grace_s=grace_s)

    def trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# ------------------------------------------------------------------------------------------- addresses


def test_without_an_address_the_study_is_a_file_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(storages.VARIABLE, raising=False)
    assert address(None) is None
    with storage(tmp_path, None, print) as place:
        study = optuna.create_study(storage=place)
        with claims(study, place, tmp_path) as own:
            assert isinstance(own, Alone)
    assert (tmp_path / "study.db").exists()


def test_the_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storages.VARIABLE, "postgresql://a:secret@one/first")
    url, other = address(None), address("postgresql://b@two:5433/second")
    assert url is not None
    assert other is not None
    assert (url.password, named(url)) == ("secret", "postgresql://one/first")
    assert named(other) == "postgresql://two:5433/second"


@pytest.mark.parametrize(
    "option",
    [
        "postgresql://a:secret@h/d",
        "postgresql://a@h/d?password=secret",
        "postgresql://a@h/d?sslkey=k&sslpassword=secret",
    ],
)
def test_a_password_in_the_option_is_refused_without_repeating_it(option: str) -> None:
    with pytest.raises(UsageError, match=r"list of processes.*\$PGPASSWORD") as caught:
        address(option)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "broken",
    ["postgresql://a:sec/ret@h:x/d", "sec ret", "postgresql://a:s@ecret:99999x/d", "mysql://a:sec@h/d"],
)
def test_what_is_no_address_of_a_postgresql_is_refused_without_repeating_it(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(storages.VARIABLE, broken)
    with pytest.raises(UsageError, match=r"\$ARCHSEARCH_STORAGE") as caught:
        address(None)
    assert "sec" not in str(caught.value).replace("several", "")
    assert caught.value.__cause__ is None


def test_a_server_that_is_not_there_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv(storages.VARIABLE, f"postgresql://searcher:{QUOTED}@127.0.0.1:{port}/studies")
    with (
        pytest.raises(StorageError, match=f"127.0.0.1:{port}/studies: cannot be opened") as caught,
        storage(tmp_path, address(None), print),
    ):
        pass
    assert PASSWORD not in str(caught.value)
    assert QUOTED not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_wrong_password_is_neither_repeated_nor_tried_for_ever(server: Server, tmp_path: Path) -> None:
    wrong = address(None)
    assert wrong is not None
    with pytest.raises(StorageError, match="password authentication failed") as caught:
        storage(tmp_path, wrong.set(password="hunter2"), print).__enter__()
    assert "hunter2" not in str(caught.value)


def test_the_password_may_come_from_the_environment_of_the_client(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    with storage(tmp_path, address(server.public_url), print) as place:
        assert place.get_all_studies() is not None


def test_studies_are_told_apart_by_what_decides_their_values() -> None:
    url = address("postgresql://h/d")
    names = {study_name(url, {"model": "resnet20", "seed": seed}) for seed in (0, 1)}
    assert len(names) == 2
    assert all(name.startswith("resnet20 ") for name in names)
    assert study_name(url, {"a": 1, "model": "m"}) == study_name(url, {"model": "m", "a": 1})
    assert study_name(None, {"model": "m"}) == "search"


def test_all_that_optunas_cache_asks_of_a_storage_waits_for_the_server() -> None:
    source = inspect.getsource(_CachedStorage)
    asked = {name for name in vars(RDBStorage) if f"_backend.{name}(" in source}
    heartbeat = {name for name in asked if "heartbeat" in name or "stale" in name}  # never switched on
    assert len(asked - heartbeat) > 15
    assert asked - heartbeat <= {*storages.TRANSACTIONS, "remove_session"}


# --------------------------------------------------------------------------------------------- claims


def test_two_drivers_ask_for_exactly_the_trials_that_there_is_room_for(
    server: Server, stack: ExitStack
) -> None:
    drivers = [Driver(stack, name, "room") for name in ("one", "two")]
    asked: list[list[int]] = [[], []]

    def ask(which: int) -> None:
        driver = drivers[which]
        while (trial := driver.claims.ask(lambda: len(driver.trials()) < 15)) is not None:
            asked[which].append(trial.number)

    threads = [threading.Thread(target=ask, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked[0] + asked[1]) == list(range(15))
    for which, driver in enumerate(drivers):
        mine = [trial.number for trial in driver.trials() if driver.claims.mine(trial)]
        assert mine == sorted(asked[which])


def test_trials_of_a_dead_driver_are_taken_over_and_those_of_a_living_one_are_not(
    server: Server, stack: ExitStack
) -> None:
    dead, living, heir = (Driver(stack, name, "heirs", grace_s=2.0) for name in ("dead", "living", "heir"))
    lost = dead.claims.ask(lambda: True)
    kept = living.claims.ask(lambda: True)
    heir.study.enqueue_trial({}, user_attrs={"origin": "uniform"})
    unclaimed, unknown = heir.study.ask(), heir.study.ask()  # drivers died while they asked
    assert lost is not None
    assert kept is not None
    taken: set[int] = set()
    with living.claims, heir.claims:
        until(lambda: taken.update(t.number for t in heir.claims.left()) or len(taken) == 2, "the heir")
        time.sleep(2.5)
        assert not heir.claims.left()
        assert not living.claims.left(), "what was taken over has a living driver again"
    assert taken == {lost.number, unclaimed.number}
    assert [t.number for t in living.trials(TrialState.FAIL)] == [unknown.number]
    owners = {trial.number: trial.user_attrs[DRIVER] for trial in living.trials(TrialState.RUNNING)}
    assert owners == {lost.number: "heir", kept.number: "living", unclaimed.number: "heir"}


def test_only_one_of_two_heirs_takes_a_trial_over(server: Server, stack: ExitStack) -> None:
    dead, *heirs = (Driver(stack, name, "two heirs", grace_s=0.5) for name in ("dead", "first", "second"))
    for _ in range(4):
        dead.claims.ask(lambda: True)
    taken: list[int] = []

    def inherit(heir: Driver) -> None:
        end_s = time.monotonic() + 60.0
        # No longer than that: on a busy machine an heir that misses a beat would be inherited from, too.
        while len(taken) < 4 and time.monotonic() < end_s:
            taken.extend(trial.number for trial in heir.claims.left())

    with heirs[0].claims, heirs[1].claims:
        threads = [threading.Thread(target=inherit, args=(heir,)) for heir in heirs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(taken) == [0, 1, 2, 3]


def test_an_end_that_is_told_twice_or_by_two_drivers_counts_once(server: Server, stack: ExitStack) -> None:
    one, two = (Driver(stack, name, "twice") for name in ("one", "two"))
    trial = one.claims.ask(lambda: True)
    assert trial is not None
    tell(two.study, trial.number, 0.5)
    tell(one.study, trial.number, 0.5)
    tell(one.study, trial.number, state=TrialState.FAIL)
    assert [(t.state, t.value) for t in one.trials()] == [(TrialState.COMPLETE, 0.5)]


def test_a_driver_keeps_its_name_with_its_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    name = driver_name(tmp_path / "a", "study")
    assert driver_name(tmp_path / "a", "study") == name != driver_name(tmp_path / "b", "study")
    assert shared_study(tmp_path / "a") == "study"
    assert shared_study(tmp_path) is None
    (tmp_path / "a" / "driver.json").write_text("[]")
    with pytest.raises(StorageError, match=r"driver\.json: does not name the driver"):
        driver_name(tmp_path / "a", "study")


def test_a_run_of_a_shared_study_can_be_looked_at_and_not_written(
    server: Server, stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("another study", "looked at"):
        Driver(stack, "driver", name)
    driver_name(tmp_path, "looked at")
    with reading(tmp_path) as study:
        assert (study.study_name, len(study.trials)) == ("looked at", 0)
        with pytest.raises(StorageInternalError) as caught:
            study.ask()
        assert "read-only transaction" in str(caught.value.__cause__)
    monkeypatch.delenv(storages.VARIABLE)
    with pytest.raises(UsageError, match=r"shared.*set \$ARCHSEARCH_STORAGE"), reading(tmp_path):
        pass


def test_a_dashboard_shows_a_shared_study(server: Server, stack: ExitStack, tmp_path: Path) -> None:
    Driver(stack, "driver", "shown")
    driver_name(tmp_path, "shown")
    with serving(tmp_path, port=0) as dashboard:
        thread = threading.Thread(target=dashboard.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        address = f"http://127.0.0.1:{dashboard.server_port}/api/studies"
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                studies = json.load(answer)["study_summaries"]
        finally:
            dashboard.shutdown()
            thread.join()
    assert "shown" in [study["study_name"] for study in studies]


def test_a_dashboard_of_all_run_directories_has_the_artifacts_of_all_drivers(
    server: Server, stack: ExitStack, tmp_path: Path
) -> None:
    runs, kept = [tmp_path / "first", tmp_path / "second"], dict[str, bytes]()
    for run in runs:
        driver = Driver(stack, run.name, "told together")
        trial = driver.study.ask()
        (run / "artifacts").mkdir(parents=True)
        driver_name(run, "told together")
        file = run / "architecture.yaml"
        file.write_text(f"made by {run.name}", encoding="utf-8")
        store = FileSystemArtifactStore(run / "artifacts")
        artifact = upload_artifact(
            artifact_store=store, file_path=str(file), study_or_trial=trial, storage=driver.storage
        )
        kept[f"/artifacts/{driver.study._study_id}/{trial._trial_id}/{artifact}"] = file.read_bytes()
    with serving(runs[1], beside=runs[:1], port=0) as dashboard:
        thread = threading.Thread(target=dashboard.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            for path, content in kept.items():
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{dashboard.server_port}{path}", timeout=60
                ) as a:
                    assert a.read() == content
        finally:
            dashboard.shutdown()
            thread.join()


# ------------------------------------------------------------------------------------- a server that stops


def test_what_is_asked_of_a_stopped_server_is_done_when_it_is_back(server: Server, stack: ExitStack) -> None:
    driver = Driver(stack, "patient", "stopped")
    first = driver.claims.ask(lambda: True)
    assert first is not None
    server.stop("immediate")
    done = threading.Thread(target=lambda: tell(driver.study, first.number, 0.25))
    done.start()
    until(lambda: driver.said, "the line that says that the server is away")
    time.sleep(0.5)
    assert done.is_alive()
    server.start()
    done.join(30)
    second = driver.claims.ask(lambda: True)
    assert second is not None
    assert [trial.value for trial in driver.trials(TrialState.COMPLETE)] == [0.25]
    assert [("connection lost" in line, "is back" in line) for line in driver.said] == [(1, 0), (0, 1)]
    assert PASSWORD not in "".join(driver.said)


@pytest.mark.parametrize(
    ("signum", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, PreemptedError)]
)
def test_one_signal_ends_the_wait_for_a_server(
    server: Server, stack: ExitStack, signum: signal.Signals, kind: type[BaseException]
) -> None:
    driver = Driver(stack, "leaves", f"signal {signum}")
    trial = driver.claims.ask(lambda: True)
    assert trial is not None
    server.stop("immediate")

    def send() -> None:
        until(lambda: driver.said, "the line that says that the server is away")
        os.kill(os.getpid(), signum)

    sender = threading.Thread(target=send)
    with pytest.raises(kind), StopRequest():
        sender.start()
        tell(driver.study, trial.number, 0.25)
    sender.join()
    server.start()
    assert [t.state for t in driver.trials()] == [TrialState.RUNNING], "it is there for the same command"


def test_a_driver_whose_server_is_away_ends_with_its_beats(server: Server, stack: ExitStack) -> None:
    driver = Driver(stack, "ends", "beats end")
    with driver.claims:
        server.stop("immediate")
        until(lambda: driver.said, "a beat that finds no server")
        assert driver.claims._thread.is_alive()
    assert not driver.claims._thread.is_alive()


def test_a_server_that_was_away_costs_no_living_driver_its_trials(server: Server, stack: ExitStack) -> None:
    living, watcher = (Driver(stack, name, "away", grace_s=1.0) for name in ("living", "watcher"))
    trial = living.claims.ask(lambda: True)
    with living.claims, watcher.claims:
        assert not watcher.claims.left()
        server.stop()
        time.sleep(1.5)
        server.start()
        end_s = time.monotonic() + 2.0
        while time.monotonic() < end_s:
            assert not watcher.claims.left()
            time.sleep(0.05)
    assert trial is not None


def test_a_trial_that_was_asked_for_while_the_lock_was_lost_is_given_back(
    server: Server, stack: ExitStack
) -> None:
    driver = Driver(stack, "unlucky", "given back")
    rooms = iter([True, True, False])

    def room() -> bool:
        if not driver.trials():  # the first time
            server.stop("immediate")
            server.start()
        return next(rooms)

    trial = driver.claims.ask(room)
    assert trial is not None
    assert [t.state for t in driver.trials()] == [TrialState.FAIL, TrialState.RUNNING]
    assert trial.number == 1


def test_trials_are_read_though_the_connection_dies_in_the_middle_of_reading(
    server: Server, stack: ExitStack
) -> None:
    driver = Driver(stack, "reader", "middle")
    assert driver.claims.ask(lambda: True) is not None
    engine = driver.storage.engine
    killed = []

    def kill(connection: Connection, _cursor: object, statement: str, *_rest: object) -> None:
        if not killed and "FROM trial_user_attributes" in statement:
            killed.append(connection.connection.driver_connection.info.backend_pid)
            with engine.connect() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": killed[0]})

    event.listen(engine, "before_cursor_execute", kill)
    assert len(driver.trials()) == 1
    assert killed
    assert [("connection lost" in line, "is back" in line) for line in driver.said] == [(1, 0), (0, 1)]


def test_an_error_that_is_no_loss_of_the_server_is_raised(server: Server, stack: ExitStack) -> None:
    driver = Driver(stack, "raises", "raises")
    assert isinstance(driver.storage, Patient)
    with driver.storage.engine.connect() as connection, pytest.raises(Exception, match="no_such_table"):
        driver.storage.patiently(lambda: connection.execute(text("SELECT * FROM no_such_table")))
    assert not driver.said
    assert isinstance(driver.study._storage, _CachedStorage)
    assert storages._is_lost(OperationalError("", {}, Exception("server closed the connection")))


# ------------------------------------------------------------------------------------- two drivers, for real

TRIALS = 8
SEARCH = (
    "search --model lenet5 --data digits --image-size 16 --flops 0.5 --epochs 4 --set lr=0.02 --finals 2 "
    f"--objective short --short 0.5 --trials {TRIALS} --jobs 2 --device cpu"
)


def start_driver(directory: Path, name: str, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "archsearch.cli", *SEARCH.split(), *more]
    with (directory / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--store", str(directory / "store"), "--out", str(directory / name)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )


@pytest.mark.slow
def test_two_drivers_of_two_workers_lose_nothing_when_one_and_the_server_are_killed(
    server: Server, stack: ExitStack, tmp_path: Path
) -> None:
    drivers = {name: start_driver(tmp_path, name) for name in ("one", "two")}
    try:
        until(lambda: all(shared_study(tmp_path / name) for name in drivers), "the study", 300)
        name = shared_study(tmp_path / "one")
        assert name is not None
        assert name == shared_study(tmp_path / "two")
        watcher = Driver(stack, "watcher", name)
        until(lambda: watcher.trials(TrialState.COMPLETE), "the first trial", 300)
        drivers["one"].kill()
        drivers["one"].wait()
        complete = {trial.number: trial.value for trial in watcher.trials(TrialState.COMPLETE)}
        server.stop("immediate")
        time.sleep(1.0)
        server.start()
        drivers["one"] = start_driver(tmp_path, "one")
        for which, driver in drivers.items():
            assert driver.wait(400) == 0, (tmp_path / f"{which}.log").read_text()
    finally:
        for driver in drivers.values():
            driver.kill()
            driver.wait()
    ended = watcher.trials(TrialState.COMPLETE)
    assert len(ended) == TRIALS
    assert not watcher.trials(TrialState.RUNNING, TrialState.WAITING)
    assert complete.items() <= {trial.number: trial.value for trial in ended}.items()
    assert {trial.user_attrs[DRIVER] for trial in ended} <= {
        driver_name(tmp_path / which, name) for which in drivers
    }
    one, two = (json.loads((tmp_path / which / "results.json").read_text()) for which in ("one", "two"))
    assert [arm["accuracies"] for arm in one["arms"]] == [arm["accuracies"] for arm in two["arms"]]
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and _leaks(path)]
    assert not kept, "the password is in files"


@pytest.mark.slow
def test_one_ctrl_c_ends_a_driver_whose_server_is_away(server: Server, tmp_path: Path) -> None:
    log = tmp_path / "only.log"
    driver = start_driver(tmp_path, "only", "--seed", "1")  # a study of its own

    def says(words: bytes) -> bool:
        assert driver.poll() is None, log.read_text()
        return words in log.read_bytes()

    try:
        until(lambda: says(b"trial 1 of"), "the first trial")
        server.stop("immediate")
        until(lambda: says(b"connection lost"), "the line that says so")
        driver.send_signal(signal.SIGINT)
        assert driver.wait(100) == 130, log.read_text()
    finally:
        driver.kill()
        driver.wait()
    assert "stopped; the same command goes on" in log.read_text().splitlines()[-1]


def _leaks(path: Path) -> bool:
    data = path.read_bytes()
    return PASSWORD.encode() in data or QUOTED.encode() in data
