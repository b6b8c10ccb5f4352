from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from find_case import CountSteps
from torch import nn
from training_case import RECIPE, network, source

from archsearch.cli import main
from archsearch.compression.compress import Coding, compress
from archsearch.compression.container import read_compressed
from archsearch.compression.outcome import Compression
from archsearch.data import load_data
from archsearch.errors import UsageError
from archsearch.models import resolve
from archsearch.recipe import RECIPES
from archsearch.trainer import Trainer
from archsearch.training.callbacks import Callback

PUBLISHED = yaml.safe_load((Path(__file__).parent / "data" / "deep_compression.yaml").read_text())


def untrained(out: Path, model: nn.Module, **options: Any) -> Compression:
    return compress(model, Coding(budget="none", **options), None, out=out)


def trained(directory: Path, counter: Callback | None = None, **options: Any) -> Compression:
    callbacks = [counter] if counter is not None else []
    trainer = Trainer(source(), "cpu", directory / "store", callbacks=lambda label, place: callbacks)
    coding = Coding(recipe=RECIPE.with_(epochs=8), **{"conv_keep": 0.5, "linear_keep": 0.5, **options})
    return compress(network(dropout=0.0), coding, trainer, out=directory / "out")


def test_the_file_holds_the_network_to_the_last_bit(tmp_path: Path) -> None:
    found = trained(tmp_path)
    decoded = read_compressed(tmp_path / "out" / "weights.dc").state_dict()
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(decoded[name], tensor)
    assert found.stages[-1].nbytes == (tmp_path / "out" / "weights.dc").stat().st_size
    assert found.ratio == found.stages[0].nbytes / found.stages[-1].nbytes


def test_each_layer_keeps_its_share_and_has_few_values(tmp_path: Path) -> None:
    model = network()
    found = untrained(
        tmp_path, model, conv_keep=0.5, linear_keep=0.25, layer_keep={"0.weight": 0.75}, linear_bits=3
    )
    conv, linear = found.model[0].weight, found.model[5].weight
    assert int((conv != 0).sum()) == 54  # of 72
    assert int((linear != 0).sum()) == 108  # of 432
    assert len(linear.unique()) == 7 + 1
    assert [layer.values for layer in found.layers] == [
        54,
        7,
    ]  # fewer weights than 255 values stay as they are
    kept = conv != 0
    assert torch.equal(conv[kept], model[0].weight[kept])
    assert conv[~kept].abs().max() == 0
    assert model[0].weight[~kept].abs().max() <= conv[kept].abs().min()


def test_biases_norms_and_counters_stay_as_they_are(tmp_path: Path) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = untrained(tmp_path, model)
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in ("0.weight", "5.weight"))
    for name, tensor in model.state_dict().items():  # the caller's network is not changed
        assert torch.equal(tensor, before[name])


def test_a_weight_that_two_layers_share_stands_in_the_file_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 60))
    alone = untrained(tmp_path / "alone", model).stages
    model[2].weight = model[0].weight
    both = untrained(tmp_path / "both", model)
    assert alone[0].nbytes == 4 * (2 * 3600 + 120)
    assert both.stages[0].nbytes == 4 * (3600 + 120)
    assert both.stages[-1].nbytes < alone[-1].nbytes - 300
    decoded = read_compressed(tmp_path / "both" / "weights.dc").state_dict()
    assert torch.equal(decoded["0.weight"], decoded["2.weight"])
    assert torch.equal(decoded["2.weight"], both.model.state_dict()["2.weight"])


def test_the_stages_are_those_of_the_paper_and_each_takes_less(tmp_path: Path) -> None:
    stages = trained(tmp_path).stages
    assert [stage.name for stage in stages] == [
        "weights",
        "pruned",
        "pruned and trained",
        "weights shared",
        "centroids trained",
        "with relative indices",
        "Huffman coded",
        "the file, decoded",
    ]
    sizes = {stage.name: stage.nbytes for stage in stages}
    raw = 4 * (4 * 4 + 3) + 8  # norm and bias, and the norm's counter
    assert sizes["weights"] == 4 * (72 + 432) + raw
    assert sizes["pruned"] == 4 * (36 + 216) + raw
    assert sizes["weights shared"] == (36 * 8 + 256 * 32 + 216 * 5 + 32 * 32) / 8 + raw
    assert sizes["Huffman coded"] < sizes["with relative indices"]
    assert sizes["Huffman coded"] < sizes["the file, decoded"] < sizes["Huffman coded"] + 1500  # the header
    accuracies = [stage.accuracy for stage in stages]
    assert accuracies[-1] == accuracies[-2] == accuracies[4]


def test_the_pruned_weights_are_zero_and_the_shared_ones_few_after_training(tmp_path: Path) -> None:
    found = trained(tmp_path, linear_bits=2, steps=2)
    linear = found.model[5].weight
    assert int((linear != 0).sum()) == 216
    assert len(linear.unique()) == 3 + 1


