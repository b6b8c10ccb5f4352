"""archsearch: structured pruning as architecture search.

``find`` a smaller architecture of any torch network, ``load`` it anywhere, train it from scratch.
Names are imported when first used, so that ``import archsearch`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archsearch.api import find
    from archsearch.architecture import Architecture
    from archsearch.cost import CostModel
    from archsearch.rebuild import load
    from archsearch.verification import prunable_graph as channel_graph
    from archsearch.verification import verify

_HOMES = {
    "find": "api.find",
    "load": "rebuild.load",
    "channel_graph": "verification.prunable_graph",
    "verify": "verification.verify",
    "Architecture": "architecture.Architecture",
    "CostModel": "cost.CostModel",
}

__all__ = ["Architecture", "CostModel", "channel_graph", "find", "load", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'archsearch' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(".")
    return getattr(import_module(f"archsearch.{module}"), attribute)
