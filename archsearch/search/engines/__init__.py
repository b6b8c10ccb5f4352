"""Who carries out the tasks of a search: this process, processes beside it, or a cluster.

The clusters' libraries are extras: their modules are imported when such an engine is made, not before.
"""

from __future__ import annotations

from archsearch.search.engines.engine import ENGINES, Engine, Order
from archsearch.search.engines.inline import Inline
from archsearch.search.engines.local import Local

__all__ = ["ENGINES", "Engine", "Order"]


@ENGINES.register("inline")
def _inline(order: Order) -> Engine:
    """This process, one task after the other; the default."""
    return Inline(order)


@ENGINES.register("local")
def _local(order: Order) -> Engine:
    """Worker processes on this machine, with CUDA one a GPU: --jobs N."""
    return Local(order)


@ENGINES.register("ray")
def _ray(order: Order) -> Engine:
    """Tasks of a Ray cluster, or of a Ray on this machine."""
    from archsearch.search.engines.ray import RayEngine

    return RayEngine(order)


@ENGINES.register("slurm")
def _slurm(order: Order) -> Engine:
    """Jobs of a SLURM cluster, by submitit."""
    from archsearch.search.engines.slurm import SlurmEngine

    return SlurmEngine(order)
