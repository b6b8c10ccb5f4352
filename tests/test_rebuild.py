from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from find_case import ENVIRONMENT, FACTORY, MACS, PARAMS
from tiny_net import TinyNet, tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import archsearch
from archsearch.architecture import Architecture
from archsearch.errors import IntegrityError, SpecError, UsageError
from archsearch.models import MODELS, resolve
from archsearch.rebuild import Traced, example_input, load, load_weights, trace_module, trace_source
from archsearch.tensor_files import write_tensors


def _traced(name: str) -> Traced:
    source = resolve(name, trust_code=True)
    assert source.input_shape is not None
    return trace_source(source, {}, source.input_shape)


def _halved(traced: Traced) -> dict[str, int]:
    return {name: max(1, size // 2) for name, size in traced.graph.sizes.items()}


def _written(path: Path, name: str = FACTORY) -> Traced:
    """Write the architecture of half the widths and return the traced reference."""
    traced = _traced(name)
    traced.architecture(_halved(traced)).write(path)
    return traced


def _edited(path: Path, **changes: Any) -> Path:
    content = yaml.safe_load(path.read_text())
    del content["key"]
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path


def _macs(model: nn.Module, example: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(example)
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_a_written_file_gives_the_same_network_in_a_new_process(tmp_path: Path, name: str) -> None:
    path = tmp_path / "architecture.yaml"
    traced = _written(path, name)
    here, _ = traced.fresh(_halved(traced))
    code = (
        "import archsearch, json, sys\n"
        "model = archsearch.load(sys.argv[1])\n"
        "print(json.dumps({name: list(t.shape) for name, t in model.state_dict().items()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    there = json.loads(done.stdout)
    assert there == {name: list(tensor.shape) for name, tensor in here.state_dict().items()}
    assert list(there) == list(traced.model.state_dict())
    cost = Architecture.read(path).cost
    assert cost.params is not None
    assert cost.macs is not None
    assert sum(p.numel() for p in here.parameters()) == cost.params.value
    assert _macs(here, traced.example) == cost.macs.value


def test_a_loaded_network_is_fresh_in_train_mode_and_seeded(tmp_path: Path) -> None:
    path = tmp_path / "architecture.yaml"
    _written(path, "resnet20")

    def loaded(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return dict(archsearch.load(path).state_dict())

    first, again, other = loaded(1), loaded(1), loaded(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert load(path).training


def test_a_fresh_network_is_initialised_as_its_own_code_says_for_the_small_shapes(tmp_path: Path) -> None:
    traced = _traced(FACTORY)
    deviations = []
    for seed in range(20):
        torch.manual_seed(seed)
        model, sliced = traced.fresh({"conv1": 4, "conv2": 8})
        assert sliced == ()
        assert (model.get_parameter("bn1.weight") == 0.5).all()
        deviations.append(model.get_parameter("conv2.weight").std().item())
    # He et al., ICCV 2015, eq. 14: sqrt(2 / fan_out), and the fan-out is that of the small layer.
    assert sum(deviations) / len(deviations) == pytest.approx(math.sqrt(2 / (9 * 8)), rel=0.03)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_full_widths_give_the_factorys_own_network_bit_for_bit(name: str) -> None:
    traced = _traced(name)
    torch.manual_seed(3)
    expected = resolve(name).build()
    torch.manual_seed(3)
    model, sliced = traced.fresh(traced.graph.sizes)
    assert sliced == ()
    state = model.state_dict()
    assert list(state) == list(expected.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision/resnext50_32x4d", "torchvision/regnet_y_400mf"])
def test_full_and_half_widths_of_grouped_networks_count_as_the_cost_says(name: str) -> None:
    traced = trace_source(resolve(name), {}, (3, 64, 64))
    assert traced.cost.reference.params == sum(p.numel() for p in resolve(name).build().parameters())
    for widths in (traced.graph.sizes, _halved(traced)):
        model, _ = traced.fresh(widths)
        cost = traced.cost.of(widths)
        assert sum(p.numel() for p in model.parameters()) == cost.params
        assert _macs(model, traced.example) == cost.macs


def test_a_timm_network_goes_through_a_file(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    traced = trace_source(resolve("timm/resnet10t"), {"num_classes": 10}, (3, 64, 64))
    widths = _halved(traced)
    path = tmp_path / "architecture.yaml"
    traced.architecture(widths).write(path)
    model = load(path)
    assert sum(p.numel() for p in model.parameters()) == traced.cost.of(widths).params
    assert model.eval()(example_input((3, 64, 64))).shape == (1, 10)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_back_from_their_file(tmp_path: Path, suffix: str) -> None:
    path, weights = tmp_path / "architecture.yaml", tmp_path / f"weights{suffix}"
    traced = _written(path)
    model, _ = traced.fresh(_halved(traced))
    if suffix == ".pt":
        torch.save(model.state_dict(), weights)
    else:
        write_tensors(weights, model.state_dict())
    loaded = load(path, weights, trust_code=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_of_another_network_or_none_are_refused_in_one_line(tmp_path: Path) -> None:
    path, weights = tmp_path / "architecture.yaml", tmp_path / "weights.safetensors"
    traced = _written(path)
    write_tensors(weights, traced.model.state_dict())
    for wrong, kind in ((weights, IntegrityError), (tmp_path / "no.safetensors", UsageError)):
        with pytest.raises(kind) as caught:
            load(path, wrong, trust_code=True)
        assert str(wrong) in str(caught.value)
        assert "\n" not in str(caught.value)
    before = {name: tensor.clone() for name, tensor in traced.model.state_dict().items()}
    write_tensors(weights, {**before, "conv1.weight": torch.zeros(8, 2, 1, 1)})
    with pytest.raises(IntegrityError, match=r"conv1\.weight"):
        load_weights(traced.model, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in traced.model.state_dict().items())


def test_a_network_in_hand_shrinks_inherits_and_starts_afresh_and_stays_as_it_is() -> None:
    model = TinyNet(3, 2).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    traced = trace_module(model, example_input((2, 6, 6)))
    assert (traced.cost.reference.macs, traced.cost.reference.params) == (MACS, PARAMS)
    torch.manual_seed(0)
    fresh, unknown = traced.fresh({"conv1": 4, "conv2": 8})
    assert unknown == ()
    assert fresh.get_parameter("conv2.weight").shape == (8, 4, 3, 3)
    bound = 1 / math.sqrt(9 * 4)  # of nn.Conv2d's own reset_parameters, uniform in +-1/sqrt(fan_in)
    assert bound / 2 < fresh.get_parameter("conv2.weight").abs().max() <= bound
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_for_a_network_in_hand_loads_with_its_factory(tmp_path: Path) -> None:
    traced = trace_module(tiny(), example_input((2, 6, 6)))
    path = tmp_path / "architecture.yaml"
    traced.architecture({"conv1": 4, "conv2": 8}).write(path)
    assert load(path, factory=tiny).get_parameter("conv2.weight").shape == (8, 4, 3, 3)
    with pytest.raises(SpecError, match=r"architecture\.yaml: widths\.conv1: .* has no such group"):
        load(path, factory=lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3)))


def test_code_that_a_file_names_runs_only_with_trust(tmp_path: Path) -> None:
    path, trace = tmp_path / "architecture.yaml", tmp_path / "ran"
    _written(path)
    evil = tmp_path / "evil.py"
    evil.write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\nfrom tiny_net import tiny\n")
    _edited(path, model=f"{evil}:tiny")
    with pytest.raises(UsageError, match="--trust-code"):
        load(path)
    assert not trace.exists()
    load(path, trust_code=True)
    assert trace.exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"widths": {"conv1": {"width": 4, "size": 8}}}, r"widths\.conv2: is missing"),
        (
            {"widths": {"conv1": {"width": 4, "size": 8}, "conv3": {"width": 8, "size": 16}}},
            r"widths\.conv3: .* has no such group; did you mean conv",
        ),
        (
            {"widths": {"conv1": {"width": 4, "size": 9}, "conv2": {"width": 8, "size": 16}}},
            r"widths\.conv1\.size: is 9, but the group of .* has 8",
        ),
        ({"cost": {"macs": {"value": 7, "reference": MACS}}}, r"cost\.macs\.value: is 7, but .* has 5,208"),
        ({"cost": {"params": {"value": 7, "reference": 9}}}, r"cost\.params\.value: is 7, but"),
        ({"input_shape": [2]}, r"input_shape: .*fails on an example input"),
        ({"input_shape": [3, 6, 6]}, r"input_shape: .*expected input.* to have 2 channels"),
        ({"arguments": {"classes": 3}}, r"arguments.*: .* takes no argument 'classes': it takes num_classes"),
        (
            {"arguments": {"num_classes": "three"}},
            r"arguments.*: .* cannot be built with num_classes='three'",
        ),
    ],
)
def test_a_file_that_does_not_fit_its_model_is_refused_with_file_and_field(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "architecture.yaml"
    _written(path)
    with pytest.raises(SpecError, match=reason) as caught:
        load(_edited(path, **changes), trust_code=True)
    assert str(caught.value).startswith(str(path))


def test_an_input_on_which_a_network_fails_is_the_users_to_mend() -> None:
    with pytest.raises(UsageError, match=r"resnet20 on an input of \(3, 32\): the model fails"):
        trace_source(resolve("resnet20"), {}, (3, 32))


def test_tracing_from_a_name_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    _traced(FACTORY)
    assert torch.equal(torch.rand(1), expected)
