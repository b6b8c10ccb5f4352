"""Small networks with every structure that matters, and what is true of each, worked out by hand.

Sums of products are written out, layer by layer: ``out_pixels * kernel * in_channels * out_channels`` for the
multiply-adds of a convolution. Group sizes count units; a unit of a grouped convolution or of attention heads
is several channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from archsearch.gathers import add_gathers


@dataclass(frozen=True)
class Network:
    """A network, an input for it, and what tracing it has to find.

    ``groups`` are the units of each group in order of execution; ``frozen`` are the layers with channels that
    stay beside the classifier's, and how many.
    """

    factory: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: dict[str, int]
    macs: int
    params: int
    frozen: dict[str, int] = field(default_factory=dict)

    def build(self) -> Any:  # not a Module: tests look at layers by their names
        """Return the network, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.factory().eval()

    def example(self) -> Tensor:
        """Return the same input at every call."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, Network] = {}
"""Networks that shrink as they are."""


def _network(shape: tuple[int, ...], **facts: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def add(factory: type[nn.Module]) -> type[nn.Module]:
        NETWORKS[factory.__name__] = Network(factory, shape, **facts)
        return factory

    return add


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


@_network(
    (1, 3, 8, 8),
    groups={"conv1": 8, "conv2": 12},
    macs=64 * 9 * 3 * 8 + 16 * 9 * 8 * 12 + 12 * 10,
    params=9 * 3 * 8 + 2 * 8 + 9 * 8 * 12 + 2 * 12 + 12 * 10 + 10,
    frozen={"fc": 10},
)
class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(pooled(F.relu(self.bn2(self.conv2(x)))))


@_network(
    (1, 3, 8, 8),
    groups={"bn1": 6, "conv1": 4, "bn": 6},  # norms that gather are groups, the stream that they read stays
    macs=64 * (9 * 3 * 6 + 6 * 4 + 9 * 4 * 6) + 6 * 5,
    params=9 * 3 * 6 + 2 * 6 + 6 * 4 + 2 * 4 + 9 * 4 * 6 + 2 * 6 + 6 * 5 + 5,
    frozen={"stem": 6, "conv2": 6, "fc": 5},
)
class Gathering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 4, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)
        add_gathers(self, ["bn1", "bn"])

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.fc(pooled(F.relu(self.bn(x))))


@_network(
    (1, 3, 8, 8),
    groups={"stem": 8, "conv1": 6},  # conv2 writes to the residual stream, so it goes with the stem
    macs=64 * 9 * (3 * 8 + 8 * 6 + 6 * 8) + 8 * 5,
    params=9 * (3 * 8 + 8 * 6 + 6 * 8) + 2 * 8 + 2 * 6 + 2 * 8 + 8 * 5 + 5,
    frozen={"fc": 5},
)
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.fc(pooled(F.relu(y)))


@_network(
    (1, 3, 8, 8),
    groups={"a": 4, "b": 6, "c": 8},
    macs=64 * (9 * 3 * 4 + 3 * 6 + 10 * 8) + 8 * 5,
    params=9 * 3 * 4 + 4 + 3 * 6 + 6 + 2 * 10 + 10 * 8 + 8 + 8 * 5 + 5,
    frozen={"fc": 5},
)
class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(3, 6, 1)
        self.bn = nn.BatchNorm2d(10)  # over both branches
        self.c = nn.Conv2d(10, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(pooled(self.c(F.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1))))))


@_network(
    (1, 3, 8, 8),
    groups={"expand": 8, "squeeze": 4, "project": 6},
    macs=64 * (3 * 8 + 9 * 8 + 8 * 6) + 8 * 4 + 4 * 8 + 6 * 5,
    params=3 * 8 + 8 + 2 * 8 + 9 * 8 + 8 + (8 * 4 + 4) + (4 * 8 + 8) + 8 * 6 + 6 + 6 * 5 + 5,
    frozen={"fc": 5},
)
class InvertedBottleneck(nn.Module):
    """Depthwise and pointwise convolutions with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.hardswish(self.depthwise(F.relu6(self.bn(self.expand(x)))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc(pooled(self.project(x * gate)))


@_network(
    (1, 3, 8, 8),
    groups={"conv1": 2, "conv2": 3},  # 4 groups of 2 inputs and 3 outputs; a unit is one of each group
    macs=64 * (3 * 8 + 9 * 2 * 12 + 12 * 5),
    params=3 * 8 + 8 + 9 * 2 * 12 + 12 + 12 * 5 + 5,
    frozen={"conv3": 5},
)
class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.conv3 = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


@_network(
    (1, 3, 8, 8),
    groups={"conv1": 4, "conv2": 6},  # a unit of conv1 is one channel of each of the 2 shuffled halves
    macs=64 * (3 * 8 + 8 * 6) + 6 * 5,
    params=3 * 8 + 8 + 8 * 6 + 6 + 6 * 5 + 5,
    frozen={"fc": 5},
)
class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.conv2 = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.conv1(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(pooled(self.conv2(F.relu(x))))


@_network(
    (1, 3, 8, 8),
    groups={"conv1": 4, "fc1": 7},  # one channel of conv1 is 2 * 2 columns of fc1
    macs=64 * 9 * 3 * 4 + 16 * 7 + 7 * 5,
    params=9 * 3 * 4 + 4 + 16 * 7 + 7 + 7 * 5 + 5,
    frozen={"fc2": 5},
)
class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.fc1 = nn.Linear(4 * 2 * 2, 7)
        self.fc2 = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.max_pool2d(F.relu(self.conv1(x)), 4)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


@_network(
    (1, 3, 8, 8),
    groups={"stem": 4, "conv1": 6},
    macs=64 * 9 * 3 * 4 + 16 * 9 * (4 * 6 + 6 * 8) + 8 * 5,
    params=9 * (3 * 4 + 4 * 6 + 6 * 8) + 4 + 6 + 8 + 8 * 5 + 5,
    # Channels 0, 1, 6 and 7 of conv2 are added to zeros; 2 to 5 go with the stem.
    frozen={"conv2": 4, "fc": 5},
)
class PaddedShortcut(nn.Module):
    """Option A of He et al.: the shortcut of a wider stage is padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.fc(pooled(F.relu(self.conv2(F.relu(self.conv1(x))) + shortcut)))


@_network(
    (1, 3, 8, 8),
    groups={"stem": 8},  # what goes out of `again` goes into it
    macs=64 * (3 * 8 + 2 * 9 * 8 * 8) + 8 * 5,
    params=3 * 8 + 8 + 9 * 8 * 8 + 8 + 8 * 5 + 5,
    frozen={"fc": 5},
)
class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.again(x))
        return self.fc(pooled(x))


@_network(
    (1, 3),
    groups={"stem": 6},  # one matrix for both layers: its rows are the next one's columns
    macs=3 * 6 + 2 * 6 * 6 + 6 * 5,
    params=3 * 6 + 6 + (6 * 6 + 6) + 6 + 6 * 5 + 5,
    frozen={"fc": 5},
)
class SharedParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(F.relu(self.b(F.relu(self.a(F.relu(self.stem(x)))))))


@_network(
    (2, 8),
    groups={"encoder": 6},  # the decoder multiplies by the encoder's matrix, transposed
    macs=2 * (8 * 6 + 6 * 8),  # for the two inputs
    params=8 * 6 + 6 + 8,
    frozen={"encoder": 8},  # its columns, which are the outputs
)
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 6)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Any:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.shift)


@_network(
    (1, 3, 8, 8),
    groups={"kernel": 6},
    macs=36 * 9 * 3 * 6 + 6 * 5,
    params=9 * 3 * 6 + 6 + 6 * 5,
    frozen={"matrix": 5},
)
class Functional(nn.Module):
    """No layers at all: raw parameters in functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.scale = nn.Parameter(torch.randn(6, 1, 1))
        self.matrix = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Any:
        return pooled(torch.tanh(F.conv2d(x, self.kernel)) * self.scale) @ self.matrix


@_network(
    (1, 3, 8, 8),
    groups={"conv": 6, "b1": 4},
    macs=64 * 9 * 3 * 6 + 6 * 5 + 6 * 4 + 4 * 3,
    params=9 * 3 * 6 + 6 + (6 * 5 + 5) + (6 * 4 + 4) + (4 * 3 + 3),
    frozen={"a": 5, "b2": 3},
)
class TwoHeads(nn.Module):
    """A mapping of outputs, one of them in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.a = nn.Linear(6, 5)
        self.b1 = nn.Linear(6, 4)
        self.b2 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = pooled(F.relu(self.conv(x)))
        return {"a": self.a(x), "rest": (self.b2(F.relu(self.b1(x))), None)}


@_network(
    (1, 3, 8, 8),
    groups={"conv1": 8, "up": 6},
    macs=16 * 9 * 3 * 8 + 16 * 4 * 8 * 6 + 64 * 6 * 3,  # the transposed one: per input pixel
    params=9 * 3 * 8 + 8 + 4 * 8 * 6 + 6 + 6 * 3 + 3,
    frozen={"out": 3},
)
class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.out = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.up(F.relu(self.conv1(x)))))


@_network(
    (1, 3, 4, 4),
    # A depthwise transposed convolution goes with its input; 2 groups of 2 channels are tied.
    groups={"conv1": 6, "up": 2, "grouped": 2},
    macs=16 * 3 * 6 + 16 * 4 * 6 + 64 * 6 * 4 + 4 * 16 * 64 * 2 + 64 * 4 * 5,
    params=3 * 6 + 6 + 4 * 6 + 6 + 6 * 4 + 4 + 16 * 2 * 4 + 4 + 4 * 5 + 5,
    frozen={"out": 5},
)
class TransposedDepthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 1)
        self.depthwise = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6)
        self.up = nn.Conv2d(6, 4, 1)
        self.grouped = nn.ConvTranspose2d(4, 4, 4, stride=1, groups=2)
        self.out = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.up(self.depthwise(F.relu(self.conv1(x)))))
        return self.out(F.relu(self.grouped(x))[..., 1:9, 1:9])


@_network(
    (1, 3, 8, 8),
    groups={"conv1": 2, "conv2": 6},  # 4 groups of 2 channels; a unit is one of each
    macs=64 * (9 * 3 * 8 + 8 * 6) + 6 * 5,
    params=9 * 3 * 8 + 8 + 2 * 8 + 8 * 6 + 6 + 2 * 6 + 6 * 5 + 5,
    frozen={"fc": 5},
)
class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 8)
        self.conv2 = nn.Conv2d(8, 6, 1)
        self.norm2 = nn.GroupNorm(1, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.fc(pooled(F.relu(self.norm2(self.conv2(x)))))


@_network(
    (1, 10),
    groups={"fc1": 12, "fc2": 8},
    macs=10 * 12 + 12 * 8 + 8 * 5,
    params=10 * 12 + 12 + 2 * 12 + 12 * 8 + 8 + 8 + 8 * 5 + 5,
    frozen={"fc3": 5},
)
class LayerNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 12)
        self.norm1 = nn.LayerNorm(12)
        self.fc2 = nn.Linear(12, 8)
        self.norm2 = nn.RMSNorm(8)
        self.fc3 = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc3(F.gelu(self.norm2(self.fc2(F.gelu(self.norm1(self.fc1(x)))))))


@_network(
    (1, 6, 5),
    # The residual stream; one channel of each of 2 heads of queries, keys and values; the hidden layer.
    groups={"embed": 8, "qkv": 4, "fc1": 16},
    macs=6 * (5 * 8 + 8 * 24 + 8 * 8 + 8 * 16 + 16 * 8) + 2 * (2 * 6 * 6 * 4) + 8 * 3,
    params=5 * 8 + 8 + 2 * 16 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 16 + 16) + (16 * 8 + 8) + 8 * 3 + 3,
    frozen={"head": 3},
)
class Attention(nn.Module):
    """A transformer block with two heads, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        n, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, 2, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, tokens, -1))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


@_network(
    (2, 6, 5),
    groups={"embed": 8, "q": 4},  # a channel of each head of queries, keys and values
    macs=2 * (6 * (5 * 8 + 4 * 8 * 8) + 2 * (2 * 6 * 6 * 4) + 8 * 3),  # for the two inputs
    params=5 * 8 + 8 + 4 * (8 * 8 + 8) + 8 * 3 + 3,
    frozen={"head": 3},
)
class FusedAttention(nn.Module):
    """Queries, keys and values from layers of their own, and torch's fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        n, tokens, _ = x.shape
        q, k, v = (layer(x).reshape(n, tokens, 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head((x + self.out(mixed.transpose(1, 2).reshape(n, tokens, -1))).mean(1))


@_network(
    (1, 3, 8, 8),
    groups={"conv1": 4, "conv2": 6},  # a unit of conv1 is a channel and its gate
    macs=64 * (3 * 8 + 4 * 6) + 6 * 5,
    params=3 * 8 + 8 + 4 * 6 + 6 + 6 * 5 + 5,
    frozen={"fc": 5},
)
class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.conv2 = nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        value, gate = self.conv1(x).chunk(2, dim=1)
        return self.fc(pooled(F.relu(self.conv2(value * torch.sigmoid(gate)))))


@_network(
    (1, 3, 8, 8),
    groups={"conv1": 6, "aux1": 4},
    macs=64 * 3 * 6 + 6 * 5,  # the auxiliary head does not run in eval mode
    params=3 * 6 + 6 + 6 * 5 + 5 + (6 * 4 + 4) + 2 * 4 + (4 * 5 + 5),
    frozen={"fc": 5, "aux2": 5},
)
class Auxiliary(nn.Module):
    """A second classifier that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 1)
        self.fc = nn.Linear(6, 5)
        self.aux1 = nn.Conv2d(6, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.aux2 = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv1(x))
        main = self.fc(pooled(x))
        if self.training:
            return main, self.aux2(pooled(F.relu(self.norm(self.aux1(x)))))
        return main


