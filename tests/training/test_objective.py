import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from atomdiff.training.objective import (
    add_noise,
    min_snr_weights,
    offset_noise,
    prior_preservation_loss,
    sample_losses,
    sample_timesteps,
    timestep_quantiles,
    training_target,
)

TYPES = ("epsilon", "v_prediction", "sample", "flow")


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 5, 6, generator=generator), torch.randn(3, 4, 5, 6, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noise_and_targets_are_those_of_diffusers():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    latents, noise = pair()
    timesteps = torch.tensor([0, 400, 999])
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    scales = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    torch.testing.assert_close(add_noise(latents, noise, *scales), scheduler.add_noise(latents, noise, timesteps))
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(training_target(latents, noise, *scales, "v_prediction"), velocity)
    assert training_target(latents, noise, *scales, "epsilon") is noise
    assert training_target(latents, noise, *scales, "sample") is latents


def test_flow_is_that_of_diffusers_and_leads_from_the_noise_to_the_latents():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = pair()
    chosen = torch.tensor([0, 400, 999])
    sigmas = scheduler.sigmas[chosen]
    noisy = add_noise(latents, noise, 1 - sigmas, sigmas)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, scheduler.timesteps[chosen], noise))
    flow = training_target(latents, noise, 1 - sigmas, sigmas, "flow")
    torch.testing.assert_close(noisy - sigmas[:, None, None, None] * flow, latents)
    scheduler.set_timesteps(5)
    state = noise
    for step in scheduler.timesteps:  # Euler's method is exact on a straight line
        state = scheduler.step(noise - latents, step, state).prev_sample
    torch.testing.assert_close(state, latents)


def test_offset_noise_adds_to_whole_channels_of_each_sample():
    noise = torch.zeros(2000, 4, 3, 3)
    found = offset_noise(noise, 0.1, seeded())
    assert (found == found[:, :, :1, :1]).all()
    offsets = found[:, :, 0, 0]
    assert offsets.std() == pytest.approx(0.1, rel=0.05) and offsets.mean() == pytest.approx(0, abs=0.005)
    correlation = torch.corrcoef(torch.cat([offsets[1:], offsets[:-1]], dim=1).T)
    assert (correlation - torch.eye(8)).abs().max() < 0.1
    plain = pair()[0]
    torch.testing.assert_close(offset_noise(plain, 0.1, seeded(1)) - plain, offset_noise(plain * 0, 0.1, seeded(1)))


def test_uniform_timesteps_are_drawn_by_randint():
    found = sample_timesteps(50, (0, 1000), "uniform", seeded())
    assert torch.equal(found, torch.randint(1000, (50,), generator=seeded()))


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "cubic"])
def test_timesteps_keep_to_their_bounds_and_reach_them(sampling):
    found = sample_timesteps(20000, (10, 14), sampling, seeded())
    assert found.dtype == torch.int64 and found.unique().tolist() == [10, 11, 12, 13]
    assert sample_timesteps(3, (7, 8), sampling, seeded()).tolist() == [7, 7, 7]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.5)])
def test_logit_normal_timesteps_are_those_of_diffusers(mean, std):
    found = sample_timesteps(40000, (0, 1000), "logit_normal", seeded(), logit_mean=mean, logit_std=std)
    theirs = compute_density_for_timestep_sampling("logit_normal", 40000, mean, std, generator=seeded(1))
    levels = torch.arange(0.05, 1, 0.05)
    torch.testing.assert_close((found / 1000).quantile(levels), theirs.quantile(levels), atol=0.01, rtol=0)
    logits = torch.logit((found + 0.5) / 1000)
    assert logits.mean() == pytest.approx(mean, abs=0.02) and logits.std() == pytest.approx(std, rel=0.02)


def test_cubic_timesteps_prefer_noise():
    shares = sample_timesteps(40000, (0, 1000), "cubic", seeded()) / 1000
    for bound in (0.1, 0.5, 0.9):  # u <= b where r >= (1 - b) ** (1 / 3)
        assert (shares < bound).float().mean() == pytest.approx(1 - (1 - bound) ** (1 / 3), abs=0.01)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "cubic"])
