"""Pruners side by side with how they are published, and with torch-pruning.

    python scripts/bench_pruners.py [--rows 10000] [--places 400] [--keep 0.5] [--only thinet regression l1]

ThiNet and regression choose channels of VGG-16 by the next layer's outputs: from Gram matrices and from rows.
The network has random weights and looks at scikit-learn's digits, enlarged to 32 x 32. For each convolution
but the first, CPU seconds of one thread, until the channels of its input are chosen:

- ThiNet, from the contributions to random filters at random places, ``(rows, channels)``: our removal order
  of all channels, against the published greedy loop, which keeps the running sum of the dropped channels and
  tries each channel that is left. Both run to the end.
- Regression, from what the layer reads at some places, and its weights: our entry penalties of all channels,
  against forming the contributions to all filters, ``(places * filters, channels)``, and scikit-learn's
  Lasso on them. Its penalty is doubled and bisected, each fit starting from the last, until between c and
  1.1 c channels are left; c is the share to keep. Its tolerance is 1e-6, since with the default, 1e-4, a fit
  that starts near its end stops before it has chosen. The choice that is compared is its choice at that
  penalty with a tolerance of 1e-10, which is not timed.

L1 goes from a fresh network to one of at most half its MACs, a median of three after one to warm up: ours by
trace, scores, solver and rebuild; torch-pruning by small steps until its own counter says so, with the same
ratio for all layers or one threshold. A step of its ``iterative_steps=100`` is 1 % of the channels.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.datasets import load_digits
from sklearn.linear_model import Lasso
from torch import nn
from torch.nn import functional as F

from archsearch.allocation import ALLOCATIONS, select, solve
from archsearch.counters import flop_counter_macs
from archsearch.models import resolve
from archsearch.pruners import PRUNERS, Context
from archsearch.pruners.calibration import gram_of_all_filters
from archsearch.pruners.regression import entry_penalties
from archsearch.pruners.thinet import removal_order
from archsearch.rebuild import example_input, trace_module
from archsearch.space import SearchSpace
from archsearch.targets import Target

PARTS = ["thinet", "regression", "l1"]


def digits(count: int) -> torch.Tensor:
    images = torch.from_numpy(load_digits().images[:count]).float()[:, None] / 8 - 1
    return F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)


def layers(rows: int, places: int) -> dict[str, tuple[Any, torch.Tensor, torch.Tensor]]:
    """Return for each convolution but the first random rows, some patches, and the weight."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model, images = resolve("vgg16").build(), digits(256)
    found = {}

    def see(name: str, conv: nn.Conv2d, x: torch.Tensor) -> None:
        columns = F.unfold(x, conv.kernel_size, padding=conv.padding)  # (N, C * 9, places)
        at = torch.randint(columns.shape[2], (len(x), 1, -(-rows // len(x))), generator=draw)
        patches = columns.gather(2, at.expand(-1, columns.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        patches = patches[torch.randperm(len(patches), generator=draw)].unflatten(1, (conv.in_channels, -1))
        weight = conv.weight.flatten(2)  # (C_out, C, 9)
        some = weight[torch.randint(len(weight), (rows,), generator=draw)]
        one = (patches[:rows] * some).sum(2).double().numpy()
        found[name] = one, patches[:places].double(), weight.double()

    for name, conv in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:]:
        conv.register_forward_pre_hook(lambda conv, args, name=name: see(name, conv, args[0]))
    with torch.no_grad():
        model.train()(images)  # the norms take the statistics of the batch
    return found


def greedy_on_rows(rows: Any) -> list[int]:
    columns = np.ascontiguousarray(rows.T)
    left, dropped = list(range(len(columns))), []
    total = np.zeros(len(rows))
    while left:
        best, least = -1, np.inf
        for channel in left:
            error = np.sum((total + columns[channel]) ** 2)
            if error < least:
                best, least = channel, error
        total += columns[best]
        left.remove(best)
        dropped.append(best)
    return dropped


def penalties(patches: torch.Tensor, weight: torch.Tensor) -> Any:
    units = csr_array(np.eye(weight.shape[1]))
    return entry_penalties(gram_of_all_filters(patches[:, None], weight[None], units))


def lasso_on_rows(patches: torch.Tensor, weight: torch.Tensor, wanted: int) -> tuple[float, Any]:
    """Return a penalty per row that leaves between ``wanted`` and ``1.1 wanted`` channels, and the rows."""
    rows = np.asfortranarray(torch.einsum("rck,ock->roc", patches, weight).flatten(0, 1).numpy())
    target = rows.sum(1)
    model = Lasso(fit_intercept=False, warm_start=True, selection="random", random_state=0, tol=1e-6)

    def left(alpha: float) -> int:
        model.alpha = alpha
        return int((model.fit(rows, target).coef_ != 0).sum())

    low, high = 0.0, 1e-4
    while left(high) > wanted:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        count = left(middle)
        if wanted <= count <= int(1.1 * wanted):
            return middle, rows
        low, high = (middle, high) if count > wanted else (low, middle)
    raise SystemExit(f"no penalty leaves {wanted} channels")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def table(title: str, lines: list[tuple[str, int, float, float, bool]]) -> None:
    print(f"\n{title}\n{'layer':<20}{'channels':>8}{'ours s':>10}{'rows s':>10}{'ratio':>8}  same choice")
    for name, channels, ours, theirs, same in lines:
        cells = f"{ours:>10.4f}{theirs:>10.3f}{theirs / ours:>8.1f}"
        print(f"{name:<20}{channels:>8}{cells}  {'yes' if same else 'NO'}")
    ours, theirs = sum(line[2] for line in lines), sum(line[3] for line in lines)
    print(f"{'total':<28}{ours:>10.4f}{theirs:>10.3f}{theirs / ours:>8.1f}", flush=True)


def l1_with_archsearch(model: nn.Module, example: torch.Tensor, allocation: str) -> nn.Module:
    traced = trace_module(model, example)
    scores = PRUNERS["l1_norm"]().score(Context(traced.model, traced.graph))
    order: Any = ALLOCATIONS[allocation]
    target = Target.parse("flops", "0.5")
    widths = solve(traced.cost, order(scores), SearchSpace().allowed(traced.graph), [target])
    return traced.inherit(select(scores, widths))


def l1_with_torch_pruning(model: nn.Module, example: torch.Tensor, everywhere: bool, steps: int) -> nn.Module:
    import torch_pruning as tp

    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    pruner = tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(p=1),
        global_pruning=everywhere,
        pruning_ratio=1.0,
        iterative_steps=steps,
        ignored_layers=heads,
    )
    full, _ = tp.utils.count_ops_and_params(model, example)
    for _ in range(steps):
        pruner.step()
        if tp.utils.count_ops_and_params(model, example)[0] <= 0.5 * full:
            return model
    raise SystemExit("torch-pruning does not reach the target")


TO_HALF: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    "ours, local": lambda model, example: l1_with_archsearch(model, example, "local"),
    "ours, global": lambda model, example: l1_with_archsearch(model, example, "global"),
    "torch-pruning, local, 10": lambda model, example: l1_with_torch_pruning(model, example, False, 10),
    "torch-pruning, local, 100": lambda model, example: l1_with_torch_pruning(model, example, False, 100),
    "torch-pruning, global, 100": lambda model, example: l1_with_torch_pruning(model, example, True, 100),
}


def l1_to_half(name: str, arguments: dict[str, Any]) -> None:
    """Print seconds, share of the MACs and the ratio of seconds to ours."""
    source = resolve(name)
    model, example = source.build(**arguments).eval(), example_input(source.input_shape)
    full = flop_counter_macs(model, example)
    print(f"\nL1 to half the MACs, {name} {arguments or ''}\n{'':<30}{'s':>8}{'MACs':>9}{'ratio':>8}")
    ours: dict[str, float] = {}
    for label, prune in TO_HALF.items():
        seconds = []
        for _ in range(4):
            given = copy.deepcopy(model)
            small, took = timed(lambda given=given, prune=prune: prune(given, example))
            seconds.append(took)
        took = statistics.median(seconds[1:])
        allocation = "global" if "global" in label else "local"
        ours.setdefault(allocation, took)
        keep = flop_counter_macs(small, example) / full
        print(f"{label:<30}{took:>8.3f}{keep:>9.4f}{took / ours[allocation]:>8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000, help="random pairs of a place and a filter")
    parser.add_argument("--places", type=int, default=400, help="places where all filters count")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the channels that stays")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "l1" in options.only:
        l1_to_half("resnet56", {"shortcut": "projection"})
        l1_to_half("torchvision/resnet50", {})
    found = layers(options.rows, options.places) if options.only != ["l1"] else {}
    removal_order(np.eye(4)), entry_penalties(np.eye(4))  # imports are not timed
    if "thinet" in options.only:
        thinet(found, options.rows)
    if "regression" in options.only:
        regression(found, options.places, options.keep)


def thinet(found: dict[str, tuple[Any, torch.Tensor, torch.Tensor]], count: int) -> None:
    lines = []
    for name, (rows, _, _) in found.items():
        ours, ours_s = timed(lambda rows=rows: removal_order(rows.T @ rows))
        theirs, theirs_s = timed(lambda rows=rows: greedy_on_rows(rows))
        lines.append((name, rows.shape[1], ours_s, theirs_s, ours.tolist() == theirs))
    table(f"ThiNet, {count} rows", lines)


def regression(found: dict[str, tuple[Any, torch.Tensor, torch.Tensor]], places: int, keep: float) -> None:
    lines = []
    for name, (_, *sample) in found.items():
        size = sample[1].shape[1]
        ours, ours_s = timed(lambda sample=sample: penalties(*sample))
        wanted = int(keep * size)
        (alpha, rows), theirs_s = timed(lambda sample=sample, wanted=wanted: lasso_on_rows(*sample, wanted))
        exact = Lasso(alpha=alpha, fit_intercept=False, precompute=True, tol=1e-10, max_iter=100_000)
        support = np.flatnonzero(exact.fit(rows, rows.sum(1)).coef_)
        best = np.sort(np.argsort(-ours, kind="stable")[: len(support)])
        lines.append((name, size, ours_s, theirs_s, best.tolist() == support.tolist()))
    table(f"Regression, {places} places, keeping {keep:g}", lines)


if __name__ == "__main__":
    main()
