"""The ``.dc`` file: weights that were pruned, shared and coded, exactly as they are used.

::

    8 bytes   the magic, which text transfer would damage
    uint32    version of the format, 1
    uint32    bytes of the header as it stands in the file
    header    JSON, deflated: the tensors in order, each shared, raw or the same as another
    payloads  of the tensors in that order
    32 bytes  SHA-256 of everything before

Integers are little end first. A shared tensor's payload is its centroids (float32), the lengths of the words
of codes and of distances (a byte each), and the two streams. Nothing is run or unpickled, and what is
allocated is bounded by the size of the file: an entry takes two bits at least and stands for 256 weights at
most.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from archsearch import files
from archsearch.bounded_yaml import shown
from archsearch.compression.huffman import decode
from archsearch.compression.relative import places_of
from archsearch.compression.shared import Shared
from archsearch.errors import IntegrityError, ResourceError
from archsearch.tensor_files import MAX_HEADER_BYTES, MAX_TENSORS

MAGIC: Final = b"\x89ASDC\r\n\x1a"
VERSION: Final = 1
MAX_FILE_BYTES: Final = 2**32

_START = struct.Struct("<8sII")
_DIGEST_BYTES = 32
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool, torch.complex64,
    )
}  # fmt: skip

Count = Annotated[int, Field(ge=0, le=2**40)]
Shape = Annotated[list[Count], Field(max_length=8)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Streams(_Strict):
    bits: Annotated[int, Field(ge=1, le=8)]
    index_bits: Annotated[int, Field(ge=1, le=8)]
    centroids: Annotated[int, Field(ge=1, le=255)]
    entries: Count
    code_words: Annotated[int, Field(ge=1, le=256)]
    gap_words: Annotated[int, Field(ge=1, le=256)]
    codes: Count
    gaps: Count


class _Entry(_Strict):
    name: str
    shape: Shape = Field(default_factory=list)
    shared: _Streams | None = None
    raw: str | None = None
    same_as: str | None = None


class _Header(_Strict):
    tensors: Annotated[list[_Entry], Field(max_length=MAX_TENSORS)]
    architecture: str = ""


@dataclass(frozen=True)
class Compressed:
    """What a file holds.

    Attributes:
        shared: The quantised layers by parameter name.
        raw: Everything else of the state dict, as it is.
        same: Names of a tensor that stands under another one too, with that one.
        names: All names, in the order of the state dict.
        architecture: Key of the architecture that the weights belong to; empty if unknown.
    """

    shared: Mapping[str, Shared]
    raw: Mapping[str, Tensor]
    same: Mapping[str, str]
    names: tuple[str, ...]
    architecture: str = ""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the quantised weights under all names."""
        found = {**{name: shared.dense() for name, shared in self.shared.items()}, **self.raw}
        return {name: found[self.same.get(name, name)] for name in self.names}


