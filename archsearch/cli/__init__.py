"""The command line: parse, call one function, print. torch is imported inside the commands only."""

from archsearch.cli.main import main
from archsearch.cli.parser import build_parser

__all__ = ["build_parser", "main"]
