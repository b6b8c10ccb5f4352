from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import archsearch
from archsearch import errors
from archsearch.allocation import ALLOCATIONS, select, solve
from archsearch.api import shape_and_arguments
from archsearch.architecture import Architecture
from archsearch.cli import build_parser
from archsearch.data import DATASETS
from archsearch.models import resolve
from archsearch.models.registry import MODELS
from archsearch.presets import PRESETS
from archsearch.pruners import PRUNERS, Context
from archsearch.rebuild import Traced, trace_architecture, trace_source
from archsearch.recipe import BUDGETS, RECIPES, Recipe
from archsearch.search.engines import ENGINES
from archsearch.search.objectives import OBJECTIVES
from archsearch.search.sampler import MODEL, SAMPLERS
from archsearch.space import SearchSpace
from archsearch.sparsity.criteria import CRITERIA
from archsearch.targets import Target

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
OTHER_TOOLS = {"--all", "--num_processes", "--nproc_per_node", "--system"}

Block = tuple[str, str, str]
"""Where a fenced block stands, its language and its text."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fenced(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append((f"{name_of(page)}:{line}", match[1], match[2]))
    return found


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, str]]:
    """Yield each command line of archsearch that is shown, without its first word."""
    for where, _, block in fenced("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from ((where, words) for part in line.split("&&") if (words := words_of(part)) is not None)
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", prose(page)):
            words = words_of(" ".join(code.split()))
            if words is not None and "…" not in words:
                yield name_of(page), words
    for file in [*SPACES, *sorted((ROOT / "docs" / "examples").glob("*.py"))]:
        for line in file.read_text(encoding="utf-8").splitlines():
            if (words := words_of(line.lstrip("# "))) is not None:
                yield name_of(file), words


def words_of(line: str) -> str | None:
    match = re.match(r"\s*(?:archsearch |(?:accelerate|torchrun) .*-m archsearch\.cli )(.*)", line)
    return match[1] if match else None


def rows(kind: str) -> dict[str, list[str]]:
    """Return the rows of the table after ``<!-- names: kind -->`` by the names in their first cells."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        _, marker, rest = page.read_text(encoding="utf-8").partition(f"<!-- names: {kind} -->\n")
        if not marker:
            continue
        table = rest.partition("\n\n")[0].splitlines()
        for line in table[2:]:
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            for name in re.findall(r"`([^`]+)`", cells[0]):
                assert name not in found, f"{kind}: {name} stands twice"
                found[name] = cells[1:]
    assert found, f"no page has a table of {kind}"
    return found


def traced_model(name: str, **arguments: object) -> Traced:
    source = resolve(name)
    shape, words = shape_and_arguments(source, None, None, None, arguments)
    return trace_source(source, words, shape)


@pytest.fixture(scope="module")
def resnet20() -> Traced:
    return traced_model("resnet20")


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


# ---------------------------------------------------------------------------------------- links and names


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name_of(page)}: {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", prose(page))
        open_pages += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    assert set(PAGES) <= reached


@pytest.mark.parametrize(
    ("kind", "registry"),
    [
        ("pruners", PRUNERS),
        ("criteria", CRITERIA),
        ("allocations", ALLOCATIONS),
        ("recipes", RECIPES),
        ("budgets", BUDGETS),
        ("presets", PRESETS),
        ("data", DATASETS),
        ("models", MODELS),
        ("samplers", [MODEL, *SAMPLERS]),
        ("engines", ENGINES),
        ("objectives", OBJECTIVES),
        ("fields", list(Recipe.__dataclass_fields__)),
    ],
)
def test_a_table_names_all_that_is_registered_and_nothing_else(kind: str, registry: object) -> None:
    assert set(rows(kind)) == set(registry)  # type: ignore[call-overload]


def test_the_exit_codes_are_those_of_the_errors() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.ArchsearchError)
    ]
    table = (ROOT / "docs" / "architecture_file.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| (\d+) \| (.*?) \|", table.partition("<!-- names: exit codes -->")[2], re.MULTILINE
    )
    shown = {name: int(code) for code, names in lines for name in re.findall(r"`(\w+)`", names)}
    assert shown == {kind.__name__: kind.exit_code for kind in kinds}


