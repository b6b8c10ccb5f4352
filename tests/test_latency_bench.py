from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from archsearch.cli.main import main
from archsearch.errors import UsageError
from archsearch.latency.bench import bench, computed_bytes, settled, short_names
from archsearch.latency.devices import Call, Cpu
from archsearch.latency.measure import Protocol
from archsearch.models import resolve
from archsearch.rebuild import Traced, trace_source

QUICK = Protocol(warm_up_s=0.002, warm_up_calls=2, blocks=3, block_s=0.002)


@pytest.fixture(scope="module")
def resnet20() -> Traced:
    return trace_source(resolve("resnet20"), {}, (3, 32, 32))


@pytest.fixture(scope="module")
def files(resnet20: Traced, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("architectures")
    sizes = resnet20.graph.sizes
    inner = {name for name in sizes if name.endswith("conv1") and "." in name}
    found = {}
    for label, keep in (("half", 2), ("quarter", 4)):
        widths = {name: size // keep if name in inner else size for name, size in sizes.items()}
        found[label] = directory / f"{label}.yaml"
        resnet20.architecture(widths).write(found[label])
    other = trace_source(resolve("resnet20"), {}, (3, 16, 16))
    found["other"] = directory / "other.yaml"
    other.architecture(other.graph.sizes).write(found["other"])
    return found


def test_architectures_stand_beside_their_reference(resnet20: Traced, files: dict[str, Path]) -> None:
    result = bench([files["half"], files["quarter"]], batch=2, protocol=QUICK)
    reference, half, quarter = result.entries
    assert [entry.name for entry in result.entries] == ["reference", "half.yaml", "quarter.yaml"]
    assert reference.macs == resnet20.cost.reference.macs
    assert quarter.macs < half.macs < reference.macs
    assert reference.measurement.ratio is None
    assert quarter.measurement.ratio is not None
    assert reference.throughput == pytest.approx(2000 / reference.measurement.median_ms)
    # Four bytes a weight, and two inputs' activations; computed, since torch counts nothing on a CPU.
    cost = resnet20.cost.reference
    assert reference.memory_bytes == 4 * cost.params + 2 * cost.peak_activation_bytes
    assert not reference.memory_measured
    assert reference.key is None
    assert half.key is not None
    header, first, *_ = result.table()
    assert first[header.index("MACs kept")] == "1.0000"


def test_names_are_as_long_as_they_must_be() -> None:
    assert short_names([Path("a/one.yaml"), Path("b/two.yaml")]) == ["one.yaml", "two.yaml"]
    assert short_names([Path("a/x.yaml"), Path("b/x.yaml")]) == ["a/x.yaml", "b/x.yaml"]
    assert short_names([Path("x.yaml"), Path("x.yaml")]) == ["x.yaml", "x.yaml"]


def test_half_precision_takes_half_the_memory(resnet20: Traced) -> None:
    cost = resnet20.cost.reference
    assert computed_bytes(cost, 3, "float16") * 2 == computed_bytes(cost, 3, "float32")


def test_memory_is_counted_where_every_call_takes_it_from_torch(
    resnet20: Traced, files: dict[str, Path]
) -> None:
    class Counting(Cpu):
        """A processor in the place of a GPU whose calls take 5000 bytes."""

        kind = "cuda"

        def working_bytes(self, call: Call) -> int:
            return 5000

        def capture(self, call: Call) -> Call:
            return call

    cost = resnet20.cost.reference
    result = bench([files["half"]], device=Counting(), dtype="bfloat16", batch=2, protocol=QUICK)
    assert result.entries[0].memory_bytes == 2 * (cost.params + 2 * 3 * 32 * 32) + 5000
    assert all(entry.memory_measured for entry in result.entries)
    # A replay takes nothing: what it needs was taken when it was recorded.
    result = bench([files["half"]], runtime="cudagraph", device=Counting(), batch=2, protocol=QUICK)
    assert result.entries[0].memory_bytes == computed_bytes(cost, 2, "float32")
    assert not any(entry.memory_measured for entry in result.entries)


def test_networks_of_two_references_are_not_compared(files: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"other.yaml is a resnet20 and .*half.yaml a resnet20, or their"):
        bench([files["half"], files["other"]], protocol=QUICK)
    with pytest.raises(UsageError, match="at least one architecture file"):
        bench([], protocol=QUICK)
    with pytest.raises(UsageError, match="--batch 0: at least 1"):
        bench([files["half"]], batch=0, protocol=QUICK)


def test_a_settled_network_keeps_its_activations_in_bounds() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(40):  # each convolution halves the activations, and no norm undoes it in eval mode
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)]
        nn.init.dirac_(layers[-2].weight)  # type: ignore[arg-type]
        layers[-2].weight.data.mul_(0.5)  # type: ignore[operator, union-attr]
    model = nn.Sequential(*layers).eval()
    example = torch.randn(4, 8, 6, 6)
    with torch.no_grad():
        assert model(example).abs().max() < 1e-10
        assert 0.5 < settled(model, (8, 6, 6))(example).std() < 2
        assert model(example).abs().max() < 1e-10  # the network itself is not touched


def test_the_command_shows_a_table_and_writes_what_was_asked_for(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, out = tmp_path / "latency.svg", tmp_path / "latency.json"
    words = ["bench", str(files["half"]), "--device", "cpu", "--blocks", "3"]
    assert main([*words, "--plot", str(plot), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "reference" in shown
    assert "half.yaml" in shown
    assert f"wrote {plot}" in shown
    assert plot.read_text(encoding="utf-8").startswith("<?xml")
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [network["name"] for network in record["networks"]] == ["reference", "half.yaml"]
    assert len(record["networks"][1]["ratios"]) == 3
    assert record["conditions"]["fingerprint"]["runtime"] == "torch"
    assert record["conditions"]["protocol"]["blocks"] == 3
    assert record["conditions"]["command"].startswith("archsearch bench")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--runtime", "cudagraph"], 2, "--runtime cudagraph: does not run on cpu"),
        (["--runtime", "torsh"], 2, "unknown runtime 'torsh'"),
        (["--dtype", "int8"], 2, "--dtype int8: torch on cpu runs float32, bfloat16, float16"),
        (["--device", "cuda:7"], 2, "there is no 'cuda:7' here"),
        (["--blocks", "1"], 2, "blocks 1: at least 3"),
        (["--plot", "picture.gif"], 2, "picture's name ends in"),
    ],
)
def test_a_wrong_option_gets_one_line(
    words: list[str], code: int, message: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(files["half"]), "--device", "cpu", *words]) == code
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_onnx_runtime_is_measured_from_the_command_line(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    words = ["bench", str(files["half"]), "--device", "cpu", "--blocks", "3", "--runtime", "onnxruntime"]
    assert main(words) == 0
    assert "half.yaml" in capsys.readouterr().out