@_network(
    (1, 2, 16),
    groups={"conv1": 6, "conv2": 4},
    macs=16 * 3 * 2 * 6 + 8 * 3 * 6 * 4 + 4 * 8 * 5,
    params=3 * 2 * 6 + 6 + 6 + 2 * 6 + 3 * 6 * 4 + 4 + 4 * 8 * 5 + 5,
    frozen={"fc": 5},
)
class OneDimensional(nn.Module):
    """Convolutions along one axis, and a slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.prelu = nn.PReLU(6)
        self.conv2 = nn.Conv1d(6, 4, 3, stride=2, padding=1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(torch.relu(self.conv2(self.prelu(self.norm(self.conv1(x))))).flatten(1))


@_network(
    (1, 3, 4, 4),
    groups={"conv1": 2, "conv2": 5},  # 8 channels become 2 of twice the height and width
    macs=16 * 3 * 8 + 64 * 2 * 5 + 5 * 4,
    params=3 * 8 + 8 + 2 * 5 + 5 + 5 * 4 + 4,
    frozen={"fc": 4},
)
class PixelShuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.conv2 = nn.Conv2d(2, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(pooled(F.relu(self.conv2(F.relu(F.pixel_shuffle(self.conv1(x), 2))))))


@_network(
    (1, 3, 8, 8),
    groups={"conv1": 8, "conv2": 6},
    macs=36 * 9 * 3 * 8 + 16 * 9 * 8 * 6 + 6 * 5,
    # Weight normalisation keeps a length for each output beside the direction (Salimans and Kingma, 2016).
    params=(9 * 3 * 8 + 8 + 8) + (9 * 8 * 6 + 6 + 6) + 6 * 5 + 5,
    frozen={"fc": 5},
)
class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.conv2 = parametrizations.weight_norm(nn.Conv2d(8, 6, 3))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(pooled(F.relu(self.conv2(F.relu(self.conv1(x))))))


# --- networks in which something stays ------------------------------------------------------------------


class UnequalParts(nn.Module):
    """Parts of 3 and 5 channels, with the sizes in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.a = nn.Conv2d(3, 6, 1)
        self.b = nn.Conv2d(5, 6, 1)

    def forward(self, x: Tensor) -> Any:
        a, b = torch.split(self.conv1(x), [3, 5], dim=1)
        return pooled(F.relu(self.a(a)) + F.relu(self.b(b)))


