from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from archsearch.errors import UsageError
from archsearch.models import MODELS, resolve
from archsearch.models.resnet import ResNet, ZeroPadShortcut

DATA = Path(__file__).parent / "data"
ZOO = [name for name in MODELS if MODELS[name].__module__.startswith("archsearch.")]
TOO_SMALL_AT_8 = {"lenet5"}
PUBLISHED = [
    (table, name, figures)
    for table, rows in yaml.safe_load((DATA / "published_models.yaml").read_text()).items()
    for name, figures in rows.items()
]


def count_macs(model: nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *shape, device="meta"))
    flops: int = counter.get_total_flops()
    return flops // 2


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def agrees(count: int, published: int | str) -> bool:
    """Compare with an exact figure, or with ``"1.71M"`` at the digits it prints."""
    if isinstance(published, int):
        return count == published
    digits, unit = published[:-1], {"K": 1e3, "M": 1e6}[published[-1]]
    decimals = len(digits.partition(".")[2])
    return f"{count / unit:.{decimals}f}" == digits


def layout(model: nn.Module) -> list[str]:
    return [f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items()]


def test_the_zoo_is_the_promised_one() -> None:
    assert set(ZOO) == {
        *("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
        *("preresnet56", "preresnet110", "preresnet164", "densenet40", "densenet_bc100"),
        *("vgg11", "vgg13", "vgg16", "vgg19", "mobilenet_v1", "mobilenet_v2"),
        *("lenet_300_100", "lenet5", "conv2", "conv4", "conv6"),
    }


@pytest.mark.parametrize("name", ZOO)
def test_a_models_function_has_the_models_name(name: str) -> None:
    assert MODELS[name].__name__ == name
    assert MODELS[name].__doc__


@pytest.mark.parametrize(("table", "name", "figures"), PUBLISHED, ids=[f"{t}-{n}" for t, n, _ in PUBLISHED])
def test_sizes_are_the_published_ones(table: str, name: str, figures: dict[str, Any]) -> None:
    source = resolve(name)
    assert source.input_shape is not None
    with torch.device("meta"):
        model = source.build()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    # Every normalisation that reads the stream is followed by a selection there: all in DenseNet-40, the
    # first of each block and the last one in PreResNet.
    selected = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and path.rpartition(".")[2] in ("bn", "bn1")
    ]
    extra = sum(norm.num_features for norm in selected) if figures.get("with_selection") else 0
    if "params" in figures:
        assert agrees(count_params(model) + extra, figures["params"])
    if "macs" in figures:
        assert agrees(count_macs(model, *source.input_shape), figures["macs"])
    if "norm_channels" in figures:
        assert sum(norm.num_features for norm in norms) == figures["norm_channels"]


def test_projection_shortcuts_cost_what_two_1x1_convolutions_cost() -> None:
    with torch.device("meta"):
        pad, projection = MODELS["resnet56"](), MODELS["resnet56"](shortcut="projection")
    extra = 16 * 32 * 16 * 16 + 32 * 64 * 8 * 8
    assert count_macs(projection, 3, 32, 32) - count_macs(pad, 3, 32, 32) == extra
    assert count_params(projection) - count_params(pad) == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def test_conv_nets_have_the_convolution_weights_of_frankle_and_carbin() -> None:
    # Figure 2: 38K, 260K and 1.1M; here worked out by hand.
    by_hand = {"conv2": 38_592, "conv4": 259_776, "conv6": 1_144_512}
    for name, expected in by_hand.items():
        model = MODELS[name]()
        weights = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d)]
        assert sum(weights) == expected


def test_mobilenet_v2_has_the_parameters_of_torchvisions() -> None:
    from torchvision.models import mobilenet_v2

    with torch.device("meta"):
        assert count_params(MODELS["mobilenet_v2"]()) == count_params(mobilenet_v2(num_classes=10))


def test_mobilenet_v1_has_the_parameters_of_timms() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model("mobilenetv1_100", num_classes=10)
        assert count_params(MODELS["mobilenet_v1"]()) == count_params(theirs)


def test_mobilenet_v2_at_32_works_like_the_published_one_at_128() -> None:
    # Behind the two strides that ours leaves out both have the same maps. Up to the second of them, which
    # is in the first 24-channel block, theirs has 64x64 maps where ours has 32x32.
    from torchvision.models import mobilenet_v2

    with torch.device("meta"):
        ours, theirs = MODELS["mobilenet_v2"](), mobilenet_v2(num_classes=10)
    stem, depthwise, project, expand = 3 * 32 * 9, 32 * 9, 32 * 16, 16 * 96
    more = (stem + depthwise + project + expand) * (64 * 64 - 32 * 32)
    assert count_macs(theirs, 3, 128, 128) - count_macs(ours, 3, 32, 32) == more


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_vgg_has_the_convolutions_of_torchvisions(name: str) -> None:
    from torchvision import models

    with torch.device("meta"):
        ours, theirs = MODELS[name](head="linear"), models.get_model(f"{name}_bn")
    assert count_macs(ours, 3, 32, 32) == count_macs(theirs.features, 3, 32, 32) + 512 * 10


@pytest.mark.parametrize("name", ZOO)
def test_a_model_trains_on_its_native_input(name: str) -> None:
    source = resolve(name)
    assert source.input_shape is not None
    model = source.build()
    out = model(torch.randn(2, *source.input_shape))
    assert out.shape == (2, 10)
    out.square().sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path