@pytest.mark.parametrize("name", list(rows("models")))
def test_the_zoos_table_says_what_a_trace_counts(name: str) -> None:
    shape, macs, params, groups, _ = rows("models")[name]
    traced = traced_model(name)
    assert shape == "\N{MULTIPLICATION SIGN}".join(map(str, traced.input_shape))
    assert number(macs) == traced.cost.reference.macs
    assert number(params) == traced.cost.reference.params
    assert number(groups) == len(traced.graph.groups)


@pytest.mark.parametrize("name", list(rows("presets")))
def test_the_presets_table_says_what_we_compute(name: str) -> None:
    model, macs, keep_macs, params, keep_params, published_epochs, epochs = rows("presets")[name]
    preset = PRESETS[name]
    assert model == f"`{preset.model}`"
    traced = traced_model(preset.model)
    widths = preset.widths(traced.graph.sizes)
    traced = traced.with_branches() if 0 in widths.values() else traced
    cost, reference = traced.cost.of(widths), traced.cost.reference
    assert (number(macs), number(params)) == (cost.macs, cost.params)
    assert f"{cost.macs / reference.macs:.4f}" == f"0{keep_macs}"
    assert f"{cost.params / reference.params:.4f}" == f"0{keep_params}"
    longest, of = map(int, published_epochs.split(" of "))
    cap = 2 if of == 90 else None  # the published scripts for ImageNet stop at 180 epochs
    budget = replace(BUDGETS["scratch-b"], cap=cap)
    assert longest == budget.epochs(of, reference.published_flops, cost.published_flops)
    assert int(epochs) == budget.epochs(of, reference.macs, cost.macs)


# ---------------------------------------------------------------------------------- commands and snippets


@pytest.mark.parametrize(("where", "words"), sorted(set(commands())))
def test_every_command_that_is_shown_can_be_parsed(where: str, words: str) -> None:
    try:
        build_parser().parse_args(shlex.split(words, comments=True))
    except SystemExit as stopped:  # --help
        assert stopped.code == 0, where


