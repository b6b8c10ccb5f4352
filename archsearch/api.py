"""The same as the command line, from Python: ``archsearch.find("resnet56", flops=0.5)``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from archsearch.data import DataSource, load_data
from archsearch.errors import UsageError
from archsearch.gathers import add_gathers
from archsearch.models import ModelSource, pretrained, resolve
from archsearch.on_device import TargetDevice, aimed, target_device
from archsearch.pipeline import Found
from archsearch.pipeline import find as run_plan
from archsearch.plan import NO_PROXY, Plan
from archsearch.presets import PRESETS
from archsearch.rebuild import Traced, trace_module, trace_source
from archsearch.recipe import RECIPES, Recipe
from archsearch.results import environment, recipe_facts
from archsearch.search import defaults
from archsearch.space import SearchSpace
from archsearch.stopwatch import Stopwatch, verdict
from archsearch.targets import Resource, Target
from archsearch.trainer import Say, Trainer, check_classes
from archsearch.training.callbacks import Callback
from archsearch.training.evaluation import resolve_device

if TYPE_CHECKING:
    from archsearch.search.asked import Asked
    from archsearch.search.driver import Searched
    from archsearch.search.pareto import Front

SEARCH = "search"
"""The method that is no pruner: many networks are trained."""

PRUNER = "l1_norm"
"""The pruner whose widths a search is compared with where none is named."""


def default_recipe(data: str) -> str:
    """Return the recipe that suits a data set where none is asked for."""
    return {"digits": "quick", "imagefolder": "imagenet"}.get(data, "cifar")


def find(
    model: str | nn.Module | None = None,
    *,
    flops: str | float | None = None,
    params: str | float | None = None,
    memory: str | float | None = None,
    channels: str | float | None = None,
    latency: str | float | None = None,
    table: str | Path | None = None,
    other_device: bool = False,
    runtime: str | Mapping[str, Any] | None = None,
    preset: str | None = None,
    method: str = "l1_norm",
    options: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
    allocation: str | None = None,
    space: SearchSpace | None = None,
    steps: int = 1,
    recover: int = 1,
    recalibrate: bool = False,
    data: str | DataSource | None = "digits",
    data_options: Mapping[str, Any] | None = None,
    example: Any = None,
    weights: str | None = None,
    trained: bool = True,
    budget: str = "scratch-b",
    budget_cap: float | None = None,
    published_cost: bool = False,
    finetune: str = "finetune",
    recipe: str | Recipe | None = None,
    recipe_changes: Mapping[str, Any] | None = None,
    seeds: int = 1,
    seed: int = 0,
    device: str = "auto",
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    gather: bool = False,
    whole_groups: bool = False,
    trust_code: bool = False,
    out: str | Path | None = None,
    store: str | Path = "runs",
    conditions: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
    callbacks: Callable[[str, Path], Sequence[Callback]] = lambda label, directory: (),
) -> Found:
    """Find a smaller architecture, train it from scratch and compare it with the reference.

    Args:
        model: A name (``"resnet56"``, ``"torchvision/resnet50"``, ``"path/file.py:factory"``), or a network
            in hand. A preset implies its model.
        flops: MACs that may stay, as a share (``0.5``, ``"50%"``) or absolute (``"60M"``).
        params: Parameters that may stay, likewise.
        memory: Bytes of peak activation memory that may stay, likewise.
        channels: Channels of all prunable groups together that may stay, likewise.
        latency: Latency on the device of the table, a share or a time, such as ``"1.2ms"``.
        table: File that ``archsearch profile`` made on that device.
        other_device: Whether it may be another one than this; what is found is then not measured.
        runtime: In place of a table, what runs the network on this machine: a name, such as
            ``"onnxruntime"``, or with it other fields of ``archsearch.latency.meter.Settings``. Its table is
            in the store; where there is none yet, it is measured first.
        preset: Published widths, such as ``"resnet56-a"``, in place of a target.
        method: The pruner; ``archsearch list pruners``; or ``"search"``, which trains many networks.
        search: With ``"search"``: how, such as ``{"trials": 200}``; the arguments of ``search`` below.
        options: Its hyper-parameters, such as ``{"strength": 1e-4}``; the others are as published.
        allocation: How scores become widths: ``"local"`` or ``"global"``; by default the method's own.
        space: Which widths are allowed.
        steps: In how many steps to prune; between two of them the network recovers.
        recover: Epochs of each recovery, at the rate of the fine-tuning.
        recalibrate: Whether batch norms get the statistics of training images after each cut.
        data: A data set's name, your own ``DataSource``, or ``None`` with a budget of ``"none"``.
        data_options: Further arguments of ``load_data``, such as ``data_dir``.
        example: For a network in hand without data: one input ``(1, ...)``.
        weights: File with the reference's weights, or the name of published ones, such as ``"DEFAULT"``.
        trained: Whether the weights of a network in hand are trained ones; if not, the reference is drawn
            afresh by its modules' ``reset_parameters`` and trained.
        budget: ``"scratch-b"``, ``"scratch-e"``, ``"finetune"`` or ``"none"``.
        budget_cap: Most epochs of Scratch-B, in multiples of the recipe's.
        published_cost: Whether Scratch-B counts FLOPs as Liu et al. publish them, instead of MACs.
        finetune: Budget of the fine-tuned arm: ``"finetune"``, ``"finetune-published"`` or ``"none"``.
        recipe: How to train, by name or in full; by default what suits the data.
        recipe_changes: Fields of the recipe that differ, such as ``{"epochs": 5}``.
        seeds: How many times each arm is trained.
        seed: The first seed.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"auto"``.
        input_shape: ``(C, H, W)`` of one input, where neither data nor the model's source says it.
        classes: Outputs of the network, likewise.
        arguments: Further arguments of the model's factory.
        gather: Whether batch norms that read a shared stream select their own channels of it, as Network
            Slimming does in pre-activation networks; the stream then stays.
        whole_groups: Whether a convolution's groups go as a whole (the paths of a ResNeXt block), and do not
            get narrower.
        trust_code: Whether a model may name the user's own code.
        out: Directory of the results; ``None`` writes nothing but the store.
        store: Directory of all trainings.
        conditions: What else to record about the run, such as the command.
        say: Takes lines for the user.
        callbacks: Makes a training's callbacks from its label and directory.

    Raises:
        ArchsearchError: If anything asked for cannot be; before anything long has started.
    """
    source_data = None
    asked: dict[Resource, str | float | None] = {
        "flops": flops,
        "params": params,
        "memory": memory,
        "channels": channels,
        "latency": latency,
    }
    targets = [Target.parse(resource, text) for resource, text in asked.items() if text is not None]
    chosen = PRESETS[preset] if preset is not None else None
    if model is None and chosen is not None:
        model = chosen.model
    if model is None:
        raise UsageError(
            "no model: give --model NAME, such as resnet56, or a --preset (from Python, a network)"
        )
    if chosen is not None:
        chosen.check_model(model if isinstance(model, str) else type(model).__name__)
    resolve_device(device)
    name = "your own" if data is None or isinstance(data, DataSource) else data
    chosen_recipe = recipe if isinstance(recipe, Recipe) else RECIPES[recipe or default_recipe(name)]
    chosen_recipe = chosen_recipe.with_(**(recipe_changes or {}))
    searches = method == SEARCH
    if search is not None and not searches:
        raise UsageError(f"search says how to search: give method={SEARCH!r}, not {method!r}")
    plan = Plan(
        targets=targets,
        method=_pruner(search or {}) if searches else method,
        options=options or {},
        allocation=allocation,
        preset=chosen,
        space=space or SearchSpace(),
        steps=steps,
        recover=recover,
        recalibrate=recalibrate,
        budget=budget,
        budget_cap=budget_cap,
        published_cost=published_cost,
        recipe=chosen_recipe,
        finetune=finetune,
        seeds=seeds,
        seed=seed,
    )
    sought = _asked(search or {}, plan, data, data_options, trust_code) if searches else None
    if sought is not None and out is None:
        raise UsageError("a search keeps its study in a directory: give out")
    # Names are checked before data is read.
    source = resolve(model, trust_code=trust_code) if isinstance(model, str) else model
    if isinstance(source, ModelSource):
        published_weights(source, weights)
    if data is not None:
        source_data = data if isinstance(data, DataSource) else load_data(data, **(data_options or {}))
        say(source_data.announcement)
    if isinstance(source, ModelSource):
        traced, file = traced_reference(
            source,
            source_data,
            weights=weights,
            input_shape=input_shape,
            classes=classes,
            arguments=arguments,
            seed=seed,
            gathers=gather,
            whole_groups=whole_groups,
        )
        weights, trained = file, weights != file
    else:
        example = example if example is not None else _first_image(source_data)
        traced = trace_module(source, example, gathers=gather, whole_groups=whole_groups)
    say(summary(traced))
    trainer = None
    if source_data is not None:
        check_classes(traced, source_data)
        trainer = Trainer(source_data, device, Path(store), say, callbacks)
    if latency is not None and not isinstance(source, ModelSource) and not other_device:
        check_rebuilt(traced, trust_code)
    if plan.drops_branches(traced.graph.sizes):
        traced = traced.with_branches()
    aim = target_device(
        latency,
        table,
        other_device,
        runtime=runtime,
        traced=traced,
        device=device,
        store=Path(store),
        say=say,
    )
    if aim is not None and plan.space.drop_branches and not aim.table.knows_branches:
        say(
            "latency: the table knows no network without a residual branch, and takes those for faster than "
            "they are: make it with profile --drop-branches"
        )
    if aim is not None and sought is None:
        traced, aimed_space = aimed(traced, plan.space, aim.table)
        plan = replace(plan, space=aimed_space)
    facts = {
        **(conditions or {}),
        "model": traced.name,
        "data": source_data.name if source_data else "none",
        **({"recipe": recipe_facts(chosen_recipe)} if trainer is not None else {}),
        "versions": environment(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if sought is not None:
        if trainer is None:
            raise UsageError("a search trains networks: give data")
        return _search(
            traced,
            trainer,
            sought,
            aim,
            out=Path(out or "."),
            weights=weights,
            trained=trained,
            trust_code=trust_code,
            conditions=facts,
            say=say,
        )
    stopwatch = None if aim is None else Stopwatch(aim, Path(store), trust_code, say)
    found = run_plan(
        traced,
        plan,
        trainer,
        weights=weights,
        trained=trained,
        clock=stopwatch,
        out=Path(out) if out is not None else None,
        conditions=facts,
        say=say,
    )
    if aim is not None:
        say(verdict(found.architecture.provenance["latency"], targets))
    return found


def search(
    model: str | nn.Module | None = None,
    *,
    out: str | Path,
    trials: int = defaults.TRIALS,
    objective: str = defaults.OBJECTIVE,
    short: float = defaults.SHORT,
    sampler: str = defaults.SAMPLER,
    thompson: float = defaults.THOMPSON,
    rungs: str | None = None,
    proxy: str = defaults.PROXY,
    interactions: bool = False,
    calibrate: int = defaults.CALIBRATE,
    finals: int = defaults.FINALS,
    top: int | None = None,
    baselines: Sequence[str] | None = None,
    jobs: int = defaults.JOBS,
    engine: str | None = None,
    engine_options: Mapping[str, Any] | None = None,
    storage: str | None = None,
    budget: str = defaults.BUDGET,
    **options: Any,
) -> Searched:
    """Search the widths that train best at a target; the same call goes on where it was killed.

    Args:
        model: As for ``find``.
        out: Directory of the study and the results.
        trials: How many networks to look at.
        objective: What they are worth: ``"proxy"``, ``"inherit"``, ``"short"`` or ``"full"``.
        short: Share of the epochs with ``"short"``.
        sampler: ``"model"``, or one of Optuna's to compare with.
        thompson: Share of the model's trials that are drawn from what it believes so far.
        rungs: Where trials are stopped early, in percent of their schedule, such as ``"25,50"``.
        proxy: The pruner whose curves the model starts from; ``options`` holds its hyper-parameters. With
            ``"uniform"`` it starts from the belief that uniform widths are hard to beat.
        interactions: Whether the model has products of neighbouring groups.
        calibrate: With how many networks to measure first how well each objective ranks.
        finals: How many fresh seeds each finalist gets.
        top: How many of the best trials are finalists.
        baselines: Methods whose widths are finalists, each ``"NAME"`` or ``"NAME:ALLOCATION"``.
        jobs: Trainings at once.
        engine: Who trains: ``"inline"``, ``"local"``, ``"ray"`` or ``"slurm"``.
        engine_options: Settings of the engine's own.
        storage: Address of a PostgreSQL database that several drivers share.
        budget: ``"scratch-e"`` or ``"scratch-b"``.
        options: Further arguments of ``find``: targets, space, data, recipe and the like.

    Raises:
        ArchsearchError: If anything asked for cannot be; before anything long has started.
    """
    settings = {
        "trials": trials,
        "objective": objective,
        "short": short,
        "sampler": sampler,
        "thompson": thompson,
        "rungs": rungs,
        "proxy": proxy,
        "interactions": interactions,
        "calibrate": calibrate,
        "finals": finals,
        "top": top,
        "baselines": baselines,
        "jobs": jobs,
        "engine": engine,
        "engine_options": engine_options,
        "storage": storage,
    }
    found = find(model, method=SEARCH, search=settings, budget=budget, out=out, **options)
    return cast("Searched", found)


def front(
    model: str | nn.Module | None = None,
    *,
    resource: Resource,
    targets: Sequence[str | float],
    out: str | Path,
    search: Mapping[str, Any] | None = None,
    budget: str = defaults.BUDGET,
    **options: Any,
) -> Front:
    """Search at several targets, all of which teach one model; the same call goes on where it was killed.

    Args:
        model: As for ``find``.
        resource: What stands against the accuracy: ``"flops"``, ``"params"`` or ``"latency"``.
        targets: Of that resource, such as ``[0.3, 0.5, 0.7]``.
        out: Directory of the front; each target has a run directory in it.
        search: How to search at each target, such as ``{"trials": 50}``; the arguments of ``search`` above.
        budget: ``"scratch-e"`` or ``"scratch-b"``.
        options: Further arguments of ``find``: other targets, space, data, recipe and the like.

    Raises:
        ArchsearchError: If anything asked for cannot be; before anything long has started.
    """
    from archsearch.search.pareto import check  # Optuna takes long to import

    if options.pop(resource, None) is not None:
        raise UsageError(f"--{resource}: the front has its own targets of it: leave it out")
    parsed = [Target.parse(resource, text) for text in targets]
    check(parsed)
    found = find(
        model,
        method=SEARCH,
        search={**(search or {}), "front": parsed},
        budget=budget,
        out=out,
        **{resource: targets[0]},  # type: ignore[arg-type]
        **options,
    )
    return cast("Front", found)


def _pruner(settings: Mapping[str, Any]) -> str:
    name = str(settings.get("proxy", NO_PROXY))
    return PRUNER if name == NO_PROXY else name


def _asked(
    settings: Mapping[str, Any],
    plan: Plan,
    data: str | DataSource | None,
    data_options: Mapping[str, Any] | None,
    trust_code: bool,
) -> Asked:
    from archsearch.search.asked import asked  # Optuna takes long to import

    name = data if isinstance(data, str) else None
    return asked(settings, plan, data=name, data_options=data_options or {}, trust_code=trust_code)


def _search(
    traced: Traced, trainer: Trainer, asked: Asked, aim: TargetDevice | None, **more: Any
) -> Searched:
    more |= {"crew": asked.crew, "storage": asked.storage, "device": aim}
    if asked.front:
        from archsearch.search.pareto import front as run_front  # Optuna takes long to import

        return run_front(traced, asked.quest, asked.front, trainer, **more)
    from archsearch.search.driver import search as run_search

    return run_search(traced, asked.quest, trainer, **more)


def published_weights(source: ModelSource, weights: str | None) -> str | None:
    """Return ``weights`` if they name published ones; a file is for the caller to load.

    Raises:
        UsageError: If there is no such file.
    """
    if weights is None or Path(weights).is_file():
        return None
    if source.origin in ("torchvision", "timm") and not Path(weights).suffix:
        return weights
    raise UsageError(f"--weights {weights}: there is no such file")


def traced_reference(
    source: ModelSource,
    data: DataSource | None = None,
    *,
    weights: str | None = None,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    gathers: bool = False,
    whole_groups: bool = False,
) -> tuple[Traced, str | None]:
    """Return the traced reference with published weights if such are named, or the file of its weights.

    Args:
        source: Builds it.
        data: That it is for, which says the shape of an input and the classes.
        weights: A file, which is for the caller to load, or the name of published weights.
        input_shape: As for ``find``; so are the others.
        classes: Outputs of the network.
        arguments: Further arguments of the model's factory.
        seed: Of fresh weights.
        gathers: Whether batch norms select channels of a shared stream.
        whole_groups: Whether a convolution's groups go as a whole.

    Raises:
        UsageError: If nothing says the shape, or the network cannot take it; if there is no such file.
    """
    published = published_weights(source, weights)
    shape, words = shape_and_arguments(source, data, input_shape, classes, arguments)
    traced = trace_source(source, words, shape, seed=seed, gathers=gathers, whole_groups=whole_groups)
    if published is None:
        return traced, weights
    model = add_gathers(pretrained(source, published, **words), traced.gathers)
    return replace(traced, model=model), None


def shape_and_arguments(
    source: ModelSource,
    data: DataSource | None,
    input_shape: Sequence[int] | None,
    classes: int | None,
    arguments: Mapping[str, Any] | None,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Return the shape of one input and the arguments of the factory that fit the data.

    Raises:
        UsageError: If nothing says the shape, or the network cannot take it.
    """
    shape = tuple(input_shape or (data.input_shape if data else source.input_shape) or ())
    if not shape:
        raise UsageError(f"nothing says what {source.name} takes: give --input-shape C,H,W, or --data")
    if classes is None:
        classes = data.num_classes if data else source.num_classes
    native = shape == source.input_shape
    words = source.arguments_for(classes, None if native else shape[0], None if native else shape[-1])
    return shape, {**words, **(arguments or {})}


def check_rebuilt(traced: Traced, trust_code: bool) -> None:
    """Check that processes of their own, which measure latencies, can build a network that was given in hand.

    Raises:
        UsageError: If its class cannot be imported, or takes arguments.
    """
    try:
        resolve(traced.name, trust_code=trust_code)
    except UsageError as error:
        raise UsageError(
            f"latency: the found network is measured in processes of their own, which cannot build it "
            f"({error}): give a name or a factory MODULE:FUNCTION in place of the network"
        ) from error


def summary(traced: Traced) -> str:
    """Return what a trace found, in a few lines."""
    cost, graph = traced.cost.reference, traced.graph
    shape = " x ".join(map(str, traced.input_shape))
    size = f"{cost.macs:,} MACs, {cost.params:,} parameters for an input of {shape}"
    lines = [f"{traced.name}: {len(graph.groups)} channel groups, {size}"]
    lines += [f"no rule for {op}: {why}; what it touches stays" for op, why in graph.unknown_ops.items()]
    return "\n".join(lines)


def _first_image(data: DataSource | None) -> Any:
    if data is None:
        raise UsageError("a network in hand needs data, or example: one input (1, ...)")
    images, _ = next(iter(data.train.batches(1)))
    return images
