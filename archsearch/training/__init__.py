"""Training: one plain loop, whose behaviour comes in as callbacks, that can be killed and goes on."""

from archsearch.training.evaluation import Evaluation, Split, evaluate, resolve_device
from archsearch.training.loop import TrainResult, train

__all__ = ["Evaluation", "Split", "TrainResult", "evaluate", "resolve_device", "train"]