def test_a_second_run_trains_nothing_and_writes_the_same_file(tmp_path: Path) -> None:
    counter = CountSteps()
    trained(tmp_path, counter)
    steps, first = counter.steps, (tmp_path / "out" / "weights.dc").read_bytes()
    assert steps == 2 * 2 * 6  # two trainings of two epochs, a quarter of eight
    trained(tmp_path, counter)
    assert counter.steps == steps
    assert (tmp_path / "out" / "weights.dc").read_bytes() == first


def test_results_are_written_as_tables(tmp_path: Path) -> None:
    found = trained(tmp_path, tune_epochs=1)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["stages"][-1]["nbytes"] == found.stages[-1].nbytes
    assert [layer["name"] for layer in results["layers"]] == ["0.weight", "5.weight"]
    page = (tmp_path / "out" / "results.md").read_text()
    assert "| the file, decoded |" in page
    assert f"{found.ratio:.2f}x" in page


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"conv_keep": 0}, "--conv-keep: 0 must be a share"),
        ({"layer_keep": {"5.weight": 1.5}}, "--layer-keep 5.weight: 1.5 must be a share"),
        ({"linear_bits": 9}, "--linear-bits 9: must be from 1 to 8"),
        ({"conv_index_bits": 0}, "--conv-index-bits 0: must be from 1 to 8"),
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"budget": "scratch-e"}, "--budget scratch-e: trains from scratch"),
        ({"centroid_lr": 0.0}, "--centroid-lr 0: must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Coding(**options)


def test_an_unknown_layer_and_missing_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--layer-keep 9\.weight: the network has 0\.weight, 5\.weight"):
        untrained(tmp_path, network(), layer_keep={"9.weight": 0.5})
    with pytest.raises(UsageError, match="give --data, or --budget none"):
        compress(network(), Coding(), None, out=tmp_path)


@pytest.mark.parametrize(
    ("model", "name", "kept"),
    [
        ("lenet_300_100", "LeNet-300-100", {"fc1.weight": 0.08, "fc2.weight": 0.09, "fc3.weight": 0.26}),
        (
            "lenet5",
            "LeNet-5",
            {"conv1.weight": 0.66, "conv2.weight": 0.12, "fc1.weight": 0.08, "fc2.weight": 0.19},
        ),
    ],
)
def test_fresh_weights_at_the_papers_shares_come_near_its_ratios(
    tmp_path: Path, model: str, name: str, kept: dict[str, float]
) -> None:
    # Trained weights are pruned in clumps, which the codes use; fresh ones are spread evenly.
    torch.manual_seed(0)
    found = untrained(tmp_path, resolve(model).build(), layer_keep=kept)
    published = PUBLISHED[name]
    assert found.stages[0].nbytes / 1000 == pytest.approx(published["original_kb"], rel=0.01)
    assert 0.8 * published["ratio"] < found.ratio < 1.1 * published["ratio"]


def test_the_commands_compress_and_decompress_and_evaluate_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--flops", "1.0", "--budget", "none", "--data", "digits", "--epochs", "3"]
    store = ["--store", str(tmp_path / "store")]
    assert main(["find", "--model", "lenet_300_100", *words, *store, "--out", str(run)]) == 0
    architecture, weights = str(run / "architecture.yaml"), str(run / "weights.safetensors")
    coding = ["--keep", "0.5", "--layer-keep", "fc3.weight=0.9", "--tune-epochs", "1"]
    assert main(["compress", architecture, "--weights", weights, *coding, *store]) == 0
    file = run / "architecture-compressed" / "weights.dc"
    assert f"wrote {file}" in capsys.readouterr().out
    assert main(["decompress", str(file), "--out", str(tmp_path / "w.safetensors")]) == 0
    key = read_compressed(file).architecture
    assert f"the weights of the architecture {key}" in capsys.readouterr().out
    assert main(["evaluate", architecture, "--weights", str(tmp_path / "w.safetensors")]) == 0
    last = json.loads((file.parent / "results.json").read_text())["stages"][-1]
    assert f"{last['accuracy']:.2f} % of 359" in capsys.readouterr().out


def test_the_commands_refuse_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged.dc").write_bytes(b"nothing")
    out = str(tmp_path / "w.safetensors")
    assert main(["decompress", str(tmp_path / "damaged.dc"), "--out", out]) == 4
    assert "is not a .dc file" in capsys.readouterr().err
    assert main(["decompress", str(tmp_path / "damaged.dc"), "--out", str(tmp_path / "w.pt")]) == 2
    assert ".safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_network_keeps_its_accuracy_at_a_twentieth_of_its_size(tmp_path: Path) -> None:
    data, recipe = load_data("digits", image_size=28), RECIPES["quick"].with_(epochs=6)
    trainer = Trainer(data, "cpu", tmp_path / "store")
    torch.manual_seed(0)
    model = resolve("lenet5").build(num_classes=10, in_channels=1, input_size=28)
    reference = trainer.train("reference", model, recipe, 0).accuracy
    found = compress(model, Coding(recipe=recipe, tune_epochs=6), trainer, out=tmp_path)
    assert found.ratio > 20
    accuracy = found.stages[-1].accuracy
    assert accuracy is not None
    assert accuracy > reference - 4  # of 359 images, with a standard error of a point
