"""YAML in and out, for files that anybody may have written.

The reader takes the parser's events one by one and builds plain ``dict``, ``list`` and scalars itself, so
that every limit holds before memory or time is spent. Anchors, aliases, tags and merge keys, with which a
small file becomes a huge object, are refused. Scalars follow the YAML 1.2 core schema: ``no`` is a string,
``1e3`` a number, ``017`` seventeen. Mapping keys are strings as they stand in the file.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from archsearch.errors import SpecError

MAX_EVENTS: Final = 40_000  # an architecture of 4096 groups has 28,700
MAX_DEPTH: Final = 32
MAX_SCALAR_CHARACTERS: Final = 4096
MAX_INT: Final = 2**63 - 1

Place = tuple[str | int, ...]
"""Where a value stands: the keys and list positions on the way to it."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # same events, thirty times faster where built
_UNREADABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def shown(value: object, limit: int = 60) -> str:
    """Return ``value`` for a message: on one line, printable, and cut after ``limit`` characters."""
    if isinstance(value, str):
        value = value[: limit + 1]  # nobody wants the repr of a megabyte
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def dotted(place: Place) -> str:
    """Return a place as people write it, such as ``widths.conv1.width``."""
    text = ".".join(str(part) for part in place)
    return text if text.isprintable() and len(text) <= 200 else shown(text, 200)


@dataclass(frozen=True)
class Document:
    """What a YAML file holds, and on which line each value stands.

    Args:
        data: The top mapping, of plain values.
        lines: The line (from 1) of every value, by place; a mapping's value has the line of its key.
        where: The name of the file, for messages.
    """

    data: dict[str, Any]
    lines: Mapping[Place, int]
    where: str

    def error(self, place: Place, reason: str) -> SpecError:
        """Return the error ``file:line: field: reason`` for the value at ``place``, or where it should be."""
        known = place
        while known and known not in self.lines:
            known = known[:-1]
        line = self.lines.get(known, 1)
        return SpecError(f"{self.where}:{line}: {dotted(place)}{': ' if place else ''}{reason}")


def parse(text: str, where: str) -> Document:
    """Read YAML text whose top is a mapping.

    Args:
        text: The YAML.
        where: The name of the file, for messages.

    Raises:
        SpecError: If the text is not YAML, breaks a limit, or uses what is refused.
    """
    if unreadable := _UNREADABLE.search(text):
        line = text.count("\n", 0, unreadable.start()) + 1
        raise SpecError(
            f"{where}:{line}: is not YAML: the character U+{ord(unreadable[0]):04X} is not allowed"
        )
    builder = _Builder(where)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.take(event)
    except SpecError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = (
            min(mark.line, text.count("\n")) + 1 if mark else 1
        )  # the end of the file is past its last line
        raise SpecError(f"{where}:{line}: is not YAML: {error.problem or error.context}") from error
    except Exception as error:  # a parser of strangers' files may fail in any way, and must not crash us
        raise SpecError(f"{where}: is not YAML: {shown(str(error))}") from error
    return builder.document()


@dataclass
class _Frame:
    """A collection that is still open."""

    items: dict[str, Any] | list[Any]
    place: Place
    key: str | None = None  # of a mapping: the key that waits for its value


