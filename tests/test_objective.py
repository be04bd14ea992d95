import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from atomdiff.objective import add_noise, min_snr_weights, prior_preservation_loss, sample_losses, training_target

TYPES = ("epsilon", "v_prediction", "sample")


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 5, 6, generator=generator), torch.randn(3, 4, 5, 6, generator=generator)


def test_noise_and_targets_are_those_of_diffusers():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    latents, noise = pair()
    timesteps = torch.tensor([0, 400, 999])
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    torch.testing.assert_close(add_noise(latents, noise, alpha_bar), scheduler.add_noise(latents, noise, timesteps))
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(training_target(latents, noise, alpha_bar, "v_prediction"), velocity)
    assert training_target(latents, noise, alpha_bar, "epsilon") is noise
    assert training_target(latents, noise, alpha_bar, "sample") is latents


@settings(deadline=None)
@given(level=st.floats(0.001, 0.999), gamma=st.floats(0.1, 20))
def test_min_snr_weighs_the_same_mistake_alike_whatever_is_predicted(level, gamma):
    latents, noise = (tensor.double() for tensor in pair())
    alpha_bar = torch.full((3,), level, dtype=torch.float64)
    signal, spread = math.sqrt(level), math.sqrt(1 - level)
    noisy = add_noise(latents, noise, alpha_bar)
    guess = latents + 0.1 * pair(1)[0]  # the same guess of the latents, written in all three ways
    guesses = {"sample": guess, "epsilon": (noisy - signal * guess) / spread}
    guesses["v_prediction"] = signal * guesses["epsilon"] - spread * guess
    expected = min(level / (1 - level), gamma) * (guess - latents).square().flatten(1).mean(dim=1)
    for kind in TYPES:
        losses = sample_losses(guesses[kind], training_target(latents, noise, alpha_bar, kind))
        weighted = losses * min_snr_weights(alpha_bar, gamma, kind)
        torch.testing.assert_close(weighted, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "weights"), [("epsilon", [1, 0]), ("v_prediction", [0, 0]), ("sample", [0, 5])])
def test_min_snr_at_pure_noise_and_at_no_noise(kind, weights):
    found = min_snr_weights(torch.tensor([0.0, 1.0]), 5.0, kind)
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float32))


def test_half_precision_predictions_are_compared_in_float32():
    assert sample_losses(torch.full((2, 1, 1, 1), 300.0).half(), torch.zeros(2, 1, 1, 1)).tolist() == [9e4, 9e4]


def test_prior_loss_is_the_weighted_mean_of_the_class_pictures():
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0])
    assert prior_preservation_loss(losses, 2, 0.5) == 2 + 0.5 * 20
    assert prior_preservation_loss(losses, 5, 0.5) == losses.mean()


@pytest.mark.parametrize("function", [training_target, None])
def test_unknown_prediction_type(function):
    latents, noise = pair()
    with pytest.raises(ValueError, match="'flow': expected epsilon, v_prediction or sample"):
        if function:
            function(latents, noise, torch.full((3,), 0.5), "flow")
        else:
            min_snr_weights(torch.full((3,), 0.5), 5.0, "flow")
