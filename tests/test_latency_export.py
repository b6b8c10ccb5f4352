from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archsearch.errors import UsageError
from archsearch.latency import export as module
from archsearch.latency.export import Engine, code_of, difference, start_engine

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("error")
EXAMPLE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A depthwise-separable block with a linear classifier: everything in it follows two widths."""

    def __init__(self, first: int, second: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, first, 3, stride)
        self.norm = nn.BatchNorm2d(first)
        self.depthwise = nn.Conv2d(first, first, 3, groups=first, bias=False)
        self.pointwise = nn.Conv2d(first, second, 1)
        self.classifier = nn.Linear(second, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.classifier(self.pointwise(self.depthwise(x)).mean((2, 3)))


class Constant(nn.Module):
    """A network whose code holds a width as a constant that no attribute shows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.hidden = [width]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(2, self.hidden[0], 144)


@pytest.fixture(autouse=True)
def exports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """Forget kept graphs; count the exports in full."""
    counted: list[nn.Module] = []
    whole = module.export

    def export(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        counted.append(model)
        return whole(model, *args, **kwargs)

    monkeypatch.setattr(module, "export", export)
    monkeypatch.setattr(module, "_graphs", type(module._graphs)())
    yield counted


def started(model_bytes: bytes) -> Engine:
    session = onnxruntime.InferenceSession(model_bytes, providers=["CPUExecutionProvider"])
    (name,) = (place.name for place in session.get_inputs())
    last: list[Tensor] = []

    def call() -> None:
        last[:] = map(torch.from_numpy, session.run(None, {name: EXAMPLE.numpy()}))

    return Engine(call, lambda: last)


def random_block(seed: int, *widths: int) -> nn.Module:
    torch.manual_seed(seed)
    block = Block(*widths)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.eval()


def test_networks_of_one_code_are_exported_once_and_each_computes_its_own(exports: list[nn.Module]) -> None:
    for seed, widths in enumerate([(4, 6), (8, 6), (3, 17), (4, 6)]):
        model = random_block(seed, *widths)
        (outputs,) = start_engine(model, EXAMPLE, started).outputs()
        with torch.no_grad():
            torch.testing.assert_close(outputs, model(EXAMPLE), rtol=1e-4, atol=1e-5)
    assert len(exports) == 1


def test_cells_with_other_input_channels_share_an_export(exports: list[nn.Module]) -> None:
    for channels in (3, 5, 1):
        model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)).eval()
        example = torch.randn(2, channels, 12, 12)

        def start(model_bytes: bytes, example: Tensor = example) -> Engine:
            session = onnxruntime.InferenceSession(model_bytes, providers=["CPUExecutionProvider"])
            last = session.run(None, {session.get_inputs()[0].name: example.numpy()})
            return Engine(lambda: None, lambda: [torch.from_numpy(array) for array in last])

        start_engine(model, example, start)
    assert len(exports) == 1


def test_a_flattening_takes_the_channels_that_come(exports: list[nn.Module]) -> None:
    for width in (4, 6):
        layers = nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5)
        start_engine(nn.Sequential(*layers).eval(), EXAMPLE, started)
    assert len(exports) == 1


def test_an_engine_gets_the_graph_that_people_deploy(exports: list[nn.Module]) -> None:
    """Else nothing is fused: as it is traced, a convolution without a bias has a computed one."""
    onnx = pytest.importorskip("onnx")
    seen: list[list[str]] = []

    def start(model_bytes: bytes) -> Engine:
        seen.append(sorted(node.op_type for node in onnx.load_from_string(model_bytes).graph.node))
        return started(model_bytes)

    models = [random_block(0, 4, 6), random_block(1, 5, 7)]
    for model in models:
        start_engine(model, EXAMPLE, start)
    assert len(exports) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(models[1], (EXAMPLE,), dynamo=True, opset_version=18, verbose=False)
    deployed = sorted(node.op_type for node in program.model_proto.graph.node)
    assert "BatchNormalization" not in deployed
    assert seen == [deployed, deployed]


def test_another_stride_is_another_code() -> None:
    one, other = random_block(0, 4, 6), random_block(0, 4, 6, 2)
    assert code_of(one, EXAMPLE) != code_of(other, EXAMPLE)
    assert code_of(one, EXAMPLE) == code_of(random_block(1, 7, 9), EXAMPLE)
    assert code_of(one, EXAMPLE) == code_of(one, EXAMPLE[:, :1])
    assert code_of(one, EXAMPLE) != code_of(one, EXAMPLE[..., 1:])
    assert code_of(one, EXAMPLE) != code_of(one, EXAMPLE[:1])
    assert code_of(one, EXAMPLE) != code_of(random_block(0, 4, 6).double(), EXAMPLE)


def test_a_kept_graph_that_does_not_fit_is_exported_anew(exports: list[nn.Module]) -> None:
    for width in (4, 6):
        model = Constant(width).eval()
        (outputs,) = start_engine(model, EXAMPLE, started).outputs()
        with torch.no_grad():
            torch.testing.assert_close(outputs, model(EXAMPLE), rtol=1e-4, atol=1e-5)
    assert len(exports) == 2


def test_an_engine_that_computes_something_else_is_refused() -> None:
    def wrong(model_bytes: bytes) -> Engine:
        right = started(model_bytes)
        return Engine(right.call, lambda: [1.1 * tensor for tensor in right.outputs()])

    with pytest.raises(UsageError, match=r"differs from torch's by 1.0e-01"):
        start_engine(random_block(0, 4, 6), EXAMPLE, wrong)


def test_a_network_that_no_exporter_takes_is_named() -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.linalg.eigvals(x[0, 0]).real.sum()

    with pytest.raises(UsageError, match="cannot be exported to ONNX"):
        start_engine(Strange().eval(), EXAMPLE, started)


def test_few_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sink:
        def SerializeToString(self) -> bytes:  # noqa: N802  (protobuf's name)
            return b""

    monkeypatch.setattr(module, "export", lambda *args, **kwargs: Sink())
    monkeypatch.setattr(module, "folded", lambda graph: graph)
    monkeypatch.setattr(module, "_without_tensors", lambda graph, tensors: graph)
    model = nn.Identity()
    for size in range(1, module.GRAPHS_KEPT + 10):
        example = torch.zeros(size, 1)
        engine = Engine(lambda: None, partial(list, [example]))
        start_engine(model, example, lambda content, engine=engine: engine)
    assert len(module._graphs) == module.GRAPHS_KEPT


def test_a_difference_is_a_share_of_the_largest_output() -> None:
    assert difference([torch.tensor([1.0, 99.0])], [torch.tensor([0.0, 100.0])]) == pytest.approx(0.01)
    assert difference([torch.zeros(2)], [torch.zeros(3)]) == float("inf")
    assert difference([], []) == 0
