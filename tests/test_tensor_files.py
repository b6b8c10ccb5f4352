from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from archsearch.errors import IntegrityError, ResourceError
from archsearch.tensor_files import MAX_TENSORS, check_tensors, read_tensors, read_weights, write_tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def small() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.running_mean": torch.randn(4, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a
    )


# --------------------------------------------------------------------------------------------- our own


@given(
    shapes=st.dictionaries(
        st.text("abc.01é", min_size=1, max_size=8),
        st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)),
        max_size=4,
    )
)
def test_tensors_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "x.safetensors"
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    digest = write_tensors(path, tensors)
    assert same(read_tensors(path, digest), tensors)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert same(load_file(path), tensors)


def test_views_shared_memory_parameters_and_other_layouts_are_stored_in_full(tmp_path: Path) -> None:
    base = torch.arange(48.0).reshape(2, 3, 2, 4)
    parameter = nn.Parameter(torch.ones(3))
    tensors = {
        "all": base,
        "again": base,
        "transposed": base.transpose(1, 3),
        "slice": base[:, 1:],
        "last": base.to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "parameter": parameter,
    }
    digest = write_tensors(tmp_path / "x", tensors, metadata={"format": "pt"})
    read = read_tensors(tmp_path / "x", digest)
    assert all(read[name].equal(tensor) for name, tensor in tensors.items())
    read["all"].zero_()  # what was read is writable and its own
    assert read["again"].equal(base)
    assert base.sum() == 47 * 24
    assert parameter.requires_grad


def test_equal_tensors_are_equal_bytes(tmp_path: Path) -> None:
    assert write_tensors(tmp_path / "a", small()) == write_tensors(tmp_path / "b", small())


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(3, device="meta"), torch.eye(3).to_sparse(), [1.0, 2.0]],
    ids=["meta", "sparse", "list"],
)
def test_what_has_no_dense_values_is_not_written(tmp_path: Path, tensor: Any) -> None:
    with pytest.raises(IntegrityError, match="'x' "):
        write_tensors(tmp_path / "x", {"x": tensor})
    assert not (tmp_path / "x").exists()


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "x"
    digest = write_tensors(path, small())
    good = path.read_bytes()
    positions = random.Random(0).sample(range(8 * len(good)), 1500)
    for position in positions:
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(IntegrityError):
            read_tensors(path, digest)
    path.write_bytes(good)
    assert same(read_tensors(path, digest), small())