@pytest.mark.parametrize("name", sorted(set(ZOO) - TOO_SMALL_AT_8))
def test_a_model_trains_on_8x8_digits(name: str) -> None:
    source = resolve(name)
    model = source.build(**source.arguments_for(num_classes=7, in_channels=1, input_size=8))
    out = model(torch.randn(2, 1, 8, 8))
    assert out.shape == (2, 7)
    out.square().sum().backward()


@pytest.mark.parametrize("name", ZOO)
def test_a_model_runs_on_28x28_grey_images(name: str) -> None:
    source = resolve(name)
    with torch.device("meta"):
        model = source.build(**source.arguments_for(in_channels=1, input_size=28)).eval()
        assert model(torch.empty(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize("name", ZOO)
def test_two_builds_under_one_seed_are_equal_and_under_two_seeds_are_not(name: str) -> None:
    def built(seed: int) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MODELS[name]().state_dict()

    first, again, other = built(3), built(3), built(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ZOO)
def test_names_and_shapes_in_a_state_dict_are_stable(name: str) -> None:
    # Weights files and architecture files name layers: a change here breaks those that exist.
    # After a deliberate change: python tests/test_models.py > tests/data/model_layouts.yaml
    golden = yaml.safe_load((DATA / "model_layouts.yaml").read_text())[name]
    with torch.device("meta"):
        lines = layout(MODELS[name]())
    assert (len(lines), lines[-1]) == (golden["tensors"], golden["last"])
    assert digest(lines) == golden["sha256"]


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["resnet20", "vgg11", "conv2", "lenet_300_100", "mobilenet_v2", "densenet40"]),
    num_classes=st.integers(1, 200),
    in_channels=st.integers(1, 12),
    input_size=st.integers(4, 96),
)
def test_classes_channels_and_sizes_are_free(
    name: str, num_classes: int, in_channels: int, input_size: int
) -> None:
    source = resolve(name)
    with torch.device("meta"):
        model = source.build(**source.arguments_for(num_classes, in_channels, input_size)).eval()
        out = model(torch.empty(1, in_channels, input_size, input_size))
    assert out.shape == (1, num_classes)


def test_a_zero_padded_shortcut_puts_half_of_the_zeros_in_front() -> None:
    x = torch.arange(2.0 * 5 * 5).reshape(1, 2, 5, 5) + 1
    y = ZeroPadShortcut(2, 5, stride=2)(x)
    assert y.shape == (1, 5, 3, 3)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3, 4]].any()


def test_a_residual_stream_may_lose_channels() -> None:
    """A ResNet whose stages have 12, 28 and 60 channels: 4 fewer in the stem, the padding as before."""
    model = MODELS["resnet20"]()
    assert isinstance(model, ResNet)
    lost = 4
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                fewer = child.in_channels - (lost if child is not model.conv1 else 0)
                setattr(
                    module,
                    child_name,
                    nn.Conv2d(fewer, child.out_channels - lost, 3, child.stride[0], 1, bias=False),
                )
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, child_name, nn.BatchNorm2d(child.num_features - lost))
    model.fc = nn.Linear(64 - lost, 10)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("name", "norm_weight"), [("resnet20", 1.0), ("vgg16", 0.5), ("preresnet56", 0.5)])
def test_fresh_weights_follow_the_published_rule(name: str, norm_weight: float) -> None:
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == norm_weight).all()
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm1d):
            assert (module.weight == 1).all()


def test_vgg16_has_a_hidden_layer_in_its_head_unless_told_otherwise() -> None:
    hidden, linear = MODELS["vgg16"](), MODELS["vgg16"](head="linear")
    assert count_params(hidden) - count_params(linear) == 512 * 512 + 512 + 2 * 512


def test_a_small_vgg_leaves_out_only_the_poolings_that_do_not_fit() -> None:
    def poolings(size: int) -> int:
        model = MODELS["vgg11"](input_size=size)
        return sum(isinstance(module, nn.MaxPool2d) for module in model.modules())

    assert [poolings(size) for size in (32, 16, 15, 8, 7, 4, 1)] == [4, 4, 3, 3, 2, 2, 0]
    assert layout(MODELS["vgg11"](input_size=8)) == layout(MODELS["vgg11"]())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet20", {"shortcut": "conv"}, "shortcut is 'conv': it must be 'pad' or 'projection'"),
        ("vgg11", {"head": "fc"}, "head is 'fc': it must be 'linear' or 'hidden'"),
        ("lenet5", {"input_size": 15}, "lenet5 needs images of 16x16 or more, and input_size is 15"),
        ("conv6", {"input_size": 7}, "conv6 needs images of 8x8 or more, and input_size is 7"),
    ],
)
def test_impossible_arguments_say_what_is_possible(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        MODELS[name](**arguments)


if __name__ == "__main__":
    rows = {}
    for zoo_name in ZOO:
        zoo_lines = layout(MODELS[zoo_name]())
        rows[zoo_name] = {"tensors": len(zoo_lines), "last": zoo_lines[-1], "sha256": digest(zoo_lines)}
    print("# Names and shapes of the tensors in each zoo model; see test_models.py.")
    print(yaml.safe_dump(rows, sort_keys=True), end="")