def options_of(command: str | None = None) -> set[str]:
    parser = build_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    chosen = [subparsers.choices[command]] if command else [parser, *subparsers.choices.values()]
    return {option for each in chosen for option in each._option_string_actions if option.startswith("--")}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_that_is_named_exists(page: Path) -> None:
    named = set(
        re.findall(r"(?<![\w-])--[a-z][a-z_-]*", re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8")))
    )
    assert named <= options_of() | OTHER_TOOLS


def test_every_option_of_find_is_told_about() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [o for o in options_of("find") - {"--help"} if not re.search(rf"{o}(?![\w-])", text)]


@pytest.mark.parametrize(("where", "code"), [(where, code) for where, _, code in fenced("python")])
def test_python_snippets_compile_and_use_what_there_is(where: str, code: str) -> None:
    tree = ast.parse(code, where)
    compile(tree, where, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("archsearch"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{where}: {node.module} has no {alias.name}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            f"archsearch.{n}" for n in archsearch.__all__
        }:
            function = getattr(archsearch, ast.unparse(node.func).removeprefix("archsearch."))
            words = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(function).bind(*node.args, **words)


@pytest.mark.parametrize(
    ("where", "code"),
    [(where, code) for where, _, code in fenced("python") if "CostModel(" in code or "def my_net" in code],
)
def test_snippets_that_take_no_time_run(where: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    exec(compile(code, where, "exec"), namespace)
    if "my_net" in namespace:
        assert isinstance(namespace["my_net"](num_classes=3, in_channels=1), nn.Module)  # type: ignore[operator]
    elif "verify" in code:
        assert float(capsys.readouterr().out.split()[-1]) < 1e-5
    else:
        assert len(namespace["macs"]) == 10_000  # type: ignore[arg-type]


def test_the_architecture_in_the_readme_is_a_real_one(tmp_path: Path) -> None:
    (text,) = [text for _, _, text in fenced("yaml") if text.startswith("format:")]
    path = tmp_path / "architecture.yaml"
    path.write_text(text, encoding="utf-8")
    architecture = Architecture.read(path)
    trace_architecture(architecture)  # compares groups, MACs and parameters
    assert architecture.cost.macs is not None
    assert 0.499 < architecture.cost.macs.keep <= 0.5


# ------------------------------------------------------------------------------------------ search spaces


def test_the_search_space_in_the_docs_can_be_used(tmp_path: Path, resnet20: Traced) -> None:
    (text,) = [text for _, _, text in fenced("yaml") if text.startswith("bounds:")]
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    allowed = SearchSpace.read(path).allowed(resnet20.graph)
    assert allowed["conv1"].tolist() == [16]
    assert allowed["layer2.0.conv1"].tolist() == [8, 12, 16, 20, 24, 28, 32]  # a fifth of 32 is 6.4
    assert allowed["layer3.0.conv1"].tolist() == list(range(8, 65, 4))  # a tenth of 64 is 6.4


def widths_in(space: Path, traced: Traced, keep: str) -> dict[str, int]:
    scores = PRUNERS["l1_norm"]().score(Context(traced.model, traced.graph))
    allowed = SearchSpace.read(space).allowed(traced.graph)
    targets = [Target.parse("flops", keep)]
    widths = solve(traced.cost, ALLOCATIONS["global"](scores), allowed, targets)
    assert traced.verify(select(scores, widths)).ok
    assert traced.cost.of(widths).macs <= targets[0].limit(traced.cost.reference.macs)
    return widths


def test_there_are_search_spaces() -> None:
    assert {space.stem for space in SPACES} == {"tensor_cores", "inner_layers", "gentle", "tied_stages"}


def test_tensor_cores_leaves_multiples_of_eight(resnet20: Traced) -> None:
    widths = widths_in(ROOT / "search_spaces" / "tensor_cores.yaml", resnet20, "0.5")
    small, _ = resnet20.fresh(widths)
    assert {m.out_channels % 8 for m in small.modules() if isinstance(m, nn.Conv2d)} == {0}
    assert set(widths.values()) != set(resnet20.graph.sizes.values())


@pytest.mark.parametrize(
    ("model", "arguments"),
    [("resnet20", {}), ("resnet20", {"shortcut": "projection"}), ("torchvision/resnet18", {})],
)
def test_inner_layers_leaves_the_residual_stream(model: str, arguments: dict[str, object]) -> None:
    traced = traced_model(model, **arguments)
    widths = widths_in(ROOT / "search_spaces" / "inner_layers.yaml", traced, "0.5")
    for name, size in traced.graph.sizes.items():
        inner = re.fullmatch(r"layer\d\.\d\.conv1", name)
        assert widths[name] < size if inner else widths[name] == size


def test_tied_stages_keep_one_share_a_stage(resnet20: Traced) -> None:
    widths = widths_in(ROOT / "search_spaces" / "tied_stages.yaml", resnet20, "0.5")
    for stage in "123":
        assert len({widths[f"layer{stage}.{block}.conv1"] for block in range(3)}) == 1
    assert widths["conv1"] == 16 and widths["layer3.0.conv1"] < 64


def test_gentle_leaves_no_bottleneck(resnet20: Traced) -> None:
    widths = widths_in(ROOT / "search_spaces" / "gentle.yaml", resnet20, "0.3")
    assert all(width >= max(4, 0.3 * resnet20.graph.sizes[name]) for name, width in widths.items())


# ------------------------------------------------------------------------------------------------- habits


def texts() -> list[Path]:
    """Return the tracked text files; outside of a checkout, those that a release holds."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        )
        files = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        folders = ("archsearch", "docs", "scripts", "search_spaces", "tests")
        files = [
            *PAGES,
            *(path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()),
        ]
    kinds = {".md", ".py", ".yaml", ".yml", ".json", ".toml", ".txt", ".csv", ""}
    return [path for path in files if path.suffix in kinds and path.exists()]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    place = re.compile(r"(?<![\w.])/(?:home|root|Users|opt|work|mnt|private|workspace)/\w")
    found = {name_of(path): m[0] for path in texts() if (m := place.search(path.read_text(encoding="utf-8")))}
    assert not found
