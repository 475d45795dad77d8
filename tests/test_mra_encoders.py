from __future__ import annotations

import dataclasses

import pytest
import torch

from cryorecon.engines.mra.encoding import RefineConfig, loss_of, solve_encoder, together
from cryorecon.engines.mra.problem import concatenated, exact_moments, moved, orbit_error, shifted
from cryorecon.engines.mra.training import (
    EncoderPair,
    Training,
    TrainingConfig,
    config_from,
    draw_pairs,
    held_out_errors,
    paper_training,
)
from cryorecon.networks.moment_encoders import MomentEncoder, MomentEncoderConfig
from cryorecon.physics.mixtures import MixtureConfig
from cryorecon.run.mra.jobs import load_encoders, train_encoders

SMALL = MomentEncoderConfig(12, branch=(6, 4), merged=(4,), hidden=(32,))
TINY = TrainingConfig(MixtureConfig(1), SMALL, pairs=100, epochs=3, batch=32)


def moments(count, n, generator, dtype=torch.float32):
    return exact_moments(*draw_pairs(MixtureConfig(2), count, n, generator, dtype))


def test_the_field_follows_shifts_of_the_observations(generator):
    config = MomentEncoderConfig(12, "samples", "diagonals", (6, 4), (4,), (8,))
    network = MomentEncoder(config, generator).double()
    target = moments(3, 12, generator, torch.float64)
    before = network.field(target.first, target.second)
    rolled = network.field(target.first.roll(5, -1), target.second.roll((5, 5), (-2, -1)))
    torch.testing.assert_close(rolled, before.roll(5, 1))


@pytest.mark.parametrize("layout", ["rows", "diagonals"])
@pytest.mark.parametrize("n", [12, 13])
def test_convolutions_are_periodic_along_the_field(layout, n, generator):
    config = MomentEncoderConfig(n, "fourier", layout, (6, 4), (4,), (8,))
    network = MomentEncoder(config, generator)
    values = torch.randn(2, n, 4 * 2, generator=generator)
    torch.testing.assert_close(network.merged(values.roll(3, 1)), network.merged(values).roll(3, 1))


def test_a_convolution_is_torchs_circular_one(generator):
    network = MomentEncoder(SMALL, generator)
    layer = network.lower[0]
    values = torch.randn(2, 12, 24, generator=generator)
    weight = layer.linear.weight.reshape(6, 3, 24).permute(0, 2, 1)
    padded = torch.nn.functional.pad(values.mT, (1, 1), mode="circular")
    expected = torch.nn.functional.conv1d(padded, weight, layer.linear.bias)
    torch.testing.assert_close(layer(values), expected.mT)


def test_densities_are_probabilities(generator):
    pair = EncoderPair(TINY)
    _, density = pair.read(moments(5, 12, generator))
    torch.testing.assert_close(density.sum(-1), torch.ones(5))
    assert float(density.min()) > 0


def test_encoders_follow_the_scale_and_the_frame_of_the_observations(generator):
    """Brighter, shifted observations: a brighter, shifted signal, and the same density."""
    pair = EncoderPair(TINY).double()
    signal, density = draw_pairs(MixtureConfig(2), 4, 12, generator, torch.float64)
    by = torch.tensor([1.0, 4.0, -3.0, 7.0], dtype=torch.float64)
    plain = pair.read(exact_moments(signal, density))
    other = pair.read(moved(exact_moments(3 * signal, density), by))
    torch.testing.assert_close(other[0], 3 * shifted(plain[0], by), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other[1], plain[1], rtol=1e-6, atol=1e-8)


def test_a_config_survives_plain_values():
    for config in (TINY, paper_training(3, 16, 10, 3, 1)):
        assert config_from(dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match="odd kernel"):
        MomentEncoderConfig(12, kernel=4)
    with pytest.raises(ValueError, match="positive rate"):
        dataclasses.replace(TINY, epochs=0)


@pytest.mark.parametrize("fresh", [True, False])
def test_an_epoch_sees_its_pairs(fresh):
    """Fixed pairs come back in every epoch, in another order; fresh ones do not."""
    training = Training(dataclasses.replace(TINY, fresh=fresh))
    epochs = []
    for _ in range(2):
        rows = []
        for _ in range(training.config.steps_per_epoch):
            rows.append(training._pairs()[0])
            training.step += 1
        epochs.append(torch.cat(rows))
    assert epochs[0].shape == (100, 12)
    assert not torch.equal(*epochs)
    same = torch.equal(*(e.sum(-1).sort().values for e in epochs))
    assert same == (not fresh)


