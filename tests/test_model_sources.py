from __future__ import annotations

import io
import sys
import urllib.error
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from archsearch.errors import IntegrityError, ResourceError, UnknownNameError, UsageError
from archsearch.models import MODELS, ModelSource, list_models, pretrained, resolve

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "my_net.py"

FACTORIES = """
from torch import nn
def net(num_classes=4, in_chans=2): return nn.Conv2d(in_chans, num_classes, 1)
def fixed(): return nn.Conv2d(3, 5, 1)
def shaped(): return nn.Conv2d(3, 5, 1)
shaped.input_shape = (3, 20, 24)
def open_net(num_classes, **rest): return nn.Linear(1, num_classes)
def fails(): raise RuntimeError("no luck")
def returns_text(): return "net"
def misshaped(): return nn.Identity()
misshaped.input_shape = (3, 32)
class Net(nn.Module): pass
built = nn.ReLU()
number = 7
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code(name: str) -> ModelSource:
    return resolve(name, trust_code=True)


def message(kind: type[Exception], call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """Return the text of the error that ``call`` raises; it must be one line of a readable length."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert 20 < len(text) < 500
    return text


# The zoo


def test_a_zoo_model_knows_its_native_input_and_classes() -> None:
    assert resolve("resnet56").input_shape == (3, 32, 32)
    assert resolve("lenet5").input_shape == (1, 28, 28)
    assert {resolve(name).num_classes for name in MODELS} == {10}


def test_resolving_again_by_the_canonical_name_gives_the_same_source() -> None:
    for name in ("resnet20", "torchvision/ResNet18"):
        source = resolve(name)
        assert resolve(source.name) == source


def test_arguments_are_spelled_as_the_factory_spells_them() -> None:
    assert resolve("resnet20").arguments_for(100, 1, 8) == {"num_classes": 100, "in_channels": 1}
    assert resolve("vgg11").arguments_for(input_size=8) == {"input_size": 8}
    assert resolve("torchvision/vit_b_16").arguments_for(2, input_size=32) == {
        "num_classes": 2,
        "image_size": 32,
    }
    assert resolve("resnet20").arguments_for() == {}


@pytest.mark.parametrize("what", ["num_classes", "in_channels", "input_size"])
@pytest.mark.parametrize("number", [0, -3])
def test_sizes_that_are_not_positive_are_refused(what: str, number: int) -> None:
    text = message(UsageError, resolve("vgg11").arguments_for, **{what: number})
    assert text == f"{what} is {number}: it must be 1 or more"


def test_an_argument_that_a_model_does_not_take_is_refused_with_those_it_takes() -> None:
    text = message(UsageError, resolve("resnet56").build, widht=3)
    assert text == "resnet56 takes no argument 'widht': it takes num_classes, in_channels, shortcut"