def write_compressed(path: Path, content: Compressed) -> int:
    """Write a file atomically and return its size in bytes.

    Raises:
        IntegrityError: If there is more than can be read back.
        ResourceError: If the system refuses.
    """
    entries: list[dict[str, object]] = []
    payloads: list[bytes] = []
    for name in content.names:
        if name in content.same:
            entries.append({"name": name, "same_as": content.same[name]})
        elif name in content.shared:
            shared = content.shared[name]
            coded = shared.coded
            entries.append(
                {
                    "name": name,
                    "shape": shared.shape,
                    "shared": {
                        "bits": shared.bits,
                        "index_bits": shared.index_bits,
                        "centroids": len(shared.centroids),
                        "entries": coded.entries,
                        "code_words": len(coded.code_words),
                        "gap_words": len(coded.gap_words),
                        "codes": len(coded.codes),
                        "gaps": len(coded.gaps),
                    },
                }
            )
            words = coded.code_words.tobytes() + coded.gap_words.tobytes()
            payloads += [shared.centroids.astype("<f4").tobytes(), words, coded.codes, coded.gaps]
        else:
            tensor = content.raw[name].detach().cpu().contiguous()
            kind = str(tensor.dtype).removeprefix("torch.")
            if kind not in _DTYPES:
                raise IntegrityError(f"{files.named(path)}: {name}: {kind} cannot be stored")
            entries.append({"name": name, "shape": tuple(tensor.shape), "raw": kind})
            payloads.append(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    header = json.dumps(
        {"tensors": entries, **({"architecture": content.architecture} if content.architecture else {})},
        separators=(",", ":"),
    ).encode()
    if len(header) > MAX_HEADER_BYTES or len(entries) > MAX_TENSORS:
        raise IntegrityError(f"{files.named(path)}: {len(entries)} tensors to write: at most {MAX_TENSORS}")
    # Names and sizes of many small tensors would be a tenth of the file of a small network.
    deflated = zlib.compress(header, 9)
    body = b"".join([_START.pack(MAGIC, VERSION, len(deflated)), deflated, *payloads])
    data = body + hashlib.sha256(body).digest()
    if len(data) > MAX_FILE_BYTES:
        raise IntegrityError(f"{files.named(path)}: {len(data)} bytes to write: at most {MAX_FILE_BYTES}")
    files.write_bytes(path, data)
    return len(data)


def read_compressed(path: Path) -> Compressed:
    """Read a file that ``write_compressed`` wrote.

    Raises:
        IntegrityError: If it is missing, damaged or anything else.
        ResourceError: If what it holds does not fit into memory.
    """
    with files.opened(path, IntegrityError) as (file, size):
        if size > MAX_FILE_BYTES:
            raise IntegrityError(f"{files.named(path)}: has {size} bytes: at most {MAX_FILE_BYTES}")
        data = file.read(size)  # and not the limit, for which as much memory would be taken
    try:
        return _parse(data, files.named(path))
    except MemoryError:
        raise ResourceError(f"{files.named(path)}: holds more weights than fit into memory") from None


def _parse(data: bytes, where: str) -> Compressed:
    if len(data) < _START.size + _DIGEST_BYTES or not data.startswith(MAGIC):
        raise IntegrityError(f"{where}: is not a .dc file of archsearch")
    _, version, header_bytes = _START.unpack_from(data)
    if version != VERSION:
        raise IntegrityError(f"{where}: has format {version}, and {VERSION} is known: update archsearch")
    end = len(data) - _DIGEST_BYTES
    if hashlib.sha256(memoryview(data)[:end]).digest() != data[end:]:
        raise IntegrityError(f"{where}: is damaged: its SHA-256 is not the one at its end; fetch it again")
    if header_bytes > min(MAX_HEADER_BYTES, end - _START.size):
        raise IntegrityError(f"{where}: has a header of {header_bytes} bytes: at most {MAX_HEADER_BYTES}")
    header = _header(data[_START.size : _START.size + header_bytes], where)
    cursor = _Cursor(memoryview(data)[:end], _START.size + header_bytes, where)
    shared: dict[str, Shared] = {}
    raw: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for entry in header.tensors:
        if entry.name in shared or entry.name in raw or entry.name in same:
            raise IntegrityError(f"{where}: {shown(entry.name)} stands twice")
        place = f"{where}: {shown(entry.name)}"
        if [entry.shared, entry.raw, entry.same_as].count(None) != 2:
            raise IntegrityError(f"{place}: must be one of shared, raw and same_as")
        if entry.shared is not None:
            shared[entry.name] = _shared(entry.shared, tuple(entry.shape), cursor, place)
        elif entry.raw is not None:
            raw[entry.name] = _raw(entry.raw, entry.shape, cursor, place)
        else:
            same[entry.name] = str(entry.same_as)
    for name, other in same.items():
        if other not in shared and other not in raw:
            raise IntegrityError(f"{where}: {shown(name)} is the same as {shown(other)}, which is not there")
    cursor.finish()
    names = tuple(entry.name for entry in header.tensors)
    return Compressed(shared, raw, same, names, header.architecture)


def _header(text: bytes, where: str) -> _Header:
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(text, MAX_HEADER_BYTES)
        if not inflater.eof or inflater.unused_data:
            raise ValueError(f"it is cut, or has more than {MAX_HEADER_BYTES} bytes")
        return _Header.model_validate(json.loads(inflated.decode(), object_pairs_hook=files.distinct))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{where}: header: {shown(field)}: {first['msg']}") from None
    except (ValueError, RecursionError, zlib.error) as error:
        raise IntegrityError(f"{where}: its header is not JSON: {shown(str(error), 200)}") from None


def _shared(streams: _Streams, shape: tuple[int, ...], cursor: _Cursor, where: str) -> Shared:
    size = math.prod(shape)
    centroids = np.frombuffer(cursor.take(4 * streams.centroids), dtype="<f4").astype(np.float32)
    code_words, gap_words = (
        np.frombuffer(cursor.take(count), dtype=np.uint8) for count in (streams.code_words, streams.gap_words)
    )
    codes_stream, gaps_stream = cursor.take(streams.codes), cursor.take(streams.gaps)
    if not np.isfinite(centroids).all():
        raise IntegrityError(f"{where}: has centroids that are not finite")
    if len(centroids) >= 2**streams.bits or len(code_words) > len(centroids) + 1:
        raise IntegrityError(f"{where}: has more codes than {streams.bits} bits or its centroids allow")
    if len(gap_words) > 2**streams.index_bits:
        raise IntegrityError(f"{where}: has longer distances than {streams.index_bits} bits allow")
    codes = decode(codes_stream, streams.entries, code_words, f"{where}: codes")
    gaps = decode(gaps_stream, streams.entries, gap_words, f"{where}: distances")
    places = places_of(gaps, size, streams.index_bits, where)
    weights = codes > 0
    return Shared(shape, streams.bits, streams.index_bits, centroids, codes[weights], places[weights])


def _raw(kind: str, shape: list[int], cursor: _Cursor, where: str) -> Tensor:
    if kind not in _DTYPES:
        raise IntegrityError(f"{where}: has the unknown type {shown(kind)}")
    dtype = _DTYPES[kind]
    data = bytearray(cursor.take(math.prod(shape) * dtype.itemsize))
    if dtype == torch.bool and max(data, default=0) > 1:
        raise IntegrityError(f"{where}: holds bytes that are neither true nor false")
    tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return tensor.reshape(shape)


class _Cursor:
    """Hands out the payloads one after the other."""

    def __init__(self, data: memoryview, place: int, where: str) -> None:
        self._data, self._place, self._where = data, place, where

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self._place:
            raise IntegrityError(
                f"{self._where}: {count} bytes are announced, {len(self._data) - self._place} are left"
            )
        self._place += count
        return bytes(self._data[self._place - count : self._place])

    def finish(self) -> None:
        if self._place != len(self._data):
            raise IntegrityError(f"{self._where}: {len(self._data) - self._place} bytes belong to no tensor")
