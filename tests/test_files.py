from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import scalars

from archsearch import files
from archsearch.errors import ArchsearchError, IntegrityError, ResourceError, SpecError, StorageError

OLD, NEW = b"old content\n" * 100, b"the new content\n" * 5000


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "architecture.yaml"
    path.write_bytes(OLD)
    return path


# ---------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM]
)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "replace"])
@pytest.mark.parametrize("nth", [1, 2])
def test_an_error_at_any_system_call_leaves_old_or_new_and_no_temporary_file(
    target: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int, code: int
) -> None:
    real, calls = getattr(os, call), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            if call == "close":
                real(*args)
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    reached = True
    try:
        files.write_bytes(target, NEW)
    except ResourceError as error:
        assert str(error).startswith(f"{target}: cannot write {len(NEW)} bytes: {os.strerror(code)}")
    else:
        reached = False
    monkeypatch.undo()
    assert target.read_bytes() in (OLD, NEW)
    assert names_in(target.parent) == [target.name]
    assert reached == (calls >= nth)
    if nth == 1 and call in ("open", "write", "fsync", "replace"):
        assert target.read_bytes() == OLD


def test_short_writes_are_continued(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:777])))
    files.write_bytes(target, NEW)
    assert target.read_bytes() == NEW


def test_an_interrupt_leaves_the_old_content_and_no_temporary_file(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(target, NEW)
    assert target.read_bytes() == OLD
    assert names_in(target.parent) == [target.name]


KILLED = """
    import os, signal, sys
    from archsearch import files

    path, step, calls = sys.argv[1], int(sys.argv[2]), 0

    def deadly(real):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls == step:
                if real is write:
                    write(args[0], bytes(args[1][:1000]))  # torn in the middle
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call

    write = os.write
    for name in ("open", "write", "fsync", "close", "replace"):
        setattr(os, name, deadly(getattr(os, name)))
    files.write_bytes(path, b"the new content\\n" * 5000)
"""


def test_a_kill_before_any_system_call_leaves_old_or_new_and_the_rest_is_swept(target: Path) -> None:
    outcomes = []
    for step in range(1, 12):
        target.write_bytes(OLD)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(target), str(step)],
            env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])},
            check=False,
        )
        outcomes.append((done.returncode, target.read_bytes() == NEW))
        assert target.read_bytes() in (OLD, NEW)
        left = [name for name in names_in(target.parent) if name != target.name]
        assert [path.name for path in files.sweep(target.parent)] == left
        assert names_in(target.parent) == [target.name]
        if done.returncode == 0:
            break
    assert outcomes[-1] == (0, True)
    assert [code for code, _ in outcomes[:-1]] == [-9] * 8
    assert [new for _, new in outcomes] == sorted(new for _, new in outcomes)


