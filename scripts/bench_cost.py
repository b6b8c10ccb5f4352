"""Candidates a second that the cost polynomial evaluates on one core, and how torch-pruning counts one.

python scripts/bench_cost.py [MODEL ...]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from archsearch.models import resolve
from archsearch.rebuild import trace_source

MODELS = ["resnet56", "vgg16", "torchvision/resnet50", "torchvision/mobilenet_v2", "torchvision/densenet121"]
BATCH, REPEATS = 20_000, 7


def seconds(work) -> float:
    """Return the median CPU seconds of a call, after a first one that does not count."""
    taken = []
    for _ in range(1 + REPEATS):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken[1:])


def main() -> None:
    import torch_pruning as tp

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="names; by default five")
    torch.set_num_threads(1)
    header = ("network", "MACs of candidates/s", "MACs+params/s", "torch-pruning count_ops/s", "ratio")
    print("{:<28}{:>22}{:>16}{:>28}{:>12}".format(*header))
    for name in parser.parse_args().models:
        source = resolve(name)
        traced = trace_source(source, {}, source.input_shape)
        cost = traced.cost
        draw = np.random.default_rng(0)
        widths = draw.integers(1, cost.sizes + 1, size=(BATCH, len(cost.names)))
        macs = BATCH / seconds(lambda cost=cost, widths=widths: cost.macs(widths))
        both = BATCH / seconds(lambda cost=cost, widths=widths: (cost.macs(widths), cost.params(widths)))
        peer = 1 / seconds(lambda traced=traced: tp.utils.count_ops_and_params(traced.model, traced.example))
        print(f"{name:<28}{macs:>22,.0f}{both:>16,.0f}{peer:>28,.1f}{macs / peer:>12,.0f}", flush=True)


if __name__ == "__main__":
    main()
