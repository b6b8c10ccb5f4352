from __future__ import annotations

import math

import pytest
import torch
from tiny_net import TinyNet
from torch import nn
from torch.nn import functional as F

from archsearch.errors import UsageError
from archsearch.sparsity.criteria import CRITERIA, Batch, shuffled
from archsearch.sparsity.initialisation import initialise, kept_deviation
from archsearch.sparsity.masks import Masks, magnitude, weight_names
from archsearch.sparsity.rule import Rule

NAMES = ("conv1.weight", "conv2.weight", "fc.weight")


def tiny(seed: int = 0) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet(3, 2)


def batch(images: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 2, 6, 6, generator=generator), torch.arange(images) % 3


@pytest.mark.parametrize("name", list(CRITERIA))
def test_a_criterion_scores_every_weight_the_same_every_time_and_changes_nothing(name: str) -> None:
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first, second = (CRITERIA[name]().score(model, NAMES, batch(), 3) for _ in range(2))
    assert tuple(first) == NAMES
    for key in NAMES:
        assert first[key].shape == before[key].shape
        assert (first[key] >= 0).all() and first[key].any() and not first[key].requires_grad
        assert torch.equal(first[key], second[key])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_snip_is_the_slope_of_the_loss_in_a_factor_on_each_weight() -> None:
    """Central differences, weight by weight: (L(w (1 + h)) - L(w (1 - h))) / 2 h."""
    model = tiny().double()
    images, labels = batch()
    images = images.double()
    scores = CRITERIA["snip"]().score(model, NAMES, (images, labels), 0)
    step = 1e-5
    for name in NAMES:
        weight = model.get_parameter(name)
        for place in range(0, weight.numel(), 7):
            losses = []
            for factor in (1 + step, 1 - step):
                with torch.no_grad():
                    kept = weight.flatten()[place].clone()
                    weight.view(-1)[place] = kept * factor
                    losses.append(float(F.cross_entropy(model(images), labels)))
                    weight.view(-1)[place] = kept
            slope = abs(losses[0] - losses[1]) / (2 * step)
            assert math.isclose(slope, float(scores[name].flatten()[place]), rel_tol=1e-4, abs_tol=1e-9)


def test_snip_drops_weights_that_no_output_depends_on() -> None:
    model = tiny()
    with torch.no_grad():
        model.conv2.weight[:, :3] = 0  # nobody reads the first three channels of conv1
    scores = CRITERIA["snip"]().score(model, NAMES, batch(), 0)
    assert not scores["conv1.weight"][:3].any()
    assert scores["conv1.weight"][3:].all()


def test_snip_without_images_is_refused() -> None:
    with pytest.raises(UsageError, match="snip looks at training images"):
        CRITERIA["snip"]().score(tiny(), NAMES, None, 0)


def test_random_masks_differ_between_seeds_and_between_layers_of_one_shape() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    one, other = (Rule("random").masks(model, 0.5, seed=seed) for seed in (0, 1))
    assert one.kept == other.kept == 1600
    assert not torch.equal(one["0.weight"], other["0.weight"])
    assert not torch.equal(one["0.weight"], one["1.weight"])


def test_shuffled_masks_keep_as_many_of_each_layer_in_other_places() -> None:
    masks = magnitude(tiny(), 0.3)
    chance = shuffled(masks, 5)
    assert chance.shares == masks.shares
    assert not torch.equal(chance["conv2.weight"], masks["conv2.weight"])
    assert chance.digest == shuffled(masks, 5).digest != shuffled(masks, 6).digest


# ------------------------------------------------------------------------------------------- the output layer


@pytest.mark.parametrize(
    ("rate", "share"),
    [("full", 0.8**3), ("half", 0.9**3), ("none", 1.0)],
)
def test_the_output_layer_can_go_at_half_the_rate_or_not_at_all(rate: str, share: float) -> None:
    model = tiny()
    masks = None
    for round_ in range(1, 4):
        masks = Rule("magnitude", "layer", output_rate=rate).masks(
            model, 0.8**round_, rounds=round_, output="fc.weight", within=masks
        )
    assert masks is not None
    assert int(masks["fc.weight"].sum()) == round(share * 48)
    assert int(masks["conv2.weight"].sum()) == round(0.8**3 * 1152)


def test_with_one_threshold_the_other_layers_share_out_what_stays_of_them() -> None:
    masks = Rule(output_rate="half").masks(tiny(), 0.5, output="fc.weight")
    assert int(masks["fc.weight"].sum()) == 36
    assert int(masks["conv1.weight"].sum() + masks["conv2.weight"].sum()) == (144 + 1152) / 2


def test_an_output_layer_out_of_scope_has_no_mask() -> None:
    masks = Rule(scope="conv", output_rate="half").masks(tiny(), 0.5, output="fc.weight")
    assert set(masks) == {"conv1.weight", "conv2.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magnitud"}, "did you mean magnitude"),
        ({"allocation": "local"}, "--allocation local: give global, layer"),
        ({"scope": "linear"}, "--scope linear: give all, conv"),
        ({"output_rate": "0.5"}, "--output-rate 0.5: give full, half, none"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Rule(**options)


# ---------------------------------------------------------------------------------------------- fresh weights


def test_fresh_convolutions_have_the_deviation_of_their_kept_connections() -> None:
    model = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Conv2d(32, 64, 3, groups=32))
    generator = torch.Generator().manual_seed(1)  # the same numbers would choose by size
    masks = Masks(
        {
            f"{number}.weight": torch.rand(layer.weight.shape, generator=generator) < 0.3
            for number, layer in enumerate(model)
        }
    )
    torch.manual_seed(0)
    initialise(model, masks)
    for number, in_channels in ((0, 64), (1, 32)):
        mask, weight = masks[f"{number}.weight"], model[number].weight.detach()
        kept = int(mask.sum())
        expected = math.sqrt(2 / (kept / in_channels))
        assert kept_deviation(kept, in_channels) == pytest.approx(expected)
        # The sample deviation of n normal numbers is off by a share of about 1 / sqrt(2 n).
        assert float(weight[mask].std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * kept))
        assert not weight[~mask].any()


def test_of_a_whole_convolution_it_is_the_published_dense_deviation() -> None:
    assert kept_deviation(128 * 64 * 9, 64) == pytest.approx(math.sqrt(2 / (9 * 128)))


def test_fresh_linear_layers_keep_the_variance_of_their_sums() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1000, 500, bias=False)
    inputs = torch.randn(200, 1000)
    whole = float(layer(inputs).detach().std())
    initialise(layer, Masks({"weight": torch.rand(500, 1000) < 0.1}))
    assert float(layer(inputs).detach().std()) == pytest.approx(whole, rel=0.02)


def test_weights_without_a_mask_keep_their_own_initialisation() -> None:
    model, other = tiny(), tiny()
    initialise(model, magnitude(model, 0.5, scope="conv"))
    assert torch.equal(model.fc.weight, other.fc.weight)
    assert torch.equal(model.bn1.weight, other.bn1.weight)
    assert not torch.equal(model.conv1.weight, other.conv1.weight)
    assert weight_names(model, "conv") == NAMES[:2]
