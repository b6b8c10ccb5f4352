"""What widths are worth by the weights that the reference has already: nothing is trained.

The units that a pruner ranks highest keep their weights, batch norms get the statistics of training images
again, and the small network is measured on the validation images (Li et al., EagleEye, ECCV 2020,
section 3.3: without fresh statistics this says little of what the network can do).
"""

from __future__ import annotations

from archsearch.graph import Selection
from archsearch.rebuild import Traced
from archsearch.search.reference import Reference
from archsearch.surgery import shrink
from archsearch.trainer import Trainer
from archsearch.training.evaluation import evaluate, resolve_device
from archsearch.training.recalibration import recalibrate


def inherited(traced: Traced, reference: Reference, selection: Selection, trainer: Trainer) -> float:
    """Return the accuracy in percent of the kept slices of a trained reference.

    Args:
        traced: The reference as it was traced.
        reference: Its trained weights.
        selection: The kept units of each group.
        trainer: A blind one; nothing is trained with it.
    """
    small = shrink(reference.model.cpu(), traced.graph, selection).to(resolve_device(trainer.device))
    recalibrate(small, trainer.calibration())
    return evaluate(small, trainer.measuring, reference.batch_size, trainer.device).accuracy
