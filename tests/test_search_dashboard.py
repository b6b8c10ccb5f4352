from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna.artifacts.exceptions import ArtifactNotFound
from search_case import FACTS, GROUPS, make_run, running_trial

from archsearch import files
from archsearch.cli import main
from archsearch.errors import ResourceError, StorageError, UsageError
from archsearch.search.artifacts import Folders, annotate, annotate_trial
from archsearch.search.dashboard import Guard, chosen, serving
from archsearch.search.notes import of_study
from archsearch.search.page import write_plots

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# ------------------------------------------------------------------------------------------- the guard


def answer(guard: Guard, method: str = "GET", host: str = "127.0.0.1:8080", **more: str) -> str:
    """Return the status of an answer."""
    told: list[str] = []
    guard(
        {"REQUEST_METHOD": method, "HTTP_HOST": host, "PATH_INFO": "/", **more},
        lambda status, headers, *rest: told.append(status),
    )
    return told[0]


def page(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Access-Control-Allow-Origin", "*"), ("Content-Type", "text/plain")])
    return [b"hello"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8080", "localhost:9", "LOCALHOST", "[::1]:8080"])
def test_a_request_that_names_this_machine_is_answered(host: str) -> None:
    assert answer(Guard(page), host=host) == "200 OK"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example:8080", "", "[::1",
     "127.0.0.1:8080@evil.example", "127.0.0.1:x"],
)  # fmt: skip
def test_a_request_that_names_another_host_is_refused(host: str) -> None:
    assert answer(Guard(page), host=host) == "403 Forbidden"


def test_another_host_can_be_allowed() -> None:
    guard = Guard(page, ["lab.example"])
    assert answer(guard, host="Lab.example:443") == "200 OK"
    assert answer(guard, host="other.example") == "403 Forbidden"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "post"])
def test_only_reading_is_answered_unless_editing_is_allowed(method: str) -> None:
    assert answer(Guard(page), method) == "403 Forbidden"
    assert answer(Guard(page, allow_edit=True), method) == "200 OK"
    assert answer(Guard(page), "HEAD") == "200 OK"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8080", "200 OK"),
        ("https://evil.example", "403 Forbidden"),
        ("http://127.0.0.1:9999", "403 Forbidden"),
        ("null", "403 Forbidden"),
    ],
)
def test_an_edit_that_comes_from_another_page_is_refused(origin: str, status: str) -> None:
    assert answer(Guard(page, allow_edit=True), "DELETE", HTTP_ORIGIN=origin) == status


def test_no_other_page_may_read_what_is_answered() -> None:
    seen: list[tuple[str, str]] = []
    Guard(page)(
        {"REQUEST_METHOD": "GET", "HTTP_HOST": "localhost"},
        lambda status, headers, *rest: seen.extend(headers),
    )
    assert dict(seen) == {"Content-Type": "text/plain", "X-Content-Type-Options": "nosniff"}


# ------------------------------------------------------------------------------------------ the server