def test_rates_fall():
    paper = Training(paper_training(1, 12, 10, 30, 0))
    rates = []
    for step in (0, 9, 10, 19, 20, 29):
        paper.step = step
        rates.append(paper.rate())
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])
    ours = Training(TINY)
    ours.step = 12
    assert ours.rate() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_continued_training_equals_uninterrupted_bit_for_bit(recipe, tmp_path):
    config = TINY if recipe == "ours" else paper_training(1, 12, 100, 3, 5)
    if recipe == "paper":
        config = dataclasses.replace(config, batch=32)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    figures = train_encoders(config, whole, False, 50, lambda done, total: None)

    def stop(done, total):
        if done == 6:  # in the middle of the second epoch of four batches
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_encoders(config, parts, False, 50, stop)
    assert train_encoders(config, parts, True, 50, lambda done, total: None) == figures
    for name in ("encoder.safetensors", "training.csv"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    one, two = load_encoders(whole), load_encoders(parts)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_together_undoes_a_shift_between_signal_and_density(generator):
    signal, density = draw_pairs(MixtureConfig(2), 3, 16, generator, torch.float64)
    target = exact_moments(signal, density)
    away = torch.tensor([3.0, 0.0, 9.0], dtype=torch.float64)
    back = together(shifted(signal, -away), density, target, 1.0)
    torch.testing.assert_close(back, away)


def test_refinement_lowers_the_loss_and_leaves_the_encoder_alone(generator):
    pair = EncoderPair(TINY)
    before = [p.detach().clone() for p in pair.parameters()]
    target = moments(3, 12, generator)
    losses = []

    def told(done, signal, density):
        losses.append(loss_of(signal, density, target.first, target.second, 1.0))

    solve_encoder(pair, target, RefineConfig(60, 3e-3), told)
    assert bool((losses[-1] < 0.5 * losses[0]).all())
    assert len(losses) == 61
    for old, new in zip(before, pair.parameters(), strict=True):
        assert torch.equal(old, new)


def test_each_problem_is_refined_as_if_alone(generator):
    pair = EncoderPair(TINY).double()
    target = moments(2, 12, generator, torch.float64)
    config = RefineConfig(20, 1e-3)
    both = solve_encoder(pair, target, config)
    for number in range(2):
        alone = solve_encoder(pair, target.take(slice(number, number + 1)), config)
        torch.testing.assert_close(alone.signal[0], both.signal[number])


def test_refinement_stops_at_the_noise_floor(generator):
    pair = EncoderPair(TINY)
    exact = moments(2, 12, generator)
    loud = dataclasses.replace(
        exact, first_noise=0.3 * exact.first.norm(dim=-1),
        second_noise=0.3 * exact.second.norm(dim=(-2, -1)),
    )  # fmt: skip
    counted = []
    config = RefineConfig(300, 1e-2)
    found = solve_encoder(pair, loud, config, lambda done, v, r: counted.append(done))
    assert counted[-1] < 300
    assert bool((found.misfit <= 1).all())
    longer = dataclasses.replace(config, iterations=counted[-1] + 20, stop_at_noise=False)
    assert float(solve_encoder(pair, loud, longer).misfit.mean()) < float(found.misfit.mean())
    # One problem is there, the other never: the first keeps what it had.
    mixed = concatenated([loud.take(slice(0, 1)), exact.take(slice(1, 2))])
    both = solve_encoder(pair, mixed, dataclasses.replace(longer, stop_at_noise=True))
    torch.testing.assert_close(both.signal[0], found.signal[0], rtol=1e-3, atol=1e-4)
    assert float(both.misfit[1]) > 1


@pytest.mark.slow
def test_training_learns_to_invert_moments():
    config = TrainingConfig(MixtureConfig(1), pairs=20_000, epochs=4)
    training = Training(config)
    for _ in range(config.epochs * config.steps_per_epoch):
        training.advance()
    signal, density = held_out_errors(training.pair, 1000, 9)
    # The paper's test errors for one Gaussian are 0.052 and 0.048.
    assert float(signal.mean()) < 0.052
    assert float(density.mean()) < 0.06
    generator = torch.Generator().manual_seed(2)
    v, _ = draw_pairs(config.mixture, 20, 32, generator)
    assert float(orbit_error(v.flip(0), v).mean()) > 0.2  # what another signal would score