def test_quantiles_are_those_of_sampled_timesteps(sampling):
    options = {"logit_mean": 0.5, "logit_std": 0.8} if sampling == "logit_normal" else {}
    found = sample_timesteps(100_000, (100, 900), sampling, seeded(), **options).float()
    shares = torch.arange(0.05, 1, 0.05)
    expected = timestep_quantiles(shares, (100, 900), sampling, **options)
    assert expected.dtype == torch.int64
    torch.testing.assert_close(found.quantile(shares), expected.float(), atol=8, rtol=0)
    assert timestep_quantiles(torch.tensor([1e-6, 1 - 1e-7]), (7, 8), sampling).tolist() == [7, 7]


@settings(deadline=None)
@given(level=st.floats(0.001, 0.999), gamma=st.floats(0.1, 20))
def test_min_snr_weighs_the_same_mistake_alike_whatever_is_predicted(level, gamma):
    latents, noise = (tensor.double() for tensor in pair())
    guess = latents + 0.1 * pair(1)[0]  # the same guess of the latents, written in all four ways
    for kind in TYPES:
        alpha, sigma = (1 - level, level) if kind == "flow" else (math.sqrt(level), math.sqrt(1 - level))
        scales = (torch.full((3,), scale, dtype=torch.float64) for scale in (alpha, sigma))
        scales = tuple(scales)
        noisy = add_noise(latents, noise, *scales)
        noise_guess = (noisy - alpha * guess) / sigma
        guesses = {"sample": guess, "epsilon": noise_guess, "flow": noise_guess - guess}
        guesses["v_prediction"] = alpha * noise_guess - sigma * guess
        expected = min((alpha / sigma) ** 2, gamma) * (guess - latents).square().flatten(1).mean(dim=1)
        losses = sample_losses(guesses[kind], training_target(latents, noise, *scales, kind))
        weighted = losses * min_snr_weights(*scales, gamma, kind)
        torch.testing.assert_close(weighted, expected, rtol=1e-3, atol=1e-6)


def test_min_snr_weights_are_those_of_diffusers_scripts():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    timesteps = torch.tensor([0, 100, 400, 999])
    snr = compute_snr(scheduler, timesteps)
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    scales = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    clipped = snr.clamp(max=5)
    torch.testing.assert_close(min_snr_weights(*scales, 5.0, "epsilon"), clipped / snr)
    torch.testing.assert_close(min_snr_weights(*scales, 5.0, "v_prediction"), clipped / (snr + 1))


@pytest.mark.parametrize(
    ("kind", "weights"), [("epsilon", [1, 0]), ("v_prediction", [0, 0]), ("sample", [0, 5]), ("flow", [0, 0])]
)
def test_min_snr_at_pure_noise_and_at_no_noise(kind, weights):
    found = min_snr_weights(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), 5.0, kind)
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float32))


def test_half_precision_predictions_are_compared_in_float32():
    assert sample_losses(torch.full((2, 1, 1, 1), 300.0).half(), torch.zeros(2, 1, 1, 1)).tolist() == [9e4, 9e4]


def test_a_mask_weighs_the_errors_of_its_places():
    prediction, target = pair()
    mask = torch.zeros(3, 1, 5, 6)
    mask[0], mask[1, :, :2], mask[2, :, 0, 0] = 1, 1, 0.5
    errors = (prediction - target).square()
    found = sample_losses(prediction, target, mask)
    places = 4 * 5 * 6
    expected = [errors[0].mean(), errors[1, :, :2].sum() / places, 0.5 * errors[2, :, 0, 0].sum() / places]
    torch.testing.assert_close(found, torch.stack(expected))
    assert torch.equal(sample_losses(prediction, target, torch.ones(3, 1, 5, 6)), sample_losses(prediction, target))


def test_prior_loss_is_the_weighted_mean_of_the_class_pictures():
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0])
    assert prior_preservation_loss(losses, 2, 0.5) == 2 + 0.5 * 20
    assert prior_preservation_loss(losses, 5, 0.5) == losses.mean()


@pytest.mark.parametrize("function", [training_target, None])
def test_unknown_prediction_type(function):
    latents, noise = pair()
    scales = torch.full((3,), 0.6), torch.full((3,), 0.8)
    with pytest.raises(ValueError, match="'score': expected one of epsilon, v_prediction, sample, flow"):
        if function:
            function(latents, noise, *scales, "score")
        else:
            min_snr_weights(*scales, 5.0, "score")
