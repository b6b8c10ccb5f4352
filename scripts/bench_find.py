"""From a network to its pruned network: CPU seconds of archsearch and of torch-pruning, side by side.

    python scripts/bench_find.py [MODEL ...]

Both get the same network in hand, score filters by their L1 norm and leave about half of the MACs.
archsearch: trace, rehearsal, cost polynomial, scores, solver, and the small network with inherited weights.
torch-pruning: dependency graph and pruner, one step at a channel ratio of 0.3 per layer (about half of the
MACs). Each tool runs in a process of its own per model, once to warm up and three times measured; the median
of the process's CPU seconds counts, and the share of the MACs that stays, as torch's FLOP counter sees it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time

MODELS = [
    "resnet56",
    "torchvision/resnet50",
    "torchvision/mobilenet_v2",
    "torchvision/densenet121",
    "torchvision/densenet201",
    "torchvision/swin_t",
]
TOOLS = ("archsearch", "torch-pruning")
REPEATS, LIMIT_S = 3, 150


def with_archsearch(model, example):
    from archsearch.allocation import ALLOCATIONS, select, solve
    from archsearch.pruners import PRUNERS, Context
    from archsearch.rebuild import trace_module
    from archsearch.space import SearchSpace
    from archsearch.targets import Target

    traced = trace_module(model, example)
    pruner = PRUNERS["l1_norm"]()
    scores = pruner.score(Context(traced.model, traced.graph))
    allowed = SearchSpace().allowed(traced.graph)
    widths = solve(traced.cost, ALLOCATIONS["global"](scores), allowed, [Target.parse("flops", "0.5")])
    return traced.inherit(select(scores, widths))


def with_torch_pruning(model, example):
    import torch_pruning as tp
    from torch import nn

    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features in (10, 1000)
    ]
    pruner = tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.3,
        ignored_layers=heads,
    )
    pruner.step()
    return model


def measure(tool: str, name: str) -> dict[str, float]:
    import torch

    from archsearch.counters import flop_counter_macs
    from archsearch.models import resolve
    from archsearch.rebuild import example_input

    torch.set_num_threads(1)
    source = resolve(name)
    model = source.build().eval()
    example = example_input(source.input_shape)
    prune = with_archsearch if tool == "archsearch" else with_torch_pruning
    seconds = []
    for _ in range(1 + REPEATS):
        given = copy.deepcopy(model)
        start = time.process_time()
        small = prune(given, example)
        seconds.append(time.process_time() - start)
    small(example)
    keep = flop_counter_macs(small, example) / flop_counter_macs(model, example)
    return {"seconds": statistics.median(seconds[1:]), "keep": keep}


def in_a_process(tool: str, name: str) -> str:
    """Return what a fresh process measures, as a table cell, or why it could not."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--worker", tool, name],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return f"not done in {LIMIT_S} s"
    if done.returncode:
        return f"fails: {done.stderr.strip().splitlines()[-1][:60]}"
    result = json.loads(done.stdout.splitlines()[-1])
    return f"{result['seconds']:.3f} s, keeps {result['keep']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="names; by default six")
    parser.add_argument("--worker", nargs=2, metavar=("TOOL", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(*options.worker)))
        return
    print(f"{'network':<28}{TOOLS[0]:<28}{TOOLS[1]}")
    for name in options.models:
        cells = [in_a_process(tool, name) for tool in TOOLS]
        print(f"{name:<28}{cells[0]:<28}{cells[1]}", flush=True)


if __name__ == "__main__":
    main()