@dataclass
class _Builder:
    """Turns events into plain values; a stack instead of recursion, so depth costs nothing."""

    where: str
    root: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    stack: list[_Frame] = field(default_factory=list)
    events: int = 0
    documents: int = 0

    def document(self) -> Document:
        if not isinstance(self.root, dict):
            reason = "is empty" if self.root is None else "must hold fields (name: value) at its top"
            raise SpecError(f"{self.where}: {reason}")
        return Document(self.root, self.lines, self.where)

    def take(self, event: Any) -> None:
        self.events += 1
        line = event.start_mark.line + 1
        if self.events > MAX_EVENTS:
            raise self._error(line, f"more than {MAX_EVENTS} YAML events: the file is too large to be meant")
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise self._error(line, "a second YAML document starts here: one file holds one")
        elif isinstance(event, yaml.AliasEvent):
            raise self._error(
                line, f"the alias *{shown(event.anchor)[1:-1]} is not allowed: write the value out"
            )
        elif isinstance(event, yaml.CollectionEndEvent):
            self.stack.pop()
        elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            if event.anchor is not None:
                raise self._error(line, f"the anchor &{shown(event.anchor)[1:-1]} is not allowed: remove it")
            if event.tag is not None:
                raise self._error(line, f"the tag {shown(event.tag)[1:-1]} is not allowed: remove it")
            if isinstance(event, yaml.ScalarEvent):
                self._scalar(event, line)
            else:
                self._open({} if isinstance(event, yaml.MappingStartEvent) else [], line)

    def _scalar(self, event: Any, line: int) -> None:
        text: str = event.value
        if len(text) > MAX_SCALAR_CHARACTERS:
            raise self._error(line, f"a value of {len(text)} characters: at most {MAX_SCALAR_CHARACTERS}")
        plain = event.implicit[0]
        frame = self.stack[-1] if self.stack else None
        if frame is None or isinstance(frame.items, list) or frame.key is not None:
            place = self._place()
            self.lines.setdefault(place, line)
            self._put(self._value(text, line) if plain else text)
        elif plain and text == "<<":
            raise self._error(line, "the merge key << is not allowed: write the fields out")
        elif text in frame.items:
            raise self._error(line, f"{shown(text)} stands here a second time: remove one")
        else:
            frame.key = text
            self.lines[(*frame.place, text)] = line

    def _open(self, items: dict[str, Any] | list[Any], line: int) -> None:
        if len(self.stack) >= MAX_DEPTH:
            raise self._error(line, f"nested deeper than {MAX_DEPTH} levels")
        if self.stack and isinstance(self.stack[-1].items, dict) and self.stack[-1].key is None:
            raise self._error(line, "a field's name must be a plain word, not a list or mapping")
        place = self._place()
        self.lines.setdefault(place, line)
        self._put(items)
        self.stack.append(_Frame(items, place))

    def _put(self, value: Any) -> None:
        if not self.stack:
            self.root = value
            return
        frame = self.stack[-1]
        if isinstance(frame.items, list):
            frame.items.append(value)
        elif frame.key is not None:
            frame.items[frame.key] = value
            frame.key = None

    def _place(self) -> Place:
        """Return where the next value will stand."""
        if not self.stack:
            return ()
        frame = self.stack[-1]
        if isinstance(frame.items, list):
            return (*frame.place, len(frame.items))
        return frame.place if frame.key is None else (*frame.place, frame.key)

    def _value(self, text: str, line: int) -> Any:
        """Resolve a plain scalar by the core schema (YAML 1.2.2, section 10.3.2)."""
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text[0] in "tT"
        if _INT.fullmatch(text):
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            value = int(text, base) if len(text) <= 32 else MAX_INT + 1  # int() is quadratic in the digits
            if abs(value) > MAX_INT:
                raise self._error(line, f"the number {shown(text)[1:-1]} does not fit into 64 bits")
            return value
        if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and math.isinf(float(text))):
            raise self._error(line, f"the number {shown(text)[1:-1]} is not finite")
        return float(text) if _FLOAT.fullmatch(text) else text

    def _error(self, line: int, reason: str) -> SpecError:
        place = dotted(self._place())
        return SpecError(f"{self.where}:{line}: {place}{': ' if place else ''}{reason}")


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would take for something else than a string; writes no aliases.

    The pure Python emitter, since libyaml's lays lines out differently and bytes must not depend on a build.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _text(self, text: str) -> yaml.ScalarNode:
        # Only double quotes have escapes; in single ones PyYAML writes U+0085 and its like as bare line ends.
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper._text)
for _tag, _pattern in (("int", _INT), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), list("-+.0123456789")
    )


def dump(data: Mapping[str, Any]) -> str:
    """Return plain data as YAML, in the order given, one line to each field or entry of a section.

    A list or mapping of scalars below the sections stands on one line: ``conv1: {width: 7, size: 16}``.

    Raises:
        SpecError: If the text would not read back as the same data.
    """
    stream = io.StringIO()
    dumper = _Dumper(stream, sort_keys=False, allow_unicode=True, width=2**31)
    try:
        node = dumper.represent_data(dict(data))
        _lay_out(node, depth=0)
        dumper.open()
        dumper.serialize(node)
        dumper.close()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"cannot be written as YAML: {shown(str(error), 200)}") from error
    text = stream.getvalue()
    if parse(text, "the data to write").data != data:
        raise SpecError("cannot be written as YAML: a value that is not plain would read back as another")
    return text


def _lay_out(node: yaml.Node, depth: int) -> None:
    if isinstance(node, yaml.CollectionNode):
        nodes = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        flat = all(isinstance(part, yaml.ScalarNode) for part in nodes)
        node.flow_style = flat and (depth >= 2 or isinstance(node, yaml.SequenceNode))
        for part in nodes:
            _lay_out(part, depth + 1)
