"""A user's own factory, ``package.module:factory`` or ``path/file.py:factory``, as a model source."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from torch import nn

from archsearch.errors import UnknownNameError, UsageError
from archsearch.models.source import ModelSource, default_of, named_arguments, one_line, takes_any


def factory_source(name: str) -> ModelSource:
    """Import the code that ``name`` points at and return its factory as a source.

    The factory may carry its native input: ``factory.input_shape = (C, H, W)``.

    Raises:
        UsageError: If there is no such file, module or factory, or importing it fails.
    """
    place, _, attribute = name.rpartition(":")
    if is_file := place.endswith(".py"):
        place = _relative(place)
    module = _import_file(Path(place)) if is_file else _import_module(place)
    name = f"{place}:{attribute}"
    factory = getattr(module, attribute, None)
    if factory is None:
        callables = [word for word, thing in vars(module).items() if callable(thing) and word[0] != "_"]
        raise UnknownNameError(f"factory in {place}", attribute, callables)
    if isinstance(factory, nn.Module):
        raise UsageError(f"{name} is a network: name a function that returns one")
    if not callable(factory):
        kind = type(factory).__name__
        raise UsageError(f"{name} is of type {kind}: a factory is a function that returns a torch.nn.Module")
    try:
        takes = named_arguments(factory)
    except ValueError as error:
        raise UsageError(f"{name} does not tell its arguments: wrap it in a function of your own") from error
    return ModelSource(
        name=name,
        origin="code",
        factory=factory,
        input_shape=_input_shape(name, getattr(factory, "input_shape", None)),
        num_classes=default_of(factory, "num_classes"),
        takes=None if takes_any(factory) else takes,
        classes_argument=_first(("num_classes",), takes),
        channels_argument=_first(("in_channels", "in_chans"), takes),
        size_argument=_first(("input_size",), takes),
    )


def _relative(place: str) -> str:
    """Spell a path inside the current directory relative to it, so that a file's name fits elsewhere too."""
    path = Path(place).absolute()
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else Path(place).as_posix()


def _import_file(path: Path) -> ModuleType:
    try:
        code = path.read_bytes()
    except OSError as error:
        near = ", ".join(sorted(str(other) for other in path.parent.glob("*.py"))[:5])
        found = f"; there is {near}" if near else ""
        raise UsageError(f"cannot read {path} from {Path.cwd()}: {error.strerror}{found}") from error
    # Two files may have the same name, and one may be edited between two calls.
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + code).hexdigest()[:16]
    name = f"_archsearch_factory_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up there while it is being imported
    try:
        exec(compile(code, path, "exec"), module.__dict__)  # noqa: S102 - trusted by --trust-code
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_error(str(path), error) from error
    return module


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"'{name}' is no module: give package.module:factory or path/file.py:factory")
    here = str(Path.cwd())
    importlib.invalidate_caches()
    sys.path.append(here)  # last, so that nothing here hides what is installed
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise _import_error(name, error) from error
    finally:
        sys.path.remove(here)


def _import_error(place: str, error: BaseException) -> UsageError:
    own = place.removesuffix(".py").replace(".", "/").rpartition("/")[2]
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is here
    lines = [frame.lineno for frame in frames if Path(frame.filename).stem == own]
    where = f"line {lines[-1]}: " if lines else ""
    return UsageError(f"{place} cannot be imported: {where}{one_line(error)}")


def _input_shape(name: str, shape: object) -> tuple[int, int, int] | None:
    match shape:
        case None:
            return None
        case (int(c), int(h), int(w)) if min(c, h, w) > 0:
            return c, h, w
    raise UsageError(f"{name}.input_shape is {shape!r}: it must be (channels, height, width)")


def _first(words: tuple[str, ...], known: tuple[str, ...]) -> str | None:
    return next((word for word in words if word in known), None)
