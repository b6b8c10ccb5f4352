"""Run one command; turn errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from archsearch.cli.commands import COMMANDS
from archsearch.cli.parser import build_parser
from archsearch.errors import ArchsearchError, ResourceError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("ARCHSEARCH_DEBUG") == "1"
    try:
        parser = build_parser()
        options = parser.parse_args(words)
        if options.version:
            from archsearch.results import environment

            print(f"archsearch {environment()['archsearch']}")
        elif options.command is None:
            parser.print_help()
        else:
            options.words = words
            COMMANDS[options.command](options)
        sys.stdout.flush()  # a reader that is gone shows here, not when the interpreter ends
        return 0
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on from the last checkpoint", 130)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        if debug:
            raise
        known = _known(error)
        if known is not None:
            return _fail(str(known), known.exit_code)
        return _fail(
            f"a bug of archsearch: {type(error).__name__}: {error}; ARCHSEARCH_DEBUG=1 shows where", 1
        )


def _known(error: Exception) -> ArchsearchError | None:
    """Return the error in our terms, if it is one of ours or of too little memory."""
    if isinstance(error, ArchsearchError):
        return error
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return ResourceError(f"out of memory: {text or 'smaller --batch-size needs less'}")
    return None


def _fail(message: str, code: int) -> int:
    print(f"archsearch: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return code