def test_a_value_that_a_model_cannot_be_built_with_is_one_line() -> None:
    assert "num_classes='ten'" in message(UsageError, resolve("resnet20").build, num_classes="ten")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet57", "resnet56"),
        ("densnet40", "densenet40"),
        ("resnet50", "torchvision/resnet50"),
        ("torchvision/resnet51", "torchvision/resnet50"),
        ("ReSNet56", "resnet56"),
        ("", "path/file.py:factory"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    assert near in message(UnknownNameError, resolve, name)


def test_models_are_listed_by_pattern() -> None:
    assert list_models("resnet*") == ["resnet110", "resnet20", "resnet32", "resnet44", "resnet56"]
    assert "torchvision/resnet50" in list_models("*resnet*")
    assert not [name for name in list_models() if name.startswith("timm/")]


# torchvision


def test_every_torchvision_classifier_has_a_source() -> None:
    names = list_models("torchvision/*")
    assert len(names) >= 80
    for name in names:
        source = resolve(name)
        size = 299 if name.endswith("inception_v3") else 224
        assert source.input_shape == (3, size, size)
        assert source.num_classes == 1000
        assert source.takes is not None
        assert "num_classes" in source.takes


def test_segmentation_and_detection_are_not_classifiers() -> None:
    message(UnknownNameError, resolve, "torchvision/fcn_resnet50")


@pytest.mark.slow
# RegNet-Y 128GF has 2.6 GB of weights.
@pytest.mark.parametrize("name", sorted(set(list_models("torchvision/*")) - {"torchvision/regnet_y_128gf"}))
def test_every_torchvision_classifier_builds_for_other_classes(name: str) -> None:
    source = resolve(name)
    assert source.input_shape is not None
    # RegNet computes its widths in tensors, so it cannot be built without numbers.
    with torch.device("cpu" if "regnet" in name else "meta"):
        model = source.build(**source.arguments_for(num_classes=7)).eval()
    out = model.to("meta")(torch.empty(2, *source.input_shape, device="meta"))
    assert out.shape == (2, 7)


@pytest.mark.parametrize("name", ["torchvision/googlenet", "torchvision/inception_v3"])
def test_the_two_models_with_their_own_initialisation_build_without_a_warning(name: str) -> None:
    with torch.device("meta"):  # a warning would be an error
        assert resolve(name).build().training


def test_torchvision_cannot_change_the_input_channels() -> None:
    source = resolve("torchvision/resnet18")
    text = message(UsageError, source.arguments_for, in_channels=1)
    assert text.startswith("torchvision/resnet18 is fixed to 3 input channels and cannot have 1")
    assert source.arguments_for(in_channels=3) == {}


@pytest.mark.parametrize("word", ["weights", "progress", "wide"])
def test_arguments_can_neither_fetch_weights_nor_be_swallowed(word: str) -> None:
    # ConvNeXt's and MobileNet v3's classes would ignore any word that they do not know.
    for name in ("torchvision/resnet18", "torchvision/convnext_tiny", "torchvision/mobilenet_v3_small"):
        assert f"takes no argument '{word}'" in message(UsageError, resolve(name).build, **{word: "DEFAULT"})


# timm


def test_a_timm_model_builds_for_other_classes_and_channels() -> None:
    pytest.importorskip("timm")
    source = resolve("timm/resnet18.a1_in1k")
    assert (source.input_shape, source.num_classes) == ((3, 224, 224), 1000)
    with torch.device("meta"):
        model = source.build(**source.arguments_for(7, 1)).eval()
        assert model(torch.empty(1, 1, 64, 64)).shape == (1, 7)


def test_a_timm_model_with_a_fixed_input_is_told_the_size() -> None:
    pytest.importorskip("timm")
    source = resolve("timm/vit_tiny_patch16_224")
    with torch.device("meta"):
        model = source.build(**source.arguments_for(input_size=64)).eval()
        assert model(torch.empty(1, 3, 64, 64)).shape == (1, 1000)


def test_unknown_timm_names_and_tags_get_the_nearest() -> None:
    pytest.importorskip("timm")
    assert "timm/resnet18" in message(UnknownNameError, resolve, "timm/resnt18")
    assert "timm/resnet18.tv_in1k" in message(UnknownNameError, resolve, "timm/resnet18.tv_in2k")
    message(UnknownNameError, resolve, "timm/hf-hub/somebody")


@pytest.mark.parametrize("word", ["pretrained", "checkpoint_path", "pretrained_cfg_overlay"])
def test_arguments_cannot_make_timm_read_a_file_or_fetch_weights(word: str) -> None:
    pytest.importorskip("timm")
    assert f"'{word}'" in message(UsageError, resolve("timm/resnet18").build, **{word: True})


def test_timm_names_are_listed_when_asked_for() -> None:
    pytest.importorskip("timm")
    names = list_models("timm/resnet18*")
    assert "timm/resnet18" in names
    assert all(name.startswith("timm/resnet18") for name in names)


def test_without_timm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'archsearch[timm]'" in message(UsageError, resolve, "timm/resnet18")
    assert "pip install 'archsearch[timm]'" in message(UsageError, list_models, "timm/*")


# A user's own factory


def test_the_documented_example_builds_trains_and_tells_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parents[2])
    source = code("./docs/examples/my_net.py:my_net")
    assert source.name == "docs/examples/my_net.py:my_net"
    assert (source.input_shape, source.num_classes) == ((3, 32, 32), 10)
    model = source.build(**source.arguments_for(num_classes=3, in_channels=1))
    out = model(torch.randn(2, 1, 8, 8))
    assert out.shape == (2, 3)
    out.sum().backward()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert any(conv.groups == conv.in_channels > 1 for conv in convolutions)