def test_every_truncation_is_detected_even_without_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, small())
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(IntegrityError):
            read_tensors(path)


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
HOSTILE = {
    "empty": b"",
    "zeros": b"\0" * 1000,
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header past the end": struct.pack("<Q", 100) + b"{}",
    "no JSON": with_header(b"x" * 20),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "a list": with_header([1]),
    "deep JSON": with_header(b"[" * 100_000),
    "a name twice": with_header(f'{{"a": {json.dumps(F32)}, "a": {json.dumps(F32)}}}'.encode(), b"\0" * 4),
    "unknown dtype": with_header({"a": {**F32, "dtype": "F33"}}, b"\0" * 4),
    "past the end": with_header({"a": {**F32, "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 4),
    "overlap": with_header({"a": F32, "b": F32}, b"\0" * 4),
    "hole": with_header({"a": {**F32, "data_offsets": [4, 8]}}, b"\0" * 8),
    "negative": with_header({"a": {**F32, "shape": [-1]}}, b"\0" * 4),
    "too large a shape": with_header({"a": {**F32, "shape": [2**40]}}, b"\0" * 4),
    "overflow": with_header({"a": {**F32, "shape": [2**62, 2**62]}}, b"\0" * 4),
    "trailing bytes": with_header({"a": F32}, b"\0" * 8),
    "a million empty tensors": with_header(
        b"{" + b",".join(b'"%d":%s' % (i, json.dumps(EMPTY).encode()) for i in range(10**6)) + b"}"
    ),
    "one tensor too many": with_header({f"{i}": EMPTY for i in range(MAX_TENSORS + 2)}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_one_line_and_two_seconds(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[case])
    start = time.process_time()
    with pytest.raises(IntegrityError) as caught:
        read_tensors(path)
    assert time.process_time() - start < 2
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


def test_files_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(IntegrityError):
            read_tensors(path)


def test_a_file_larger_than_the_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**42)
        with pytest.raises(ResourceError, match="bytes of memory"):
            read_weights(tmp_path / name)


@pytest.mark.slow
def test_as_many_tensors_as_allowed_are_written_and_read(tmp_path: Path) -> None:
    tensors = {f"layer{i}.0.downsample.1.running_mean.exp_avg": torch.zeros(1) for i in range(MAX_TENSORS)}
    assert len(read_tensors(tmp_path / "x", write_tensors(tmp_path / "x", tensors))) == MAX_TENSORS
    with pytest.raises(IntegrityError, match="at most"):
        write_tensors(tmp_path / "y", {**tensors, "one more": torch.zeros(1)})


# ------------------------------------------------------------------------------------- what fits a model


def test_tensors_of_the_model_itself_fit() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    check_tensors(model.state_dict(), model.state_dict(), "w")
    check_tensors(model.state_dict(), {name: t.to("meta") for name, t in model.state_dict().items()}, "w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, "w: does not fit the model: 1 missing (a)"),
        ({"d": torch.zeros(1)}, "w: does not fit the model: 1 unknown (d)"),
        ({"a": torch.zeros(4, 2)}, "w: does not fit the model: 1 of another shape (a (4, 2), not (2, 2))"),
        ({"a": torch.zeros(2, 2).half()}, "1 of another dtype (a torch.float16, not torch.float32)"),
        ({"a": torch.full((2, 2), float("nan"))}, "w: has values that are not finite: 1 tensors (a)"),
        ({"a": torch.full((2, 2), float("inf"))}, "not finite"),
        (dict.fromkeys("abc"), "3 missing (a, b, c)"),
        ({letter: torch.zeros(1) for letter in "zyxw"}, "4 unknown (z, y, x, …)"),
        ({"a": None, "x\ny": torch.zeros(1)}, "1 missing (a); 1 unknown ('x\\ny')"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Tensor | None], message: str) -> None:
    expected = {"a": torch.zeros(2, 2), "b": torch.zeros(3), "c": torch.tensor(1)}
    tensors = {name: tensor for name, tensor in {**expected, **change}.items() if tensor is not None}
    with pytest.raises(IntegrityError) as caught:
        check_tensors(tensors, expected, "w")
    assert message in str(caught.value)


# ----------------------------------------------------------------------------------------- foreign files


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("under", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_of_any_habit_are_read(
    tmp_path: Path, suffix: str, under: str | None, prefix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    weights: Any = {prefix + name: tensor for name, tensor in small().items()}
    torch.save({under: weights, "epoch": 3} if under else weights, path)
    assert same(read_weights(path), small())


def test_weights_in_safetensors_lose_the_prefix_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", {f"module.{name}": tensor for name, tensor in small().items()})
    assert same(read_weights(tmp_path / "w.safetensors"), small())


def test_a_prefix_that_only_some_have_stays(tmp_path: Path) -> None:
    weights = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    write_tensors(tmp_path / "w.safetensors", weights)
    assert read_weights(tmp_path / "w.safetensors").keys() == weights.keys()


def test_a_models_own_state_dict_with_tied_and_reordered_weights_is_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)).to(memory_format=torch.channels_last)
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "w.pt")
    weights = read_weights(tmp_path / "w.pt")
    assert same(weights, dict(model.state_dict()))
    assert not any(tensor.requires_grad for tensor in weights.values())


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_pickles_that_run_code_are_refused_and_run_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    payload = Payload(witness)
    torch.save(payload, tmp_path / "alone.pt")
    torch.save({"state_dict": small(), "extra": payload}, tmp_path / "beside.pt")
    torch.save(payload, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(payload))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("alone.pt", "beside.pt", "legacy.pt", "bare.bin", "module.pth"):
        with pytest.raises(IntegrityError) as caught:
            read_weights(tmp_path / name)
        assert str(caught.value).isprintable()
    assert not witness.exists()
    torch.load(tmp_path / "alone.pt", weights_only=False)
    assert witness.exists()  # so the payload would have worked


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """262 KB on the disk that become 256 MiB of memory."""
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in stored.infolist():
            bomb.writestr(member.filename, stored.read(member))
    assert torch.load(tmp_path / "bomb.pt", weights_only=True)["w"].numel() == 2**20
    with pytest.raises(IntegrityError, match="is compressed"):
        read_weights(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"w": torch.ones(1).expand(2**20, 2**20)}, "'w' claims to be larger than the file"),
        ({"w": torch.empty(3, device="meta")}, "'w' has no dense values"),
        ({"w": torch.eye(3).to_sparse()}, "'w' has no dense values"),
        ({"w": 3}, "'w' is int, not a tensor"),
        ({"w": {"v": torch.ones(1)}}, "'w' is dict, not a tensor"),
        ({3: torch.ones(1)}, "3 is not a name of a tensor"),
        ({}, "holds dict, not a state dict"),
        ([torch.ones(1)], "holds list, not a state dict"),
        (torch.ones(1), "holds Tensor, not a state dict"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")  # torch's, of the sparse one
def test_what_is_no_state_dict_of_dense_tensors_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(IntegrityError) as caught:
        read_weights(tmp_path / "w.pt")
    assert reason in str(caught.value)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/constants.pkl", pickle.dumps(()))
        archive.writestr("w/data.pkl", pickle.dumps({}))
    with pytest.raises(IntegrityError):
        read_weights(tmp_path / "w.pt")


def test_damaged_foreign_files_make_no_other_exception(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(small(), path)
    good = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad[: rng.randint(len(bad) // 2, len(bad))] if rng.random() < 0.3 else bad)
        try:
            read_weights(path)
        except IntegrityError as error:
            assert str(error).isprintable()


def test_another_suffix_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"weights must be \.safetensors, or \.pt, \.pth, \.bin"):
        read_weights(tmp_path / "w.h5")
