from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archsearch.compression.container import MAGIC, Compressed, read_compressed, write_compressed
from archsearch.compression.shared import Shared
from archsearch.errors import IntegrityError


def content(seed: int = 0) -> Compressed:
    generator = torch.Generator().manual_seed(seed)
    weights = {"conv.weight": (6, 3, 3, 3), "fc.weight": (10, 40)}
    shared = {}
    for name, shape in weights.items():
        weight = torch.randn(shape, generator=generator)
        shared[name] = Shared.share(weight, weight.abs() > 1, 5, 4)
    raw = {
        "fc.bias": torch.randn(10, generator=generator),
        "norm.count": torch.tensor(7),
        "half": torch.randn(3, 2, generator=generator).bfloat16(),
        "flags": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 4),
    }
    names = ("conv.weight", "fc.weight", *raw, "tied.weight")
    return Compressed(shared, raw, {"tied.weight": "fc.weight"}, names, "0123456789abcdef")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "weights.dc"
    write_compressed(path, content())
    return path


def sealed(body: bytes) -> bytes:
    """Return a file whose checksum is right, whatever it holds."""
    return body + hashlib.sha256(body).digest()


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the payloads of a file."""
    size = struct.unpack_from("<I", data, 12)[0]
    return json.loads(zlib.decompress(data[16 : 16 + size])), data[16 + size : -32]


def assembled(header: Any, payloads: bytes, version: int = 1) -> bytes:
    text = zlib.compress(json.dumps(header).encode())
    return sealed(MAGIC + struct.pack("<II", version, len(text)) + text + payloads)


def refused(tmp_path: Path, data: bytes, match: str | None = None) -> None:
    (tmp_path / "damaged.dc").write_bytes(data)
    with pytest.raises(IntegrityError, match=match):
        read_compressed(tmp_path / "damaged.dc")


def test_a_file_decodes_to_the_very_weights(path: Path) -> None:
    written, read = content(), read_compressed(path)
    expected, found = written.state_dict(), read.state_dict()
    assert list(found) == list(expected)
    assert read.architecture == written.architecture
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    for name, shared in written.shared.items():
        assert np.array_equal(read.shared[name].codes, shared.codes)
        assert np.array_equal(read.shared[name].places, shared.places)
        assert read.shared[name].stage_bits() == shared.stage_bits()


def test_a_file_is_written_the_same_each_time(path: Path, tmp_path: Path) -> None:
    size = write_compressed(tmp_path / "again.dc", content())
    assert (tmp_path / "again.dc").read_bytes() == path.read_bytes()
    assert size == path.stat().st_size
    write_compressed(tmp_path / "again.dc", read_compressed(path))
    assert (tmp_path / "again.dc").read_bytes() == path.read_bytes()


@given(st.integers(1, 900), st.floats(0.01, 1), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_any_layer_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, size: int, keep: float, bits: int, index_bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, mask = torch.randn(size, generator=generator), torch.rand(size, generator=generator) < keep
    mask[size // 2] = True
    shared = Shared.share(weight, mask, bits, index_bits)
    path = tmp_path_factory.getbasetemp() / "any.dc"
    write_compressed(path, Compressed({"w": shared}, {}, {}, ("w",)))
    assert torch.equal(read_compressed(path).state_dict()["w"], shared.dense())


@given(st.data())
def test_a_flipped_bit_is_found(path: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    damaged = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    refused(tmp_path_factory.getbasetemp(), bytes(damaged))


@given(st.data())
def test_a_cut_file_is_found(path: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    whole = path.read_bytes()
    refused(tmp_path_factory.getbasetemp(), whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.data())
def test_a_forged_file_with_a_right_checksum_is_read_or_refused_and_nothing_else(
    path: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    body = bytearray(path.read_bytes()[:-32])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(8, len(body) - 1))
        body[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 1, 7, 100]))
    forged = tmp_path_factory.getbasetemp() / "forged.dc"
    forged.write_bytes(sealed(bytes(body[: len(body) - cut])))
    try:
        found = read_compressed(forged)
    except IntegrityError:
        return
    # A bit of two takes part in the code of at most 256 weights of 4 bytes.
    assert sum(tensor.nbytes for tensor in found.state_dict().values()) < 4096 * len(body)


NUMBER = st.one_of(
    st.integers(-2, 300), st.just(2**40), st.just(2**70), st.just(1.5), st.none(), st.just("x"), st.booleans()
)


@given(st.data())
def test_forged_numbers_in_the_header_are_refused(
    path: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    header, payloads = parts(path.read_bytes())
    streams = header["tensors"][data.draw(st.integers(0, 1))]["shared"]
    field = data.draw(st.sampled_from(sorted(streams)))
    before, streams[field] = streams[field], data.draw(NUMBER)
    forged = tmp_path_factory.getbasetemp() / "numbers.dc"
    forged.write_bytes(assembled(header, payloads))
    try:
        found = read_compressed(forged).state_dict()
    except IntegrityError:
        return
    # Bits of a code are a label that only sizes depend on, as are wider steps where no step is full;
    # everything else decides what is read.
    assert field in ("bits", "index_bits") or (streams[field] == before and type(streams[field]) is int)
    for name, tensor in read_compressed(path).state_dict().items():
        assert torch.equal(found[name], tensor)


Change = Callable[[dict[str, Any]], None]


def shape_of(value: Any) -> Change:
    def change(header: dict[str, Any]) -> None:
        header["tensors"][0]["shape"] = value

    return change


def raw_of(value: Any) -> Change:
    def change(header: dict[str, Any]) -> None:
        header["tensors"][2]["raw"] = value

    return change


def entry_with(number: int, **fields: Any) -> Change:
    return lambda header: header["tensors"][number].update(fields)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (shape_of([2**40, 2**40]), "the last of"),
        (shape_of([10**6]), "the last of"),
        (shape_of([0]), "the last of"),
        (shape_of([1] * 9), "shape"),
        (shape_of([-1]), "shape"),
        (raw_of("float128"), "unknown type"),
        (raw_of("float64"), "bytes"),
        (entry_with(1, name="conv.weight"), "stands twice"),
        (entry_with(1, same_as="conv.weight"), "one of shared, raw and same_as"),
        (entry_with(7, same_as="absent"), "not there"),
        (entry_with(7, same_as="tied.weight"), "not there"),
        (entry_with(0, code="print"), "code"),
        (lambda header: header["tensors"].pop(), None),
        (lambda header: header["tensors"].pop(2), "bytes"),
        (lambda header: header.update(more=1), "more"),
        (lambda header: header.update(tensors=3), "tensors"),
    ],
)
def test_a_forged_header_is_refused(path: Path, tmp_path: Path, change: Change, match: str | None) -> None:
    header, payloads = parts(path.read_bytes())
    change(header)
    if match is None:  # a name less is another file, but a sound one
        (tmp_path / "sound.dc").write_bytes(assembled(header, payloads))
        assert "tied.weight" not in read_compressed(tmp_path / "sound.dc").state_dict()
    else:
        refused(tmp_path, assembled(header, payloads), match)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"tensors": [], "tensors": []}', b"\xff", b"", b"NaN", b"3"]
)
def test_a_header_that_is_not_plain_json_is_refused(tmp_path: Path, text: bytes) -> None:
    for header in (text, zlib.compress(text)):
        refused(tmp_path, sealed(MAGIC + struct.pack("<II", 1, len(header)) + header), "header")


def test_a_small_header_that_grows_without_end_is_refused(tmp_path: Path) -> None:
    bomb = zlib.compress(b" " * 2**28, 9)
    assert len(bomb) < 300_000
    tracemalloc.start()
    refused(tmp_path, sealed(MAGIC + struct.pack("<II", 1, len(bomb)) + bomb), "more than 16777216 bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, sealed(MAGIC + struct.pack("<II", 1, 2**32 - 1) + b"{}"), "a header of")


def test_other_files_and_later_formats_are_refused(path: Path, tmp_path: Path) -> None:
    refused(tmp_path, b"", "is not a .dc file")
    refused(tmp_path, sealed(b"something else altogether"), "is not a .dc file")
    refused(tmp_path, assembled(*parts(path.read_bytes()), version=2), "format 2")
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_compressed(tmp_path / "absent.dc")


def test_centroids_that_are_not_finite_are_refused(path: Path, tmp_path: Path) -> None:
    header, payloads = parts(path.read_bytes())
    refused(tmp_path, assembled(header, struct.pack("<f", float("nan")) + payloads[4:]), "not finite")


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    odd = Compressed({}, {"w": torch.zeros(2, dtype=torch.complex128)}, {}, ("w",))
    with pytest.raises(IntegrityError, match="complex128 cannot be stored"):
        write_compressed(tmp_path / "odd.dc", odd)
