"""The zoo, and every other place that networks come from.

One file per family, one function per model; the function's name is the model's name. A model is plain
PyTorch: nothing in it knows that it will be pruned.
"""

from __future__ import annotations

# Importing a family registers its models.
from archsearch.models import conv, densenet, lenet, mobilenet, preresnet, resnet, vgg  # noqa: F401
from archsearch.models.names import list_models, resolve
from archsearch.models.registry import MODELS
from archsearch.models.source import ModelSource
from archsearch.models.weights import pretrained

__all__ = ["MODELS", "ModelSource", "list_models", "pretrained", "resolve"]
