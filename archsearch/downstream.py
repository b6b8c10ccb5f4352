"""What a training job does with an architecture file: train its network, and measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from archsearch.architecture import Architecture
from archsearch.data import DataSource
from archsearch.errors import UsageError
from archsearch.rebuild import build_fresh, load, load_weights, trace_architecture
from archsearch.recipe import BUDGETS, Recipe
from archsearch.results import Arm, Record, environment, recipe_facts
from archsearch.tensor_files import write_tensors
from archsearch.trainer import Say, Trainer, arm_of, check_classes, is_main
from archsearch.training.callbacks import Callback
from archsearch.training.determinism import stream
from archsearch.training.evaluation import Evaluation, evaluate, resolve_device


def train_architecture(
    path: Path,
    data: DataSource,
    recipe: Recipe,
    *,
    budget: str = "scratch-e",
    published_cost: bool = False,
    weights: Path | None = None,
    seeds: int = 1,
    seed: int = 0,
    device: str = "auto",
    trust_code: bool = False,
    out: Path,
    store: Path,
    say: Say = lambda line: None,
    callbacks: Callable[[str, Path], Sequence[Callback]] = lambda label, directory: (),
) -> Record:
    """Train the network of an architecture file, from scratch or from given weights.

    Args:
        path: The architecture file.
        data: What to train on.
        recipe: How the reference would be trained; the budget stretches it.
        budget: ``"scratch-e"``, ``"scratch-b"`` or ``"finetune"``, which needs ``weights``.
        published_cost: Whether Scratch-B counts FLOPs as Liu et al. publish them, instead of MACs.
        weights: Weights of this architecture to start from.
        seeds: How many times.
        seed: The first seed.
        device: As for ``training.train``.
        trust_code: Whether a model that names the user's own code may be imported.
        out: Receives ``weights.safetensors`` of the first seed and the results.
        store: Directory of all trainings.
        say: Takes lines for the user.
        callbacks: Makes a training's callbacks from its label and directory.

    Raises:
        ArchsearchError: If the file, the data or the weights are not what they should be.
    """
    architecture = Architecture.read(path)
    chosen = BUDGETS[budget]
    if not chosen.epochs_divisor:
        raise UsageError(f"--budget {budget} trains nothing: give scratch-e, scratch-b or finetune")
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: at least 1")
    if chosen.inherits and weights is None:
        raise UsageError(f"--budget {budget} goes on from trained weights: give --weights FILE")
    traced = trace_architecture(architecture, trust_code=trust_code, where=str(path))
    if traced.input_shape != tuple(data.input_shape):
        raise UsageError(
            f"{path} is for inputs of {traced.input_shape}, but {data.name} has images of "
            f"{tuple(data.input_shape)}: give --image-size, or find an architecture with this --data"
        )
    check_classes(traced, data)
    widths = {name: group.width for name, group in architecture.widths.items()}
    cost, reference = traced.cost.of(widths), traced.cost.reference
    recipe = chosen.recipe(recipe, *(c.of_training(published_cost) for c in (reference, cost)))
    trainer = Trainer(data, device, store, say, callbacks)
    results = []
    for number in range(seed, seed + seeds):
        with stream(number, "weights"):
            model = build_fresh(traced, architecture)
        if weights is not None:
            load_weights(model, weights)
        results.append(trainer.train(f"{path.name}, {budget}, seed {number}", model, recipe, number))
    name = f"{path.name}, {budget}"
    record = Record(
        {
            "architecture": architecture.key,
            "model": architecture.model,
            "data": data.name,
            "recipe": recipe_facts(recipe),
            "seed": seed,
            "seeds": seeds,
            "versions": environment(),
        },
        [
            Arm("reference", "reference", "none", reference.macs, reference.params),
            arm_of(name, path.name, budget, cost, results),
        ],
    )
    if is_main():
        out.mkdir(parents=True, exist_ok=True)
        write_tensors(out / "weights.safetensors", results[0].model.state_dict())
        record.write(out)
    return record


def evaluate_architecture(
    path: Path, weights: Path, data: DataSource, *, device: str = "auto", trust_code: bool = False
) -> Evaluation:
    """Measure the network of an architecture file with its weights on the test set.

    Raises:
        ArchsearchError: If the file, the data or the weights are not what they should be.
    """
    resolve_device(device)
    model = load(path, weights, trust_code=trust_code)
    return evaluate(model, data.test, device=device)