@pytest.mark.parametrize("name", ["nets.py:net", "nets:net", "no_such.py:net", "os:system"])
def test_code_is_not_imported_without_trust(factories: Path, name: str) -> None:
    (factories / "nets.py").write_text("raise SystemExit('imported')")
    text = message(UsageError, resolve, name)
    assert "--trust-code" in text
    assert name in text


def test_a_factory_gets_the_arguments_that_its_signature_names(factories: Path) -> None:
    source = code("nets.py:net")
    assert source.arguments_for(7, 1, 8) == {"num_classes": 7, "in_chans": 1}
    assert source.num_classes == 4
    assert source.input_shape is None
    assert code("nets.py:fixed").arguments_for(7, 1, 8) == {}
    assert code("nets.py:open_net").arguments_for(7, 1) == {"num_classes": 7}
    assert "takes none" in message(UsageError, code("nets.py:fixed").build, num_classes=7)


def test_a_factory_with_an_input_of_its_own_refuses_other_channels(factories: Path) -> None:
    source = code("nets.py:shaped")
    assert source.input_shape == (3, 20, 24)
    assert "fixed to 3 input channels" in message(UsageError, source.arguments_for, in_channels=1)


def test_a_class_is_a_factory(factories: Path) -> None:
    assert type(code("nets.py:Net").build()).__name__ == "Net"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.py:net", "cannot read missing.py"),
        ("nest.py:net", "there is nets.py"),
        ("nets.py:nett", "did you mean net or"),
        ("nets.py:", "unknown factory in nets.py"),
        ("nets.py:built", "is a network: name a function that returns one"),
        ("nets.py:number", "is of type int"),
        ("nets.py:misshaped", "must be (channels, height, width)"),
        ("no_such_package.net:net", "cannot be imported: ModuleNotFoundError"),
        ("not/a/module:net", "'not/a/module' is no module"),
        (":net", "'' is no module"),
    ],
)
def test_a_wrong_place_is_one_clear_line(factories: Path, name: str, expected: str) -> None:
    assert expected in message(UsageError, code, name)


def test_a_file_without_its_factory_is_asked_for_it(factories: Path) -> None:
    assert "nets.py:factory" in message(UsageError, code, "nets.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\nx = = 2\n", "cannot be imported: SyntaxError: invalid syntax (broken.py, line 2)"),
        ("import math\n\nmath.sqrt(-1)\n", "broken.py cannot be imported: line 3: ValueError"),
        ("import nothing_like_this\n", "line 1: ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("import torch\n\nraise RuntimeError('two\\nlines')\n", "line 3: RuntimeError: two lines"),
        ("raise SystemExit(3)\n", "line 1: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_imported_says_where(factories: Path, text: str, expected: str) -> None:
    (factories / "broken.py").write_text(text)
    before = set(sys.modules)
    assert expected in message(UsageError, code, "broken.py:net")
    assert not [name for name in set(sys.modules) - before if "factory_" in name]


def test_a_factory_that_fails_or_returns_no_network_is_one_clear_line(factories: Path) -> None:
    text = message(UsageError, code("nets.py:fails").build)
    assert text == "nets.py:fails cannot be built: RuntimeError: no luck"
    assert "returned str" in message(UsageError, code("nets.py:returns_text").build)


def test_two_files_of_one_name_do_not_collide_and_an_edit_is_seen(factories: Path) -> None:
    other = factories / "other"
    other.mkdir()
    (other / "nets.py").write_text("from torch import nn\ndef net(): return nn.Tanh()\n")
    assert isinstance(code("nets.py:net").build(), nn.Conv2d)
    assert isinstance(code("other/nets.py:net").build(), nn.Tanh)
    (other / "nets.py").write_text("from torch import nn\ndef net(): return nn.GELU()\n")
    assert isinstance(code("other/nets.py:net").build(), nn.GELU)


def test_a_file_inside_the_current_directory_is_named_relative_to_it(factories: Path) -> None:
    assert code(f"{factories}/nets.py:net").name == "nets.py:net"
    assert code("nets.py:net") == code("./nets.py:net")


def test_a_module_in_the_current_directory_is_found_and_the_path_is_left_alone(factories: Path) -> None:
    (factories / "private_nets_of_a_test.py").write_text(FACTORIES)
    before = list(sys.path)
    (factories / "private_broken_of_a_test.py").write_text("1 / 0")
    assert "line 1: ZeroDivisionError" in message(UsageError, code, "private_broken_of_a_test:net")
    source = code("private_nets_of_a_test:net")
    assert source.name == "private_nets_of_a_test:net"
    assert isinstance(source.build(), nn.Conv2d)
    assert sys.path == before


# Published weights


class Response(io.BytesIO):
    """What ``torch.hub`` reads of an answer."""

    def info(self) -> Message:
        return Message()


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)


def published(monkeypatch: pytest.MonkeyPatch, weights: dict[str, torch.Tensor]) -> None:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: weights)


