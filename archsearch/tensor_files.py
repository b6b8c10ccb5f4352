"""Tensors in files: our own as safetensors with a SHA-256, and foreign weights without running any code.

Neither format notices a flipped bit by itself, so whoever writes keeps the SHA-256 and gives it when reading.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from archsearch.bounded_yaml import shown
from archsearch.errors import IntegrityError, ResourceError
from archsearch.files import Location, distinct, named, opened, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

# One mebibyte of header would do for weights, but not for a checkpoint of the largest architecture: 4096
# layers with weight and norm, two moments of the optimiser and an average are some 65,000 tensors, each with
# 150 bytes of header. Without the two bounds a file of a million empty tensors costs 40 seconds and 2 GB.
MAX_TENSORS: Final = 2**16
MAX_HEADER_BYTES: Final = 16 * 2**20

_NESTED_UNDER = ("state_dict", "model")
_FOREIGN = (".pt", ".pth", ".bin")
_NAMES_SHOWN = 3


def write_tensors(
    path: Location, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors as safetensors, atomically, and return the SHA-256 of the file.

    Tensors may be on any device and share memory; each is stored in full. They are not changed.

    Raises:
        IntegrityError: If a tensor has no dense values, or there are more than can be read back.
        ResourceError: If the system refuses.
    """
    from safetensors.torch import save

    if len(tensors) > MAX_TENSORS:
        raise IntegrityError(f"{named(path)}: {len(tensors)} tensors to write: at most {MAX_TENSORS}")
    dense: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        _check_dense(named(path), name, tensor)
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        dense[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    data = save(dense, dict(metadata) if metadata else None)
    _check_header(named(path), data[: 8 + MAX_HEADER_BYTES])
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Location, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Args:
        path: The file.
        sha256: What ``write_tensors`` returned; if given, the very bytes that become tensors are verified.

    Raises:
        IntegrityError: If the file is missing, damaged or not safetensors.
        ResourceError: If it is larger than the machine's memory.
    """
    from safetensors.torch import load

    with opened(path, IntegrityError) as (file, size):
        _check_memory(named(path), size)
        _check_header(named(path), file.read(8 + MAX_HEADER_BYTES))
        file.seek(0)
        data = file.read()
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise IntegrityError(f"{named(path)}: is damaged or was changed: its SHA-256 is not {sha256[:12]}…")
    try:
        return load(data)
    except Exception as error:  # the format's own errors have no common type
        raise IntegrityError(f"{named(path)}: is not a safetensors file: {shown(str(error), 200)}") from error


def read_weights(path: Location) -> dict[str, Tensor]:
    """Read a state dict that any tool may have written, without ever running code from it.

    ``.safetensors`` as ``read_tensors`` does; ``.pt``, ``.pth`` and ``.bin`` through torch's loader of plain
    weights. The state dict may stand alone or under ``state_dict`` or ``model``; a ``module.`` before every
    name is taken off.

    Raises:
        IntegrityError: If the file is anything else; says how to write it.
        ResourceError: If it is larger than the machine's memory.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        weights = read_tensors(path)
    elif suffix in _FOREIGN:
        with opened(path, IntegrityError) as (file, size):
            weights = _load_foreign(named(path), file, size)
    else:
        raise IntegrityError(
            f"{named(path)}: weights must be .safetensors, or {', '.join(_FOREIGN)} of torch"
        )
    prefix = "module."
    if weights and all(name.startswith(prefix) for name in weights):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Check that tensors are those that a model expects, and that all values are finite.

    Args:
        tensors: What was read.
        expected: The model's ``state_dict()``; may be on the meta device.
        where: The file, for messages.

    Raises:
        IntegrityError: If a name, shape or dtype differs, or a value is not finite; says the first few.
    """
    import torch

    both = [name for name in expected if name in tensors]
    differences = [
        _some("missing", [name for name in expected if name not in tensors]),
        _some("unknown", [name for name in tensors if name not in expected]),
        _some(
            "of another shape",
            [
                f"{name} {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
                for name in both
                if tensors[name].shape != expected[name].shape
            ],
        ),
        _some(
            "of another dtype",
            [
                f"{name} {tensors[name].dtype}, not {expected[name].dtype}"
                for name in both
                if tensors[name].dtype != expected[name].dtype
            ],
        ),
    ]
    if any(differences):
        raise IntegrityError(f"{where}: does not fit the model: {'; '.join(filter(None, differences))}")
    wrong = [name for name in both if not torch.isfinite(tensors[name]).all()]
    if wrong:
        raise IntegrityError(f"{where}: has values that are not finite: {_some('tensors', wrong)}")


def _some(what: str, names: Iterable[str]) -> str:
    names = [name if name.isprintable() else shown(name) for name in names]
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_NAMES_SHOWN])}{more})" if names else ""


def _check_header(where: str, start: bytes) -> None:
    """Refuse what safetensors itself would accept: a huge header, too many tensors, a name twice."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > len(start) - 8:
        raise IntegrityError(
            f"{where}: is not a safetensors file, or its header is over {MAX_HEADER_BYTES} bytes"
        )
    try:
        header = json.loads(start[8 : 8 + length], object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: is not a safetensors file: {shown(str(error), 200)}") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS + 1:
        raise IntegrityError(f"{where}: must have a header of at most {MAX_TENSORS} tensors")


def _check_memory(where: str, size: int) -> None:
    """Refuse a file that would not fit, before the system kills us; reading needs it twice."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * size > memory_bytes:
        raise ResourceError(f"{where}: {size} bytes cannot be read with {memory_bytes} bytes of memory")


def _load_foreign(where: str, file: BinaryIO, size: int) -> dict[str, Tensor]:
    import torch

    _check_memory(where, size)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile's own errors have no common type
        raise IntegrityError(
            f"{where}: is not what torch.save writes since 1.6: load and save it again with a current torch"
        ) from error
    # Compressed members could grow a small file into any amount of memory; torch itself never compresses.
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not stored or sum(member.file_size for member in members) > size:
        raise IntegrityError(f"{where}: is compressed, which torch.save never does: refused")
    file.seek(0)
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # ten types have been seen
        raise IntegrityError(
            f"{where}: is damaged, or holds more than tensors, and code from a file is never run:"
            " write it with torch.save(model.state_dict(), path)"
        ) from error
    return _state_dict(where, content, size)


def _state_dict(where: str, content: Any, size: int) -> dict[str, Tensor]:
    if isinstance(content, dict):
        content = next((content[key] for key in _NESTED_UNDER if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content:
        raise IntegrityError(f"{where}: holds {type(content).__name__}, not a state dict")
    weights: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if not isinstance(name, str):
            raise IntegrityError(f"{where}: {shown(name)} is not a name of a tensor")
        _check_dense(where, name, tensor)
        # A view can pretend to be larger than its memory, as an expanded one is.
        held = min(size, tensor.untyped_storage().nbytes())
        if math.prod(tensor.shape) * tensor.element_size() > held:
            raise IntegrityError(f"{where}: {shown(name)} claims to be larger than the file")
        weights[name] = tensor.detach()
    return weights


def _check_dense(where: str, name: str, tensor: object) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise IntegrityError(f"{where}: {shown(name)} is {type(tensor).__name__}, not a tensor")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise IntegrityError(f"{where}: {shown(name)} has no dense values")
