"""The command line: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from find_case import ENVIRONMENT, FACTORY
from torch import nn

from archsearch import files
from archsearch.cli import main
from archsearch.cli.commands import COMMANDS
from archsearch.rebuild import load

COMMAND = [sys.executable, "-m", "archsearch.cli"]
NOT_TRAINED = ["find", "--model", "resnet20", "--budget", "none"]


def _run(words: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def tiny_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The architecture file of the tiny network for the digits, halved."""
    words = ["find", "--model", FACTORY, "--trust-code", "--flops", "0.5", "--budget", "none"]
    assert main([*words, "--input-shape", "1,8,8", "--classes", "10", "--out", str(tmp_path / "found")]) == 0
    capsys.readouterr()
    return tmp_path / "found" / "architecture.yaml"


def _refused(words: Sequence[object], capsys: pytest.CaptureFixture[str], code: int, message: str) -> str:
    """Check that a command ends with this code and one line of error at the end; return what came before."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    *before, last = captured.err.splitlines()
    assert re.match("archsearch: error: .", last), captured.err
    assert re.search(message, last), last
    assert "a bug of archsearch" not in last
    assert not any("error" in line or "Traceback" in line for line in before)
    return "\n".join(before)


# ---- help and lists ----


@pytest.mark.parametrize("words", [[], ["find"], ["train"], ["evaluate"], ["show"], ["list"]])
def test_help_answers_in_half_a_second_without_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom archsearch.cli import main\n"
        "try:\n    main([*sys.argv[1:], '--help'])\n"
        "finally:\n"
        "    print('heavy:', sorted({'torch', 'numpy', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "heavy: []" in done.stderr
    assert "usage: archsearch" in done.stdout
    assert "%%" not in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_version_is_printed_with_and_without_an_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"archsearch (\d+\.\d+\.\d+\S*|unknown .*)\n", capsys.readouterr().out)


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "pattern", "expected"),
    [
        ("models", "resnet*", ["resnet110", "resnet20", "resnet32", "resnet44", "resnet56"]),
        ("models", "torchvision/resnet1?", ["torchvision/resnet18"]),
        ("models", "timm/resnet10*", ["timm/resnet10t", "timm/resnet101", "timm/resnet101c"]),
        ("pruners", "*", ["l1_norm", "random", "uniform"]),
        ("allocations", "*", ["global", "local"]),
        ("data", "*", ["cifar10", "digits", "fashion-mnist", "imagefolder"]),
        ("recipes", "*", ["cifar", "imagenet", "modern", "quick"]),
        ("budgets", "*", ["finetune", "none", "scratch-b", "scratch-e"]),
        ("presets", "resnet56*", ["resnet56-a", "resnet56-b"]),
    ],
)
def test_lists_name_what_there_is(
    kind: str, pattern: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", kind, pattern]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(expected) <= {line.split()[0] for line in lines}
    if kind != "models":
        assert all(len(line.split(maxsplit=1)) == 2 for line in lines)  # each has some words of explanation


# ---- wrong input ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fnd"], "unknown command 'fnd': did you mean find"),
        (["list", "model"], "unknown kind 'model': did you mean models"),
        (["list"], "required: KIND; see archsearch list --help"),
        (["show"], "give an architecture file, or --model NAME"),
        (["show", "x.yaml", "--model", "resnet20"], "give an architecture file, or --model NAME"),
        (["evaluate", "x.yaml"], "required: --weights; see archsearch evaluate --help"),
        (["find", "--modle", "resnet20"], "unknown option --modle: did you mean --model"),
        (["find", "--flop=0.5"], "unknown option --flop=0.5: did you mean --flops"),
        (["find", "--flops"], "--flops: expected one argument"),
        (["find", "--epochs", "ten"], "--epochs: invalid int value: 'ten'"),
        (["find", "--flops", "0.5"], "no model: give --model NAME"),
        (
            NOT_TRAINED,
            "nothing says how small: give --flops, .* --channels or --latency, or a --preset",
        ),
        (
            ["find", "--model", "resnet65", "--flops", "0.5"],
            "unknown model 'resnet65': did you mean resnet56",
        ),
        (["find", "--model", "resnet50", "--flops", "0.5"], "torchvision/resnet50"),
        (["find", "--model", "torchvision/resnet81", "--flops", "0.5"], "did you mean torchvision/resnet18"),
        (["find", "--model", "x.py:f", "--flops", "0.5"], "add --trust-code"),
        (["find", "--model", "no.py:f", "--trust-code", "--flops", "0.5"], r"cannot read no\.py"),
        (["find", "--model", "resnet20", "--preset", "resnet56-a"], "is for --model resnet56, not resnet20"),
        (["find", "--preset", "resnet56-c"], "unknown preset 'resnet56-c': did you mean resnet56-"),
        (["find", "--preset", "resnet56-a", "--flops", "0.5"], "has its own widths"),
        *(
            ([*NOT_TRAINED, "--flops", t], f"--flops {t}: give the share")
            for t in ("half", "-1", "nan", "1e999")
        ),
        ([*NOT_TRAINED, "--flops", "0"], "--flops 0: a target is above zero"),
        ([*NOT_TRAINED, "--flops", "2.5"], "--flops 2.5: a share that stays is at most 1"),
        ([*NOT_TRAINED, "--params", "150%"], "--params 150%: at most 100%"),
        (
            [*NOT_TRAINED, "--flops", "0.5", "--device", "gpu"],
            "there is no 'gpu' here; give auto or one of cpu",
        ),
        ([*NOT_TRAINED, "--flops", "0.5", "--weights", "no.pt"], r"--weights no\.pt: there is no such file"),
        ([*NOT_TRAINED, "--flops", "0.5", "--recipe", "cifr"], "unknown recipe 'cifr': did you mean cifar"),
        ([*NOT_TRAINED, "--flops", "0.5", "--set", "epoch=3"], "unknown field 'epoch': did you mean epochs"),
        ([*NOT_TRAINED, "--flops", "0.5", "--set", "epochs"], "--set epochs: give NAME=VALUE"),
        ([*NOT_TRAINED, "--flops", "0.5", "--set", "lr=fast"], "lr must be a number in"),
        ([*NOT_TRAINED, "--flops", "0.5", "--epochs", "0"], "epochs must be a whole number of at least 1"),
        ([*NOT_TRAINED, "--flops", "0.5", "--lr", "-1"], "lr must be a number in"),
        (
            [*NOT_TRAINED, "--flops", "0.5", "--method", "l1_nrm"],
            "unknown pruner 'l1_nrm': did you mean l1_norm",
        ),
        ([*NOT_TRAINED, "--flops", "0.5", "--allocation", "locl"], "'locl': did you mean local"),
        ([*NOT_TRAINED, "--flops", "0.5", "--budget", "scratch"], "'scratch': did you mean scratch-"),
        ([*NOT_TRAINED, "--flops", "0.5", "--finetune", "scratch-e"], "give finetune or finetune-published"),
        ([*NOT_TRAINED, "--flops", "0.5", "--budget-cap", "0.5"], "cap must be a number of at least 1"),
        ([*NOT_TRAINED, "--flops", "0.5", "--seeds", "0"], "--seeds 0: at least 1"),
        ([*NOT_TRAINED, "--flops", "0.5", "--classes", "0"], "num_classes is 0: it must be 1 or more"),
        (
            [*NOT_TRAINED, "--flops", "0.5", "--input-shape", "3x32x32"],
            "give whole numbers such as 3,224,224",
        ),
        ([*NOT_TRAINED, "--flops", "0.5", "--input-shape", "3,0,32"], "give whole numbers such as 3,224,224"),
        (
            [*NOT_TRAINED, "--flops", "0.5", "--input-shape", "3,32"],
            r"on an input of \(3, 32\): the model fails",
        ),
        ([*NOT_TRAINED, "--flops", "0.5", "--argument", "depth=3"], "takes no argument 'depth'"),
        ([*NOT_TRAINED, "--flops", "0.5", "--argument", "x=[1"], r"--argument x=\[1: give a plain value"),
        ([*NOT_TRAINED, "--flops", "0.5", "--min-keep", "2"], "min_keep 2"),
        ([*NOT_TRAINED, "--flops", "0.5", "--round-to", "0"], "round_to 0"),
        (
            [*NOT_TRAINED, "--flops", "0.5", "--data", "digit"],
            "unknown data set 'digit': did you mean digits",
        ),
        ([*NOT_TRAINED, "--flops", "0.5", "--data", "cifar10"], "cifar10: where is it\\? give --data-dir"),
        (["show", "--model", "resnet20", "--plot", "x.bmp"], r"x\.bmp: a picture's name ends in"),
        (["show", "--model", "resnet20", "--graph", "no/x.png"], "there is no directory no; create it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_get_one_line_that_says_what_would_do(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if words[0] == "find":
        words = ["find", "--out", str(tmp_path / "out"), "--store", str(tmp_path / "store"), *words[1:]]
    before = _refused(words, capsys, 2, message)
    assert before == ""
    assert not (tmp_path / "out").exists()


def test_a_data_directory_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["find", "--model", "resnet20", "--flops", "0.5", "--data", "cifar10"]
    _refused([*words, "--data-dir", tmp_path / "no"], capsys, 2, "no does not exist; check --data-dir")


def test_each_kind_of_trouble_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_file: Path
) -> None:
    garbage, other = tmp_path / "garbage.pt", tmp_path / "other.pt"
    garbage.write_bytes(b"no weights")
    torch.save(nn.Linear(2, 2).state_dict(), other)
    evaluate: list[object] = ["evaluate", tiny_file, "--trust-code", "--weights"]
    out: list[object] = ["--out", tmp_path / "out"]
    _refused([*NOT_TRAINED, *out, "--flops", "0.0001"], capsys, 6, "smallest allowed widths have")
    for weights in (garbage, other):
        _refused([*NOT_TRAINED, *out, "--flops", "0.5", "--weights", weights], capsys, 4, weights.name)
        _refused([*evaluate, weights], capsys, 4, weights.name)
    _refused(["show", tmp_path / "no.yaml"], capsys, 3, r"no\.yaml: .*No such file")
    _refused([*NOT_TRAINED, "--flops", "0.5", "--out", garbage], capsys, 8, r"garbage\.pt")
    _refused([*evaluate, tmp_path / "no.pt"], capsys, 2, r"there is no file .*no\.pt")
    _refused([*evaluate, garbage, "--device", "gpu"], capsys, 2, "there is no 'gpu' here")
    _refused(["train", tiny_file, "--trust-code", "--seeds", "0"], capsys, 2, "--seeds 0: at least 1")
    _refused(["train", tiny_file, "--trust-code", "--budget", "none"], capsys, 2, "trains nothing")
    _refused(["train", tiny_file, "--trust-code", "--budget", "finetune"], capsys, 2, "give --weights FILE")
    _refused(["train", tiny_file], capsys, 2, "--trust-code")


def test_a_loss_that_is_not_finite_ends_with_7(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_file: Path
) -> None:
    words = ["train", tiny_file, "--trust-code", "--lr", "1e30", "--store", tmp_path / "s", "--epochs", "3"]
    _refused([*words, "--out", tmp_path / "out"], capsys, 7, "training diverged.*smaller --lr")


HOSTILE = {
    "an alias bomb": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "a python object": "format: 1\nmodel: !!python/object/apply:os.system ['touch hacked']\n",
    "a huge width": "format: 1\nmodel: resnet20\ninput_shape: [3, 32, 32]\n"
    "widths: {conv1: {width: 99999999999, size: 16}}\n",
    "a negative width": "format: 1\nmodel: resnet20\ninput_shape: [3, 32, 32]\n"
    "widths: {conv1: {width: -1, size: 16}}\n",
    "weights in arguments": "format: 1\nmodel: torchvision/resnet18\narguments: {weights: DEFAULT}\n"
    "input_shape: [3, 32, 32]\nwidths: {conv1: {width: 1, size: 64}}\n",
    "an enormous network": "format: 1\nmodel: vgg16\narguments: {num_classes: 1000000000000}\n"
    "input_shape: [3, 32, 32]\nwidths: {conv1: {width: 1, size: 64}}\n",
    "an unknown field": "format: 1\nmodle: resnet20\ninput_shape: [3, 32, 32]\nwidths: {}\n",
    "not a mapping": "- 1\n- 2\n",
    "bytes": "\x00\x01\x02",
    "nothing": "",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_gets_one_line_from_every_command(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hostile.yaml").write_text(text)
    Path("weights.pt").write_bytes(b"")
    out = ["--out", "out", "--store", "store"]
    for words in (
        ["show", "hostile.yaml"],
        ["train", "hostile.yaml", *out],
        ["evaluate", "hostile.yaml", "--weights", "weights.pt"],
    ):
        _refused(words, capsys, 3, r"hostile\.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.yaml", "weights.pt"]


def test_a_bug_of_ours_is_one_line_and_with_debug_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ARCHSEARCH_DEBUG", raising=False)
    monkeypatch.setitem(COMMANDS, "list", lambda options: 1 / 0)
    assert main(["list", "models"]) == 1
    assert capsys.readouterr().err == (
        "archsearch: error: a bug of archsearch: ZeroDivisionError: division by zero; "
        "ARCHSEARCH_DEBUG=1 shows where\n"
    )
    monkeypatch.setenv("ARCHSEARCH_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["list", "models"])


def test_debug_shows_the_traceback_of_a_users_error_too() -> None:
    words = ["find", "--flops", "half"]
    assert "Traceback" not in _run(words).stderr
    assert "Traceback" in _run(words, ARCHSEARCH_DEBUG="1").stderr


# ---- what the commands do ----


def test_find_without_training_writes_a_file_that_loads_and_shows(
    tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(tiny_file, trust_code=True).eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    command = yaml.safe_load(tiny_file.read_text())["provenance"]["command"]
    assert command.startswith("archsearch find --model")
    assert main(["show", str(tiny_file), "--trust-code"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("conv1", "conv2", "Channels that stay", "torch's FLOP counter"))
    assert "verified: equal to the reference" in out
    assert not any(line != line.rstrip() for line in out.splitlines())


def test_a_command_of_any_length_is_recorded(tmp_path: Path) -> None:
    words = [*NOT_TRAINED, "--flops", "0.5", "--out", str(tmp_path), "--store", "x" * 1100]
    assert main(words) == 0
    command = files.read_json(tmp_path / "results.json")["conditions"]["command"]
    assert command.startswith("archsearch find --model resnet20")
    assert command.endswith("x …")


def test_show_draws_widths_and_graph(tiny_file: Path, tmp_path: Path) -> None:
    plot, graph = tmp_path / "plot.png", tmp_path / "graph.svg"
    words = ["show", str(tiny_file), "--trust-code", "--plot", str(plot), "--graph", str(graph)]
    assert main(words) == 0
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert b"<svg" in graph.read_bytes()[:1000]
    assert min(plot.stat().st_size, graph.stat().st_size) > 4000


def test_train_and_evaluate_agree_and_a_second_training_is_read_back(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trained"
    words = ["train", str(tiny_file), "--trust-code", "--epochs", "2", "--device", "cpu", "--out", str(out)]
    words += ["--store", str(tmp_path / "store")]
    assert main(words) == 0
    first = capsys.readouterr()
    assert "digits: 1,797 8x8 images" in first.err
    assert "epoch 2/2" in first.err
    assert all(f"wrote {out / name}" in first.out for name in ("weights.safetensors", "results.json"))
    accuracy = files.read_json(out / "results.json")["arms"][1]["accuracies"][0]
    weights = out / "weights.safetensors"
    bytes_before = weights.read_bytes()
    assert main(words) == 0
    assert "trained before, read from" in capsys.readouterr().err
    assert weights.read_bytes() == bytes_before
    assert main(["evaluate", str(tiny_file), "--trust-code", "--weights", str(weights)]) == 0
    assert f"digits: {accuracy:.2f} % of" in capsys.readouterr().out


def test_a_fine_tuned_training_goes_on_from_its_weights(tiny_file: Path, tmp_path: Path) -> None:
    words = ["train", str(tiny_file), "--trust-code", "--device", "cpu", "--store", str(tmp_path / "store")]
    assert main([*words, "--epochs", "4", "--out", str(tmp_path / "one")]) == 0
    weights = ["--weights", str(tmp_path / "one" / "weights.safetensors"), "--budget", "finetune"]
    assert main([*words, "--epochs", "4", *weights, "--out", str(tmp_path / "two")]) == 0
    one, two = (files.read_json(tmp_path / n / "results.json")["arms"][1] for n in ("one", "two"))
    assert two["epochs"] == 1
    assert two["accuracies"][0] > one["accuracies"][0] - 10


def test_find_says_how_it_compares_and_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["find", "--model", FACTORY, "--trust-code", "--flops", "0.5", "--epochs", "2", "--seeds", "2"]
    out = ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store"), "--device", "cpu"]
    assert main([*words, *out]) == 0
    captured = capsys.readouterr()
    for arm in ("reference", "uniform, scratch-b", "l1_norm, finetune", "l1_norm, scratch-b"):
        assert re.search(rf"{arm} .*\d+\.\d\d ± \d+\.\d\d", captured.out)
    assert captured.out.rstrip().endswith(f"wrote {tmp_path / 'out' / 'results.md'}")
    assert "reference, seed 1: epoch 2/2" in captured.err
    assert main([*words, *out]) == 0
    again = capsys.readouterr()
    assert again.out == captured.out
    assert "epoch 1/" not in again.err


def test_output_into_a_pipe_that_closes_early_is_no_error() -> None:
    for words in ("list models", "show --model lenet5", "--help"):
        line = f"{sys.executable} -m archsearch.cli {words} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), words


# ---- signals ----


def _interrupted(words: list[str], store: Path, signum: int) -> subprocess.CompletedProcess[str]:
    """Run until the first epoch's checkpoint is there, send the signal and wait."""
    process = subprocess.Popen(
        [*COMMAND, *words], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(store.glob("trainings/*/checkpoints/last.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signum)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_leaves_a_checkpoint_and_the_same_command_goes_on(
    tiny_file: Path, tmp_path: Path, signum: int, code: int
) -> None:
    store = tmp_path / "store"
    words = ["train", str(tiny_file), "--trust-code", "--epochs", "40", "--device", "cpu"]
    words += ["--store", str(store), "--out", str(tmp_path / "out")]
    stopped = _interrupted(words, store, signum)
    assert stopped.returncode == code, stopped.stderr
    assert stopped.stderr.splitlines()[-1].startswith("archsearch: error: ")
    assert "goes on" in stopped.stderr.splitlines()[-1]
    assert "Traceback" not in stopped.stderr
    done = len(re.findall(r"epoch \d+/40", stopped.stderr))
    assert 0 < done < 40
    rerun = _run(words)
    assert rerun.returncode == 0, rerun.stderr
    epochs = [int(number) for number in re.findall(r"epoch (\d+)/40", rerun.stderr)]
    assert epochs == list(range(done + 1, 41))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["arms"][1]["epochs"] == 40