def test_published_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve("torchvision/squeezenet1_1")
    trained = source.build().state_dict()
    published(monkeypatch, trained)
    loaded = pretrained(source, "DEFAULT").state_dict()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)


def test_a_classifier_for_other_classes_stays_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve("torchvision/squeezenet1_1")
    trained = source.build().state_dict()
    published(monkeypatch, trained)
    loaded = pretrained(source, "IMAGENET1K_V1", num_classes=6).state_dict()
    assert loaded["classifier.1.weight"].shape == (6, 512, 1, 1)
    assert loaded["classifier.1.weight"].any()
    assert torch.equal(loaded["features.0.weight"], trained["features.0.weight"])


def test_weights_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve("torchvision/mobilenet_v2")
    with torch.device("meta"):
        trained = source.build().state_dict()
    published(monkeypatch, trained)
    text = message(UsageError, pretrained, source, "DEFAULT", width_mult=0.5)
    assert "features.0.0.weight is (16, 3, 3, 3) here and (32, 3, 3, 3) in the weights" in text


def test_weights_with_a_layer_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve("torchvision/googlenet")
    published(monkeypatch, source.build().state_dict())
    text = message(UsageError, pretrained, source, "DEFAULT", transform_input=True, aux_logits=False)
    assert "do not fit these arguments" in text
    assert "aux1" in text


def test_weights_trained_on_another_input_range_need_the_argument(offline: None) -> None:
    source = resolve("torchvision/googlenet")
    assert "transform_input=True" in message(UsageError, pretrained, source, "DEFAULT")


def test_unknown_weights_get_the_nearest() -> None:
    text = message(UnknownNameError, pretrained, resolve("torchvision/resnet50"), "IMAGENET1K_V3")
    assert "did you mean IMAGENET1K_V2 or IMAGENET1K_V1?" in text
    assert "--weights FILE" in message(UsageError, pretrained, resolve("resnet56"), "DEFAULT")


def test_without_a_network_the_error_says_where_the_weights_are(offline: None) -> None:
    text = message(ResourceError, pretrained, resolve("torchvision/squeezenet1_1"), "DEFAULT")
    assert "https://download.pytorch.org/models/squeezenet1_1" in text
    assert "no route" in text
    assert "--weights FILE" in text


def test_weights_that_are_not_the_published_ones_are_refused(
    offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.urlopen", lambda *args, **kwargs: Response(b"not weights"))
    text = message(IntegrityError, pretrained, resolve("torchvision/squeezenet1_1"), "DEFAULT")
    assert "gave what was never published: RuntimeError: invalid hash value" in text


def test_weights_of_timm_go_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    source = resolve("timm/resnet10t.c3_in1k")
    fetched = {}

    def load(model: nn.Module, **how: Any) -> None:
        fetched.update(how)

    monkeypatch.setattr("timm.models._builder.load_pretrained", load)
    assert isinstance(pretrained(source, "pretrained", num_classes=5), nn.Module)
    assert fetched["num_classes"] == 5
    assert fetched["pretrained_cfg"]["hf_hub_id"] == "timm/resnet10t.c3_in1k"
    assert timm.is_model_pretrained("resnet10t.c3_in1k")


def test_timm_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    text = message(ResourceError, pretrained, resolve("timm/resnet10t.c3_in1k"), "pretrained")
    assert "timm/resnet10t.c3_in1k" in text
    assert "no route at all" in text
    assert "pretrained" in message(UnknownNameError, pretrained, resolve("timm/resnet10t"), "DEFAULT")