class Client:
    """Asks a server that runs in a thread."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: str = ""
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            # What a browser always sends, and the dashboard expects.
            connection.request(method, path, body or None, {"Accept-Encoding": "gzip", **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()

    def json(self, path: str) -> Any:
        status, content = self.ask(path)
        assert status == 200, content
        return json.loads(content)


@contextlib.contextmanager
def served(run: Path, **how: Any) -> Iterator[Client]:
    with serving(run, port=0, **how) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield Client(server.server_port)
        finally:
            server.shutdown()
            thread.join()


def test_a_dashboard_shows_the_study_and_changes_nothing(tmp_path: Path) -> None:
    make_run(tmp_path)
    before = (tmp_path / "study.db").read_bytes()
    with served(tmp_path) as client:
        (study,) = client.json("/api/studies")["study_summaries"]
        assert study["study_name"] == "search"
        detail = client.json("/api/studies/1?after=0")
        assert len(detail["trials"]) == 20
        assert client.ask("/dashboard")[0] == 200
        assert client.ask("/api/studies/1", "DELETE") == (
            403,
            b"archsearch dashboard: this dashboard is read-only; --allow-edit changes that\n",
        )
        assert client.ask("/api/studies", headers={"Host": "evil.example"})[0] == 403
    assert (tmp_path / "study.db").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "results.json", "study.db"]


def test_a_search_goes_on_under_a_dashboard_that_shows_what_is_new(tmp_path: Path) -> None:
    study = make_run(tmp_path)
    with files.lock(tmp_path), served(tmp_path) as client:
        assert len(client.json("/api/studies/1?after=0")["trials"]) == 20
        study.tell(running_trial(study, tmp_path), 93.0)
    with served(tmp_path) as client:
        assert len(client.json("/api/studies/1?after=0")["trials"]) == 21


def test_a_run_is_edited_only_where_no_search_holds_it(tmp_path: Path) -> None:
    make_run(tmp_path)
    with files.lock(tmp_path), pytest.raises(StorageError, match="in use by"):
        serving(tmp_path, port=0, allow_edit=True).__enter__()
    note = json.dumps({"body": "seen", "version": 1})
    with served(tmp_path, allow_edit=True) as client:
        json_header = {"Content-Type": "application/json"}
        assert client.ask("/api/studies/1/note", "PUT", json_header, note)[0] == 204
        assert client.json("/api/studies/1?after=0")["note"]["body"] == "seen"
        with pytest.raises(StorageError, match="in use by"), files.lock(tmp_path):
            pass


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    make_run(tmp_path)
    with served(tmp_path) as client, pytest.raises(ResourceError, match="give another --port"):
        serving(tmp_path, port=client.port).__enter__()


def test_a_directory_without_a_search_is_not_served(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", str(tmp_path)]) == 2
    assert "has no search (study.db), and neither has a directory in it" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_newest_search_of_a_directory_is_taken(tmp_path: Path) -> None:
    for age, name in enumerate(("b", "c", "a")):
        (tmp_path / name).mkdir()
        database = tmp_path / name / "study.db"
        database.touch()
        os.utime(database, (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "find").mkdir()
    assert chosen(tmp_path) == (tmp_path / "b", [tmp_path / "c", tmp_path / "a"])
    assert chosen(tmp_path / "a") == (tmp_path / "a", [])


def test_a_run_of_a_shared_study_is_found_and_not_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ARCHSEARCH_STORAGE", raising=False)
    (tmp_path / "shared").mkdir()
    files.write_json(tmp_path / "shared" / "driver.json", {"driver": "one", "study": "a study"})
    assert chosen(tmp_path) == (tmp_path / "shared", [])
    with pytest.raises(UsageError, match=r"its study is shared: set \$ARCHSEARCH_STORAGE"):
        serving(tmp_path / "shared").__enter__()
    with pytest.raises(UsageError, match=r"--allow-edit: the study of .*shared by drivers"):
        serving(tmp_path / "shared", allow_edit=True).__enter__()


def test_run_directories_go_together_only_where_they_share_a_study(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, study in (("first", "one"), ("second", "other")):
        (tmp_path / name).mkdir()
        files.write_json(tmp_path / name / "driver.json", {"driver": name, "study": study})
    make_run(tmp_path / "alone")
    for run, other in (("first", "second"), ("first", "alone"), ("alone", "first"), ("alone", "alone")):
        with pytest.raises(UsageError, match=f"{other}: is no run of the study of .*{run}: several"):
            serving(tmp_path / run, beside=[tmp_path / other], port=0).__enter__()
    assert main(["dashboard", str(tmp_path / "first"), str(tmp_path / "second"), "--port", "0"]) == 2
    assert "second: is no run of the study of" in capfd.readouterr().err.replace("\n", " ")


def test_artifacts_of_several_runs_are_found_in_whichever_has_them(tmp_path: Path) -> None:
    runs = [tmp_path / "first", tmp_path / "not yet there", tmp_path / "second"]
    for run, names in ((runs[0], "ab"), (runs[2], "bc")):
        (run / "artifacts").mkdir(parents=True)
        for name in names:
            (run / "artifacts" / name).write_text(run.name, encoding="utf-8")
    store = Folders(runs)
    found = {}
    for name in "abc":
        with store.open_reader(name) as content:
            found[name] = content.read()
    assert found == {"a": b"first", "b": b"first", "c": b"second"}
    with pytest.raises(ArtifactNotFound):
        store.open_reader("d")
    with pytest.raises(ValueError, match="Invalid artifact_id"):
        store.open_reader("../../second/artifacts/c")


def test_without_optuna_dashboard_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(UsageError, match=r"pip install 'archsearch\[dashboard\]'"):
        serving(tmp_path).__enter__()


# ------------------------------------------------------------------------------- notes and artifacts


def stored(study: optuna.Study) -> dict[str, Any]:
    """Return all that is kept of a study and its trials besides values."""
    storage = study._storage
    trials = {t.number: storage.get_trial_system_attrs(t._trial_id) for t in study.get_trials()}
    return {"study": storage.get_study_system_attrs(study._study_id), "trials": trials}


def test_a_trial_keeps_its_architecture_and_pictures_and_a_second_time_changes_nothing(
    tmp_path: Path,
) -> None:
    study = make_run(tmp_path)
    number = running_trial(study, tmp_path)
    annotate_trial(study, tmp_path, number)
    before = stored(study)
    annotate_trial(study, tmp_path, number)
    assert stored(study) == before
    trial = study.tell(number, 93.0)
    kept = {meta.filename: meta for meta in get_all_artifact_meta(trial, storage=study._storage)}
    assert set(kept) == {"architecture.yaml", "widths.png", "training.png"}
    assert len(list((tmp_path / "artifacts").iterdir())) == 3
    architecture = tmp_path / "artifacts" / kept["architecture.yaml"].artifact_id
    assert "lenet5" in architecture.read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".artifacts-*"))


def test_a_study_names_its_objective_and_says_how_to_read_it(tmp_path: Path) -> None:
    study = make_run(tmp_path)
    annotate(study, tmp_path)
    before = stored(study)
    annotate(study, tmp_path)
    assert stored(study) == before
    assert study.metric_names == ["validation accuracy (short training), %"]
    from optuna_dashboard import get_note

    note = get_note(study)
    assert note == of_study(FACTS)
    for told in (
        "resnet20",
        "digits",
        "flops 0.5",
        "2,000,000",
        "l1_norm",
        "archsearch search",
        "not a result",
    ):
        assert told in note
    assert f"{len(GROUPS)}, {sum(size for _, size in GROUPS)} channels" in note


def test_a_note_says_that_a_latency_is_met_by_prediction_only() -> None:
    plain = of_study(FACTS)
    timed = of_study({**FACTS, "reference": {**FACTS["reference"], "latency_ms": 2.0}})
    assert "all trials" in plain and "measured may miss" not in plain
    assert "the latency *as predicted*" in timed and "what is measured may miss the target" in timed
    assert plain.count("nothing has to be filtered") == timed.count("nothing has to be filtered") == 1


def test_plots_become_artifacts_of_the_study_and_new_ones_take_their_place(tmp_path: Path) -> None:
    study = make_run(tmp_path)
    picture = tmp_path / "history.png"
    for content in (b"first", b"second"):
        picture.write_bytes(content)
        annotate(study, tmp_path, [picture])
    (meta,) = get_all_artifact_meta(study)
    assert meta.filename == "history.png"
    assert (tmp_path / "artifacts" / meta.artifact_id).read_bytes() == b"second"
    with served(tmp_path) as client:
        assert client.ask(f"/artifacts/1/{meta.artifact_id}")[1] == b"second"
        graphs = {each["id"] for each in client.json("/api/studies/1?after=0")["plotly_graph_objects"]}
    assert graphs == {"accuracy", "finals", "widths", "utility", "keeps"}


def test_without_dashboard_and_pictures_a_search_is_annotated_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_run(tmp_path)
    number = running_trial(study, tmp_path)
    monkeypatch.setattr("archsearch.search.artifacts.find_spec", lambda name: None)
    annotate(study, tmp_path)
    annotate_trial(study, tmp_path, number)
    (meta,) = get_all_artifact_meta(study.trials[number], storage=study._storage)
    assert meta.filename == "architecture.yaml"
    assert not [key for key in stored(study)["study"] if "note" in key]


# ---------------------------------------------------------------------------------------- the browser


def browse(address: str, profile: Path) -> tuple[str, list[str]]:
    """Return a page as a browser made it, and what it wrote to its console."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,2600"),
            *("--enable-unsafe-swiftshader", "--enable-logging=stderr", "--virtual-time-budget=60000"),
            *("--disable-background-networking", f"--user-data-dir={profile}", "--dump-dom", address),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    # How fast the machine draws without a GPU is no fault of the page.
    return done.stdout, [line for line in console if "GL Driver Message" not in line]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_study_note_trial_and_artifacts_without_an_error(tmp_path: Path) -> None:
    run, profile = tmp_path / "run", tmp_path / "profile"
    study = make_run(run)
    annotate(study, run)
    number = running_trial(study, run)
    annotate_trial(study, run, number)
    study.tell(number, 93.0)
    plots = write_plots(run)
    annotate(study, run, plots)
    faulty = tmp_path / "faulty.html"
    faulty.write_text("<script>nothing.there()</script>", encoding="utf-8")
    assert browse(faulty.as_uri(), profile)[1]  # an error would be seen
    with served(run) as client:
        home = f"http://127.0.0.1:{client.port}/dashboard/studies/1"
        wanted = {
            home: ["History", "Accuracy against cost", "What each trial keeps", "Best Trial", "keeps.png"],
            f"{home}/note": ["Search: resnet20 on digits", "How to read it", "not a result"],
            f"{home}/trials?numbers={number}": ["architecture.yaml", "widths.png", "990,000, 49.50 % kept"],
        }
        for address, words in wanted.items():
            for _ in range(3):  # on a busy machine a browser may give up waiting for the data
                shown, console = browse(address, profile)
                lacking = [word for word in words if word not in shown]
                if not lacking:
                    break
            assert not lacking, address
            assert console == [], address
    shown, console = browse((run / "plots" / "search.html").as_uri(), profile)
    assert shown.count('class="main-svg"') >= 8
    assert console == []