class MeasuredParts(nn.Module):
    """Parts of 3 and 5 channels, whose sizes the code reads from the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.a = nn.Conv2d(3, 6, 1)
        self.b = nn.Conv2d(5, 6, 1)

    def forward(self, x: Tensor) -> Any:
        a, b = torch.split(self.conv1(x), [self.a.in_channels, self.b.in_channels], dim=1)
        return pooled(F.relu(self.a(a)) + F.relu(self.b(b)))


class HardCoded(nn.Module):
    """The number of features before the classifier is a constant in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 1)
        self.conv2 = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 4)
        return self.fc(x.view(-1, 16))  # the constant


class Sorted(nn.Module):
    """Sorts the channels of one layer: an op without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 1)
        self.conv2 = nn.Conv2d(6, 4, 1)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.conv2(F.relu(self.conv1(x)))
        return self.fc(pooled(self.conv3(torch.sort(x, dim=1).values)))


class Recurrent(nn.Module):
    """An LSTM between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.hidden = nn.Linear(4, 7)
        self.fc = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(F.relu(self.hidden(self.lstm(self.embed(x))[0][:, -1])))


class TwoInputs(nn.Module):
    """Adds two images of different depth after a layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 1)
        self.right = nn.Conv2d(1, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, image: Tensor, depth: Tensor, scale: float = 1.0) -> Any:
        return self.fc(pooled(F.relu(self.left(image) + scale * self.right(depth))))


class Tokens(nn.Module):
    """Integer inputs through a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.position = nn.Parameter(torch.randn(1, 4, 6))
        self.fc = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Any:
        return self.fc((self.table(tokens) + self.position).mean(1))
