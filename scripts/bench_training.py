"""Compare images per second of our loop with a loop as published code writes it.

    python scripts/bench_training.py [--model resnet20] [--images 2048] [--rounds 3] [--threads 2]

Both train the same network with the same optimiser and batch size on the same synthetic 32x32 colour images,
held in memory: ours as tensors, theirs as a torchvision-style data set of PIL images behind a DataLoader. The
two run in processes of their own, since ours changes how the process handles memory. Their rounds alternate,
so that whatever else the machine does hits both; the medians are reported, also per CPU second, which a busy
machine disturbs less. The split shows how long the
images alone take and how long the steps alone take.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from archsearch.data import Augmentation, in_memory
from archsearch.models import resolve
from archsearch.recipe import RECIPES
from archsearch.training.loop import train

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class PilImages(Dataset[Any]):
    """Like torchvision's CIFAR10: an array that becomes a PIL image each time."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        self._pixels, self._labels = pixels.permute(0, 2, 3, 1).numpy(), labels.tolist()
        self._transform = transforms.Compose(
            [
                transforms.Pad(4),
                transforms.RandomCrop(32),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[index])), self._labels[index]


def published_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Any]) -> None:
    """Train one epoch as the released code of Liu et al. does, per-step reading of the loss included."""
    model.train()
    seen, correct = 0.0, 0
    for data, target in loader:
        optimizer.zero_grad()
        output = model(data)
        loss = F.cross_entropy(output, target)
        seen += loss.item()
        correct += int((output.argmax(1) == target).sum())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def synthetic(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random pixels ``(N, 3, 32, 32)`` and labels ``(N,)``."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return pixels, torch.randint(0, 10, (images,), generator=generator)


def our_bodies(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    pixels, labels = synthetic(options.images)
    source = in_memory(
        pixels,
        labels,
        test=(pixels[:1], labels[:1]),
        validation_share=0.0,
        num_classes=10,
        mean=MEAN,
        std=STD,
        augmentation=Augmentation(pad=4, flip=True),
    )
    recipe = RECIPES["cifar"].with_(epochs=1, batch_size=options.batch_size, precision=options.precision)
    model = resolve(options.model).build(num_classes=10, in_channels=3)
    images = source.train.batches
    return {
        "ours": lambda: train(model, source.train, source.validation, recipe, device="cpu"),
        "our images": lambda: [None for _ in images(options.batch_size, train=True, channels_last=True)],
    }


def published_bodies(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    pixels, labels = synthetic(options.images)
    loader = DataLoader(
        PilImages(pixels, labels), options.batch_size, shuffle=True, num_workers=options.workers
    )
    model = resolve(options.model).build(num_classes=10, in_channels=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    fixed = [(torch.randn(options.batch_size, 3, 32, 32), labels[: options.batch_size])] * len(loader)
    return {
        "published": lambda: published_epoch(model, optimizer, loader),
        "its images": lambda: [None for _ in loader],
        "its steps": lambda: published_epoch(model, optimizer, fixed),
    }


def serve(pipe: Connection, options: argparse.Namespace, ours: bool) -> None:
    """Time what the parent names, until it names nothing."""
    torch.set_num_threads(options.threads)
    bodies = (our_bodies if ours else published_bodies)(options)
    next(iter(bodies.values()))()  # warm up
    pipe.send(list(bodies))
    while name := pipe.recv():
        start = time.perf_counter(), time.process_time()
        bodies[name]()
        pipe.send((time.perf_counter() - start[0], time.process_time() - start[1]))


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    """Return for each body the median images per second, and the same per CPU second."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers = []
    for ours in (True, False):
        here, there = context.Pipe()
        workers.append(context.Process(target=serve, args=(there, options, ours), daemon=True))
        workers[-1].start()
        pipes |= dict.fromkeys(here.recv(), here)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pipes}
    for _ in range(options.rounds):
        for name, pipe in pipes.items():
            pipe.send(name)
            times[name].append(pipe.recv())
    for pipe in set(pipes.values()):
        pipe.send("")
    for worker in workers:
        worker.join()
    return [
        {
            name: options.images / statistics.median(pair[clock] for pair in rounds)
            for name, rounds in times.items()
        }
        for clock in (0, 1)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes of the published loader")
    parser.add_argument("--precision", default="fp32", help="of our loop: fp32 or bf16")
    options = parser.parse_args()
    wall, cpu = measure(options)
    print(
        f"{options.model}, {options.images} images 3x32x32, batch {options.batch_size},"
        f" {options.threads} threads, {options.workers} loader workers, ours in {options.precision},\n"
        f"torch {torch.__version__}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()},"
        f" median of {options.rounds} rounds\n"
        f"{'images':14}{'per second':>14}{'per CPU second':>16}"
    )
    for name in wall:
        print(f"{name:14}{wall[name]:14,.0f}{cpu[name]:16,.0f}")
    for label, ratio in (("ratio", whole), ("  of steps", of_steps), ("  of images", of_images)):
        print(f"{label:14}{ratio(wall):14.2f}{ratio(cpu):16.2f}")


def whole(rates: dict[str, float]) -> float:
    return rates["ours"] / rates["published"]


def of_steps(rates: dict[str, float]) -> float:
    ours = 1 / (1 / rates["ours"] - 1 / rates["our images"])
    return ours / rates["its steps"]


def of_images(rates: dict[str, float]) -> float:
    return rates["our images"] / rates["its images"]


if __name__ == "__main__":
    main()
