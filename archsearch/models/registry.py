"""The table of the zoo: model names to the functions that build them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from archsearch.registry import Registry

MODELS: Registry[Callable[..., nn.Module]] = Registry("model")
