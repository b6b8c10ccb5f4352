from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archsearch.errors import UsageError
from archsearch.latency.boundary import Boundary
from archsearch.latency.cells import Cell, Form, Layer, Signature
from archsearch.latency.correction import Correction
from archsearch.latency.predict import Features, Knots, Predictor, reachable
from archsearch.latency.quantum import PROBES, Staircase, choose_widths, find_quantum, stairs_of

CONV = Signature(kind="conv", size=(4, 4), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
WIDTHS = {"a": np.array([8, 16]), "b": np.array([8, 16, 24])}
LAYERS = (
    Layer(name="first", signature=CONV, reads=Form(constant=3), makes=Form(constant=0, groups={"a": 1})),
    Layer(name="second", signature=CONV, reads=Form(constant=0, groups={"a": 1}),
          makes=Form(constant=8, groups={"b": 2})),
)  # fmt: skip


def features(knots: Knots | None = None) -> Features:
    channels = np.array([3, 8, 16, 24, 40, 56])
    default = Knots(channels, channels, np.add.outer(channels * 1.0, channels * 100.0))
    return Features(LAYERS, WIDTHS, {CONV: knots or default})


def test_the_sum_of_the_cells_is_looked_up() -> None:
    # first: 3 read, 16 made; second: 16 read, 8 + 2 * 24 made
    found = features().of(np.array([[16, 24]]))[0]
    assert found.tolist() == [
        (3 + 1600) + (16 + 5600),
        16 * (16 + 56),  # pixels times what is made
        0,  # all that is made comes in multiples of four
        0,  # nothing is gone
        9 * (3 * 16 + 16 * 56),
    ]


def test_channels_that_are_no_multiple_of_four_are_ragged() -> None:
    layers = (LAYERS[0].model_copy(update={"makes": Form(constant=1, groups={"a": 1})}), LAYERS[1])
    channels = np.array([3, 8, 16, 24, 40, 56])
    knots = Knots(channels, channels, np.add.outer(channels * 1.0, channels * 1.0))
    assert Features(layers, WIDTHS, {CONV: knots}).of(np.array([[16, 24]]))[0, 2] == 16 * 9 * 3 * 17


def test_macs_are_those_of_the_layers() -> None:
    assert features().macs(np.array([[16, 24]])).tolist() == [16 * 9 * (3 * 16 + 16 * 56)]


def test_a_layer_without_channels_is_only_counted() -> None:
    assert features().of(np.array([[0, 8]]))[0].tolist() == [0, 0, 0, 2, 0]


def test_between_measured_points_is_a_line_and_on_a_step_its_end() -> None:
    knots = Knots(np.array([16, 32]), np.array([8, 24]), np.array([[1.0, 2.0], [3.0, 4.0]]), (16, 8))
    found = knots.at(np.array([16, 16, 17, 32]), np.array([8, 9, 16, 24]))
    assert found[1].tolist() == [1.0, 1.5, 1.5, 2.0]
    assert found[:, 0].tolist() == [1.0, 1.0, 3.0, 3.0]


def test_a_width_that_was_not_measured_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no width 12 of the group 'b', but 8, 16, 24: give --round-to"):
        features().check(np.array([[8, 8], [8, 12]]))
    with pytest.raises(UsageError, match="no width 99"):
        features().check(np.array([[99, 8]]))
    with pytest.raises(UsageError, match="no width -8"):
        features().check(np.array([[-8, 8]]))


def test_reachable_channels_are_all_sums() -> None:
    form = Form(constant=1, groups={"a": 1, "b": 2})
    expected = {1 + a + 2 * b for a in (8, 16) for b in (8, 16, 24)}
    assert reachable(form, WIDTHS).tolist() == sorted(expected)


def test_sums_beyond_all_measure_are_refused() -> None:
    many = {f"g{number}": np.arange(1, 4096) for number in range(8)}
    form = Form(constant=0, groups={name: 4**number for number, name in enumerate(many)})
    with pytest.raises(UsageError, match="sums are possible"):
        reachable(form, many)


def test_the_correction_finds_what_it_was_made_of() -> None:
    generator = np.random.default_rng(0)
    columns = generator.uniform(1, 2, (20, 4))
    found = Correction.fit(columns, columns @ [0.9, 0.0, 0.2, 0.1] + 0.5)
    assert found.coefficients == pytest.approx([0.9, 0.0, 0.2, 0.1], abs=1e-6)
    assert found.constant_ms == pytest.approx(0.5, abs=1e-6)
    assert found.margin == pytest.approx(0, abs=1e-6)


def test_no_coefficient_is_negative() -> None:
    columns = np.random.default_rng(0).uniform(1, 2, (20, 2))
    found = Correction.fit(columns, 3 - columns[:, 0] + columns[:, 1])
    assert found.coefficients.min() >= 0
    assert found.constant_ms >= 0


def test_weights_that_stay_in_the_caches_are_free() -> None:
    generator = np.random.default_rng(0)
    columns = generator.uniform(1, 8, (220, 2))
    ms = (columns[:, 0] + 2 * np.maximum(columns[:, 1] - 2, 0) + 0.5) * generator.normal(1, 0.01, 220)
    found = Correction.fit(columns[:20], ms[:20], columns[:20, :1])
    assert found.free_weights == pytest.approx(2, rel=0.3)
    assert found.coefficients[1] == pytest.approx(2, rel=0.2)
    new = columns[20:]
    predicted = new[:, 0] * found.of_signature(0)[0] + found.beyond_caches_ms(new[:, 1]) + found.constant_ms
    plain = Correction.fit(columns[:20], ms[:20])
    without = new @ plain.coefficients + plain.constant_ms
    assert np.abs(predicted / ms[20:] - 1).mean() < 0.3 * np.abs(without / ms[20:] - 1).mean()


def test_a_predictor_counts_weights_beyond_the_caches_once() -> None:
    table = features()
    row = np.array([[16, 24]])
    weights = 9 * (3 * 16 + 16 * 56)
    assert table.weights(row).tolist() == [weights]
    assert table.of(row)[0, -1] == weights
    all_count = Correction(np.array([1.0, 0, 0, 0, 0.5]), 0.1, 0.01, 15)
    some_are_free = Correction(np.array([1.0, 0, 0, 0, 0.5]), 0.1, 0.01, 15, free_weights=100.0)
    none_counts = Correction(np.array([1.0, 0, 0, 0, 0.5]), 0.1, 0.01, 15, free_weights=1e6)
    ms = [float(Predictor(table, each)(row)[0][0]) for each in (none_counts, some_are_free, all_count)]
    assert np.diff(ms) == pytest.approx([0.5 * (weights - 100), 50])


def drawn(factors: object, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the parts of 520 networks by signature, and what they take."""
    generator = np.random.default_rng(seed)
    parts = generator.uniform(1, 2, (520, 8))
    return parts, (parts @ factors + 0.5) * generator.normal(1, noise, 520)  # type: ignore[operator]


def held_out_error(parts: np.ndarray, ms: np.ndarray, *, factors: bool) -> float:
    """Return the root mean square of the relative errors, fitted on the first twenty networks."""
    sums = parts[:20].sum(1, keepdims=True)
    columns = np.concatenate([sums, np.zeros_like(sums)], axis=1)  # no weights
    found = Correction.fit(columns, ms[:20], parts[:20] if factors else None)
    each = np.array([found.of_signature(number)[0] for number in range(8)])
    errors = (parts[20:] @ each + found.constant_ms) / ms[20:] - 1
    return float(np.sqrt(np.mean(np.square(errors))))


def test_signatures_whose_cells_are_off_get_a_factor_of_their_own() -> None:
    for seed in range(5):
        networks = drawn(np.repeat([0.7, 1.3], 4), 0.01, seed)
        assert held_out_error(*networks, factors=True) < 0.6 * held_out_error(*networks, factors=False)


def test_factors_do_little_harm_where_there_is_noise_alone() -> None:
    harm = [
        held_out_error(*networks, factors=True) / held_out_error(*networks, factors=False)
        for networks in (drawn(np.ones(8), 0.03, seed) for seed in range(10))
    ]
    assert np.mean(harm) < 1.3


def test_the_interval_holds_as_many_new_networks_as_it_says() -> None:
    generator = np.random.default_rng(1)
    inside = []
    for _ in range(100):
        columns = generator.uniform(1, 4, (40, 2))
        ms = (columns @ [1.0, 0.3] + 0.2) * np.exp(generator.normal(0, 0.04, 40))
        fit = Correction.fit(columns[:20], ms[:20])
        predicted = columns[20:] @ fit.coefficients + fit.constant_ms
        inside.append(np.abs(ms[20:] / predicted - 1) <= fit.margin)
    assert 0.87 <= np.mean(inside) <= 0.94


def test_too_few_networks_are_refused() -> None:
    with pytest.raises(UsageError, match="5 calibration networks: at least 6"):
        Correction.fit(np.ones((5, 2)), np.ones(5))


def test_what_is_added_by_one_more_layer_is_its_time_inside() -> None:
    cells = {Cell(0, 8, 8): 100, Cell(0, 16, 16): 400}
    inside = {Cell(0, 8, 8): 2.0, Cell(0, 16, 16): 5.0}
    ms = {
        (cell, repeat): 0.3 + 0.01 * cells[cell] + repeat * inside[cell]
        for cell in cells
        for repeat in (1, 3)
    }
    found = Boundary.fit(ms, cells)
    assert (found.constant_ms, found.element_ms) == pytest.approx((0.3, 0.01))
    for cell in cells:
        assert found.inside(ms[cell, 1], cells[cell]) == pytest.approx(inside[cell])


def test_without_repeated_cells_there_is_no_boundary() -> None:
    assert Boundary.fit({(Cell(0, 8, 8), 1): 1.0}, {Cell(0, 8, 8): 10}) == Boundary()


# --- a bound for the solver -----------------------------------------------------------------------------


def falling() -> Predictor:
    channels = np.array([3, 8, 16, 24, 40, 56])
    ms = np.add.outer(channels * 1.0, channels * 100.0)
    ms[:, 2] = 5000.0  # slower than the next wider ones
    ms[3, :] *= 2
    correction = Correction(np.array([1.0, 0.0, 1e-3, 0.0, 0.0]), 1.0, 0.05, 15)
    return Predictor(features(Knots(channels, channels, ms)), correction)


widths = st.tuples(st.sampled_from([8, 16]), st.sampled_from([8, 16, 24]))


@given(widths, widths)
def test_more_channels_never_lower_the_bound(one: tuple[int, int], other: tuple[int, int]) -> None:
    predictor = falling()
    least, most = np.minimum(one, other), np.maximum(one, other)
    assert predictor.upper_ns(least) <= predictor.upper_ns(most)


@given(widths)
def test_the_bound_is_never_below_the_interval(one: tuple[int, int]) -> None:
    predictor = falling()
    ms, low, high = predictor(np.array(one))
    assert low <= ms <= high
    assert predictor.upper_ns(np.array(one)) >= high * 1e6
    assert predictor.upper_ns(np.array(one)).dtype == np.int64


def test_predictions_keep_the_shape_of_the_candidates() -> None:
    predictor = falling()
    rows = np.array([[[8, 8], [16, 24]], [[16, 8], [8, 24]]])
    ms, *_ = predictor(rows)
    assert ms.shape == (2, 2)
    assert ms[1, 0] == predictor(rows[1, 0])[0]


def test_fifty_thousand_candidates_of_56_layers_take_less_than_a_second() -> None:
    groups = {f"g{number}": np.arange(8, 65, 8) for number in range(28)}
    names = list(groups)
    layers = [
        Layer(name=str(number), signature=CONV, reads=Form(constant=0, groups={names[number % 28]: 1}),
              makes=Form(constant=0, groups={names[(number + 1) % 28]: 1}))
        for number in range(56)
    ]  # fmt: skip
    channels = np.arange(8, 65, 8)
    knots = Knots(channels, channels, np.multiply.outer(channels, channels) * 1e-3)
    table = Features(layers, groups, {CONV: knots})
    predictor = Predictor(table, Correction(np.array([1.0, 0, 0, 0, 0]), 0.1, 0.01, 15))
    candidates = 8 * np.random.default_rng(0).integers(1, 9, (50_000, 28))
    predictor(candidates[:100])
    began = time.process_time()
    ms, *_ = predictor(candidates)
    assert time.process_time() - began < 1
    row = candidates[7]
    slow = sum(row[number % 28] * row[(number + 1) % 28] for number in range(56)) * 1e-3 + 0.1
    assert ms[7] == pytest.approx(slow)


# --- the quantum ----------------------------------------------------------------------------------------


def curve(ms: object, op: str = "3x3", axis: str = "makes", layers: int = 10) -> Staircase:
    return Staircase(op=op, axis=axis, layers=layers, channels=PROBES, ms=tuple(map(float, ms)))  # type: ignore[call-overload]


def stairs(step: int) -> list[int]:
    return [10 + -(-width // step) * step for width in PROBES]


@pytest.mark.parametrize("step", [1, 2, 4, 8, 16, 32])
def test_the_quantum_is_the_step_of_the_stairs(step: int) -> None:
    assert find_quantum([curve(stairs(step))]) == step


def test_widths_that_are_slower_than_the_next_multiple_are_not_worth_having() -> None:
    slower = [width * (1.5 if width % 8 else 1) for width in PROBES]
    assert find_quantum([curve(slower)]) == 8


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_a_little_noise_does_not_hide_the_steps(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(1, 0.002, len(PROBES))
    assert find_quantum([curve(stairs(8) * noise)]) == 8


def test_kinds_of_layers_have_a_say_by_how_many_they_are() -> None:
    stepped, smooth = curve(stairs(16), layers=90), curve(stairs(1), layers=10)
    assert find_quantum([stepped, smooth]) == 16
    assert find_quantum([curve(stairs(16), layers=10), curve(stairs(1), layers=90)]) == 1


def test_where_channels_do_not_matter_nothing_is_a_step() -> None:
    launch_bound = curve([100 + 0.01 * width for width in PROBES])
    assert launch_bound.flat
    assert launch_bound.quantum == launch_bound.block == 1
    assert find_quantum([launch_bound, curve(stairs(16))]) == 16
    assert find_quantum([launch_bound]) == find_quantum([]) == 8


def test_each_axis_of_a_kind_of_layers_has_its_own_step() -> None:
    known = [curve(stairs(16)), curve(stairs(1), axis="reads")]

    def steps(signature: Signature, probed: list[Staircase]) -> list[int]:
        return [each.step for each in stairs_of(signature, probed, 4)]

    assert steps(CONV, known) == [1, 16]
    assert steps(CONV, []) == [1, 1]
    assert steps(CONV.model_copy(update={"groups": 0}), known) == [1, 1]
    assert steps(CONV.model_copy(update={"groups": 8}), known) == [1, 1]


def test_a_curve_is_as_rough_as_it_is_far_from_a_line() -> None:
    assert curve(list(PROBES)).roughness == pytest.approx(0, abs=1e-9)
    assert 0.2 < curve(stairs(16)).roughness < 0.6
    # Up and down around 1: no line explains any of it.
    assert curve([1.0 + (-1) ** n for n in range(len(PROBES))]).roughness > 0.9
    reads, makes = stairs_of(CONV, [curve(stairs(16)), curve(list(PROBES), axis="reads")], 4)
    assert makes.roughness > reads.roughness
    assert stairs_of(CONV, [], 4)[0].roughness == 1


def test_a_probe_that_is_off_does_not_hide_the_steps_along_an_axis() -> None:
    tall = np.array([*stairs(16)[:-1], 1.05 * stairs(16)[-1]])
    assert curve(tall).quantum == 1  # no width is worth less than the last one
    assert curve(tall).step(1) == 16
    assert curve(stairs(1)).step(1) == 1
    assert curve(stairs(32)).step(16) == 32
    assert curve(stairs(16)).step(16) == 1  # all multiples are ends of steps


def test_a_block_is_found_where_widths_between_are_slow_and_where_the_last_probe_is_off() -> None:
    # Microseconds of 3x3 layers of a ResNet-56 by what they read, on ONNX Runtime and AVX-512.
    ragged = [
        172.3,
        252.2,
        252.2,
        253.0,
        252.4,
        348.6,
        333.0,
        372.9,
        331.6,
        400.2,
        404.5,
        408.9,
        332.1,
        422.0,
    ]
    ragged += [429.9, 438.1, 331.5]
    assert curve(ragged).step(1) == 8
    assert curve(ragged).block == 16
    tall = [*stairs(16)[:-1], 1.05 * stairs(16)[-1]]
    assert curve(tall).block == 16
    assert curve(stairs(1)).block == 1


def test_what_was_measured_on_a_step_takes_its_own_time() -> None:
    knots = Knots(np.array([16, 24, 32]), np.array([16]), np.array([[1.0], [2.0], [4.0]]), (16, 1))
    found = knots.at(np.array([16, 17, 24, 25, 32]), np.array([16]))[:, 0]
    assert found.tolist() == [1.0, 4.0, 2.0, 4.0, 4.0]


def test_fewer_channels_than_a_step_are_on_no_step() -> None:
    knots = Knots(np.array([4, 8, 32]), np.array([16]), np.array([[1.0], [2.0], [4.0]]), (32, 1))
    found = knots.at(np.array([2, 4, 6, 20, 32]), np.array([16]))[:, 0]
    assert found.tolist() == [1.0, 1.0, 1.5, 3.0, 4.0]


def test_groups_have_finer_multiples_until_they_can_choose() -> None:
    sizes = {"narrow": 16, "odd": 24, "wide": 64}

    def widths(quantum: int) -> dict[str, list[int]]:
        found = choose_widths(
            lambda step: {name: np.arange(step, size + 1, step) for name, size in sizes.items()}, quantum
        )
        return {name: steps.tolist() for name, steps in found.items()}

    assert widths(16) == {"narrow": [8, 16], "odd": [8, 16, 24], "wide": [16, 32, 48, 64]}
    assert widths(32)["wide"] == [16, 32, 48, 64]
    assert widths(4)["narrow"] == [4, 8, 12, 16]
    assert widths(12)["narrow"] == [12]  # half of it is no multiple that anybody asked for


def test_widths_between_multiples_have_no_say_in_the_steps_of_the_multiples() -> None:
    slower = [cost * (1.3 if width % 4 else 1) for width, cost in zip(PROBES, stairs(16), strict=True)]
    assert curve(slower).step(4) == 16