def test_the_order_is_write_then_sync_then_rename_then_sync_of_the_directory(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            of_directory = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            order.append(f"{name} directory" if of_directory else name)
            return real(*args, **kwargs)

        return call

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    files.write_bytes(target, NEW)
    assert order == ["write", "fsync", "replace", "fsync directory"]


def test_sweep_spares_live_processes_other_machines_and_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = files._host_tag()
    stale = f".archsearch-{here}-{dead.pid}-{'0' * 16}.tmp"
    spared = [
        f".archsearch-{here}-{os.getppid()}-{'0' * 16}.tmp",
        f".archsearch-{here}-1-{'0' * 16}.tmp",
        f".archsearch-{'f' * 8}-{dead.pid}-{'0' * 16}.tmp",
        f".archsearch-{here}-{dead.pid}-0.tmp",
        "notes.tmp",
    ]
    own = f".archsearch-{here}-{os.getpid()}-{'1' * 16}.tmp"
    for name in (stale, own, *spared):
        (tmp_path / name).touch()
    monkeypatch.setattr(files, "_unfinished", {own})
    assert [path.name for path in files.sweep(tmp_path)] == [stale]
    assert names_in(tmp_path) == sorted([own, *spared])
    monkeypatch.setattr(files, "_unfinished", set())  # as after a restart with the same process number
    assert [path.name for path in files.sweep(tmp_path)] == [own]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(OLD)
    (tmp_path / "link").symlink_to("precious")
    files.write_bytes(tmp_path / "link", NEW)
    assert (tmp_path / "precious").read_bytes() == OLD
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("write", [files.write_text, files.append_line])
def test_what_cannot_be_written_says_where_and_how_much(
    tmp_path: Path, write: Callable[[Any, str], None]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(OLD)
    wanted = {
        tmp_path / "fifo": "a FIFO stands in its place",
        tmp_path: "a directory stands in its place",
        tmp_path / "none" / "x": "No such file or directory: create the directory first",
        tmp_path / "file" / "x": "Not a directory",
        tmp_path / ("x" * 300): "File name too long",
        Path("/dev/null"): "a device or socket stands in its place",
        str(tmp_path / "a\0b"): "null",
    }
    for path, reason in wanted.items():
        with pytest.raises(ResourceError) as caught:
            write(path, "data")
        assert reason in str(caught.value)
        assert " bytes: " in str(caught.value)
        assert str(caught.value).isprintable()
    assert names_in(tmp_path) == ["fifo", "file"]
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_bytes(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


texts = st.text(max_size=5)
json_values = st.recursive(
    scalars(),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(texts, part, max_size=3),
    max_leaves=8,
)


@given(data=json_values)
def test_json_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate is no text
        return
    path = tmp_path_factory.getbasetemp() / "data.json"
    files.write_json(path, data)
    assert repr(normal(files.read_json(path))) == repr(normal(data))


def normal(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: normal(value[key]) for key in sorted(value)}
    return [normal(part) for part in value] if isinstance(value, list) else value


def test_equal_data_are_equal_bytes_of_json(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a", {"b": 1, "a": [1.5, "é"]})
    files.write_json(tmp_path / "b", {"a": [1.5, "é"], "b": 1})
    expected = '{\n  "a": [\n    1.5,\n    "é"\n  ],\n  "b": 1\n}\n'
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == expected.encode()


@pytest.mark.parametrize("data", [float("nan"), object(), {"a": {1, 2}}, "\ud800", {1: 2, "a": 3}])
def test_what_is_not_json_is_not_written(target: Path, data: object) -> None:
    with pytest.raises(SpecError, match=r"architecture\.yaml: cannot be written as JSON"):
        files.write_json(target, data)
    assert target.read_bytes() == OLD


def test_yaml_reads_back_with_lines(tmp_path: Path) -> None:
    files.write_yaml(tmp_path / "x.yaml", {"b": 1, "a": {"c": {"d": [1, 2]}}})
    assert (tmp_path / "x.yaml").read_bytes() == b"b: 1\na:\n  c:\n    d: [1, 2]\n"
    document = files.read_yaml(tmp_path / "x.yaml")
    assert document.data == {"b": 1, "a": {"c": {"d": [1, 2]}}}
    assert str(document.error(("a", "c"), "is odd")) == f"{tmp_path / 'x.yaml'}:3: a.c: is odd"


def test_yaml_that_could_not_be_read_is_not_written(target: Path) -> None:
    for data in ({"a": float("nan")}, {"a": "x" * 5000}, {"a": list(range(50_000))}):
        with pytest.raises(SpecError, match=r"architecture\.yaml: "):
            files.write_yaml(target, data)
    assert target.read_bytes() == OLD


def test_lines_are_appended_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, syncs = tmp_path / "log.jsonl", os.fsync, 0

    def counted(descriptor: int) -> None:
        nonlocal syncs
        syncs += 1
        real(descriptor)

    monkeypatch.setattr(os, "fsync", counted)
    files.append_line(path, '{"step": 1}')
    files.append_line(path, "é")
    assert path.read_text(encoding="utf-8") == '{"step": 1}\né\n'
    assert syncs == 3  # each line, and the directory once


def test_a_torn_last_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    files.append_line(path, '{"step": 2}')
    assert path.read_bytes() == b'{"step": 1}\n{"st\n{"step": 2}\n'


APPENDING = """
    import sys
    from archsearch.files import append_line
    for _ in range(100):
        append_line(sys.argv[1], sys.argv[2] * 500)
"""


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    code = textwrap.dedent(APPENDING)
    env = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    path = tmp_path / "log"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter], env=env) for letter in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted([letter * 500 for letter in "abc"] * 100)


def test_a_full_disk_while_appending_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    with pytest.raises(ResourceError, match="cannot append 6 bytes: No space left"):
        files.append_line(tmp_path / "log", "hello")


def test_a_record_of_two_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="must be one line"):
        files.append_line(tmp_path / "log", "a\nb")
    assert names_in(tmp_path) == []


# ---------------------------------------------------------------------------------------------- reading


def make_fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def make_directory(path: Path) -> Path:
    path.mkdir()
    return path


def make_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


def make_sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    return path


def make_loop(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


def make_latin(path: Path) -> Path:
    path.write_bytes(b"a: 1\nb: caf\xe9\n")
    return path


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "FIFO": (make_fifo, "is a FIFO, not a regular file"),
    "directory": (make_directory, "is a directory, not a regular file"),
    "socket": (make_socket, "cannot be read: No such device or address"),
    "endless device": (lambda _: Path("/dev/zero"), "is a device or socket, not a regular file"),
    "100 MB of nothing": (make_sparse, "has 104857600 bytes: at most 1048576 are read"),
    "link to itself": (make_loop, "cannot be read: Too many levels of symbolic links"),
    "latin-1": (make_latin, ":2: is not UTF-8 text (byte 11)"),
    "missing": (lambda path: path, "cannot be read: No such file or directory"),
    "NUL in the name": (lambda path: path.with_name("a\0b"), "cannot be read: embedded null byte"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("read", [files.read_yaml, lambda path: files.read_text(path, 2**20)])
def test_what_is_no_small_text_file_gets_one_line_at_once(
    tmp_path: Path, case: str, read: Callable[[Path], object]
) -> None:
    make, reason = UNREADABLE[case]
    path = make(tmp_path / "x")
    start = time.monotonic()
    with pytest.raises(SpecError) as caught:
        read(path)
    assert time.monotonic() - start < 1
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_file_that_has_no_size_but_content_is_capped_too() -> None:
    """As those under /proc are."""
    with pytest.raises(SpecError, match="at most 3 are read"):
        files.read_bytes("/proc/self/status", 3)


def test_the_caller_names_the_kind_of_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        files.read_json(tmp_path / "none.json", IntegrityError)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in (tmp_path, tmp_path / "none", make_fifo(tmp_path / "fifo"), make_latin(tmp_path / "latin")):
        with pytest.raises(SpecError):
            files.read_yaml(path)
    files.write_text(tmp_path / "x", "x")
    files.append_line(tmp_path / "x", "x")
    with files.lock(tmp_path):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', '{"a": NaN}', "[Infinity]", "[" * 100_000, "9" * 5000, "{", "", "\0", '{"a": 1} x'],
)
def test_hostile_json_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


def test_a_byte_order_mark_is_not_content(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert files.read_yaml(tmp_path / "x").data == {"a": 1}


def test_sha256_is_the_published_one(tmp_path: Path) -> None:
    """FIPS 180-4 example of one block, and a million times the letter a."""
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "abc") == expected
    (tmp_path / "a").write_bytes(b"a" * 10**6)
    expected = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    assert files.sha256(tmp_path / "a") == expected


# ------------------------------------------------------------------------------------------ directories


def test_a_second_holder_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    with files.lock(tmp_path):
        with pytest.raises(StorageError) as caught, files.lock(tmp_path):
            pytest.fail("held twice")
        message = str(caught.value)
        assert f"{tmp_path}: in use by process {os.getpid()} on {socket.gethostname()} since 20" in message
    with files.lock(tmp_path):
        pass


HOLDER = """
    import sys, time
    from archsearch.files import lock
    with lock(sys.argv[1]):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_killed_holder_holds_no_more(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(StorageError, match=f"process {holder.pid} on"), files.lock(tmp_path):
        pytest.fail("held twice")
    holder.kill()
    holder.wait()
    with files.lock(tmp_path):
        pass


def test_whether_a_directory_is_held_can_be_seen_without_a_trace(tmp_path: Path) -> None:
    assert not files.is_held(tmp_path)
    assert not list(tmp_path.iterdir())
    with files.lock(tmp_path):
        held = (tmp_path / files.LOCK_NAME).stat()
        assert files.is_held(tmp_path)
        assert (tmp_path / files.LOCK_NAME).stat().st_mtime_ns == held.st_mtime_ns
    assert not files.is_held(tmp_path)


def test_who_looks_whether_a_directory_is_held_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / files.LOCK_NAME).touch()
    looking = os.open(tmp_path / files.LOCK_NAME, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("time.sleep", lambda seconds: os.close(looking))
    with files.lock(tmp_path):
        assert files.is_held(tmp_path)


def test_the_lock_is_free_after_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.lock(tmp_path):
        raise ZeroDivisionError
    with files.lock(tmp_path):
        pass


def test_a_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(OLD)
    (tmp_path / files.LOCK_NAME).symlink_to("precious")
    with pytest.raises(ResourceError, match="cannot be locked"), files.lock(tmp_path):
        pytest.fail("locked through a link")
    assert (tmp_path / "precious").read_bytes() == OLD


def test_probe_makes_the_directory_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    files.probe(tmp_path / "a" / "b", 1000)
    assert names_in(tmp_path / "a" / "b") == []


def test_probe_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=f"{2**60} bytes are needed and [0-9]+ are free: free some space"):
        files.probe(tmp_path, 2**60)


def test_probe_refuses_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="file: cannot hold the 10 bytes"):
        files.probe(tmp_path / "file", 10)
    with pytest.raises(ResourceError, match="cannot hold the 10 bytes"):
        files.probe("/proc/archsearch", 10)

    def read_only(*args: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ResourceError, match="Read-only file system: choose a directory that can be written"):
        files.probe(tmp_path, 10)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/abs", "a/b", "a\0b", "a\n", "a\nb", "-rf", ".hidden", "x" * 65, "a b", "é",
     "e\u0301", "a\u202eb", "a\\b", "a:b", "~", "$HOME", "%2e%2e/x", "x" * 4096],
)  # fmt: skip
def test_hostile_names_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError) as caught:
        files.child(tmp_path, name, "study")
    assert str(caught.value).startswith("study ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def test_good_names_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("a", "resnet56-flops0.5", "5402ab5dde785f30", "A_1.yaml", "x" * 64):
        assert files.safe_name(name) == name
        assert files.child(tmp_path, name) == tmp_path / name


def test_a_link_may_not_lead_out_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "inside").mkdir()
    (tmp_path / "runs" / "out").symlink_to(tmp_path)
    (tmp_path / "runs" / "in").symlink_to("inside")
    with pytest.raises(SpecError, match="leads out of"):
        files.child(tmp_path / "runs", "out")
    assert files.child(tmp_path / "runs", "in") == tmp_path / "runs" / "in"


def test_every_error_here_is_one_of_ours(tmp_path: Path) -> None:
    for act in (
        lambda: files.sweep(tmp_path / "none"),
        lambda: files.sha256(tmp_path),
        lambda: files.probe("a\0b", 1),
        lambda: files.lock("a\0b").__enter__(),
        lambda: files.lock(tmp_path / "none").__enter__(),
    ):
        with pytest.raises(ArchsearchError):
            act()
