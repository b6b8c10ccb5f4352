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


@pytest.mark.parametrize("failing", ["start", "run"])
def test_an_engine_that_fails_says_why_in_one_line(failing: str) -> None:
    def broken() -> None:
        raise RuntimeError("no kernel for this\nwhere: somewhere")

    def start(model_bytes: bytes) -> Engine:
        if failing == "start":
            broken()
        return Engine(broken, list)

    with pytest.raises(UsageError, match=r"cannot run the network \(no kernel for this\): give another --ru"):
        start_engine(random_block(0, 4, 6), EXAMPLE, start)


def test_running_out_of_memory_is_not_called_a_network_that_cannot_run() -> None:
    def start(model_bytes: bytes) -> Engine:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        start_engine(random_block(0, 4, 6), EXAMPLE, start)


class TensorCores(nn.Module):
    """Layers that multiply as a GPU does in the precision that torch was told: TF32 has ten bits."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        told = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        in_tf32 = told == "tf32" and not torch.compiler.is_exporting()
        for layer in self.layers:
            weight = layer.weight
            x = torch.conv2d(ten_bits(x), ten_bits(weight)) if in_tf32 else torch.conv2d(x, weight)
        return x


def ten_bits(values: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def off_by(share: float) -> Any:
    """Return a way to start an engine whose outputs are so far from the exact ones."""

    def start(model_bytes: bytes) -> Engine:
        right = started(model_bytes)
        return Engine(right.call, lambda: [(1 + share) * tensor for tensor in right.outputs()])

    return start


def test_an_engine_is_compared_with_true_float32_and_in_tf32_may_be_as_far_as_torch_is() -> None:
    model = TensorCores(12).eval()
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    assert before[0] == "tf32"  # torch's default
    expected = module.expectation(model, EXAMPLE, tf32=True)
    tolerance = expected.tolerance
    with torch.inference_mode():
        rounded = difference([model(EXAMPLE)], expected.outputs)
    assert 3e-4 < rounded < 2e-2
    assert tolerance == max(1e-3, 4 * rounded)
    assert module.expectation(model, EXAMPLE, tf32=False).tolerance == 1e-3
    after = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    assert after == before

    start_engine(model, EXAMPLE, off_by(0.9 * tolerance), tf32=True)
    for share, tf32 in ((1.1 * tolerance, True), (1.2e-3, False)):
        with pytest.raises(UsageError, match="differs from torch's"):
            start_engine(model, EXAMPLE, off_by(share), tf32=tf32)


def test_what_half_precision_may_cost_depends_on_the_network() -> None:
    shallow, deep = TensorCores(1).eval(), TensorCores(40).eval()
    of_shallow, of_deep = (
        module.expectation(model.bfloat16(), EXAMPLE.bfloat16(), tf32=False) for model in (shallow, deep)
    )
    assert of_shallow.tolerance == 2e-1
    assert 2e-1 <= of_deep.tolerance <= 5e-1
    exact = shallow.float()(EXAMPLE.bfloat16().float())  # of the weights as they were rounded
    torch.testing.assert_close(of_shallow.outputs[0], exact.detach())
    with torch.no_grad():
        for parameter in shallow.parameters():
            parameter.mul_(6e4)
    assert module.expectation(shallow.half(), EXAMPLE.half(), tf32=False).overflown


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
