from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.sampling.generate import generate
from atomdiff.training.config.objective import ObjectiveConfig
from atomdiff.training.dreambooth import train
from atomdiff.training.noise import forward_diffusion, set_training_scheduler
from atomdiff.utils.errors import UserError
from tests.helpers import read_log

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def diffusion(scheduler, **fields):
    return forward_diffusion(ObjectiveConfig(**fields), SimpleNamespace(scheduler=scheduler))


def matched(scheduler, **fields):
    pipe = SimpleNamespace(scheduler=scheduler)
    set_training_scheduler(ObjectiveConfig(**fields), pipe)
    return pipe.scheduler


def seeded():
    return torch.Generator().manual_seed(0)


def latents(count=6):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_by_default_noise_and_a_uniform_timestep_are_sampled_in_this_order(predicts):
    scheduler = DDPMScheduler(**STABLE, prediction_type=predicts)
    clean, generator = latents(), seeded()
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(1000, (6,), generator=generator)
    noised = diffusion(scheduler).sample(clean, seeded())
    assert torch.equal(noised.timesteps, timesteps) and torch.equal(noised.weights, torch.ones(6))
    torch.testing.assert_close(noised.latents, scheduler.add_noise(clean, noise, timesteps))
    velocity = scheduler.get_velocity(clean, noise, timesteps)
    target = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[predicts]
    torch.testing.assert_close(noised.target, target)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
)
def test_flow_takes_its_sigma_as_timestep_and_keeps_the_shift_of_the_base(scheduler):
    scheduler.set_timesteps(4)  # images have been generated
    clean = latents()
    noised = diffusion(scheduler, snr_gamma=5.0).sample(clean, seeded())
    sigmas = noised.timesteps / 1000
    clean_share = (1 - sigmas)[:, None, None, None]
    torch.testing.assert_close(noised.latents, clean + (1 - clean_share) * noised.target)
    evenly = (torch.arange(1000) + 1) / 1000
    shifted = 3 * evenly / (1 + 2 * evenly)
    torch.testing.assert_close(diffusion(scheduler).schedule.timesteps, 1000 * shifted)
    torch.testing.assert_close(noised.weights, torch.minimum((1 - sigmas) ** 2, 5 * sigmas**2))


def test_zero_terminal_snr_is_that_of_its_paper():
    base = DDIMScheduler(**STABLE, prediction_type="v_prediction")
    found = diffusion(base, rescale_betas_zero_snr=True)
    usual = base.alphas_cumprod.sqrt()  # algorithm 1: shift so that the last is zero, scale so that the first is kept
    expected = (usual - usual[-1]) * usual[0] / (usual[0] - usual[-1])
    torch.testing.assert_close(found.schedule.alpha, expected, atol=1e-5, rtol=0)
    assert found.schedule.alpha[-1] == 0 and found.schedule.sigma[-1] == 1
    noised = diffusion(base, rescale_betas_zero_snr=True, min_timestep=999, snr_gamma=5.0).sample(latents(), seeded())
    assert torch.equal(noised.target, -latents())  # at pure noise v is the image, and min-SNR's weight is 0, not nan
    assert noised.weights.tolist() == [0] * 6
    said = DDIMScheduler(**STABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert torch.equal(diffusion(said).schedule.alpha, found.schedule.alpha)
    assert torch.equal(diffusion(said, rescale_betas_zero_snr=False).schedule.alpha, usual)


def test_options_of_the_run_reach_the_samples():
    base, clean = DDPMScheduler(**STABLE), latents(400)
    usual = diffusion(base).sample(clean, seeded())
    offset = diffusion(base, noise_offset=0.3).sample(clean, seeded())
    assert torch.equal(offset.timesteps, usual.timesteps)
    added = offset.target - usual.target  # one number for each channel
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added))
    assert added[:, :, 0, 0].std() == pytest.approx(0.3, rel=0.1)
    some = diffusion(base, min_timestep=100, max_timestep=103).sample(clean, seeded())
    assert some.timesteps.unique().tolist() == [100, 101, 102]
    late = diffusion(base, timestep_sampling="cubic").sample(clean, seeded())
    assert late.timesteps.float().mean() > 700
    middle = diffusion(base, timestep_sampling="logit_normal", logit_mean=-1.0, logit_std=0.1).sample(clean, seeded())
    assert middle.timesteps.float().mean() == pytest.approx(1000 * torch.tensor(-1.0).sigmoid().item(), abs=10)


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**STABLE, steps_offset=1),
        EulerDiscreteScheduler(**STABLE, prediction_type="v_prediction", timestep_spacing="leading"),
        EulerDiscreteScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
)
def test_a_scheduler_that_fits_stays(scheduler):
    assert matched(scheduler) is scheduler


def test_other_schedulers_take_the_place_of_one_that_does_not_fit():
    base = PNDMScheduler(**STABLE, steps_offset=1)
    sample = matched(base, prediction_type="sample")
    assert isinstance(sample, DDIMScheduler) and sample.config.prediction_type == "sample"
    assert torch.equal(sample.alphas_cumprod, base.alphas_cumprod) and not sample.config.clip_sample
    fields = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    zero = matched(base, **fields)
    zero.set_timesteps(4)
    assert zero.timesteps.tolist() == [999, 749, 499, 249] and zero.alphas_cumprod[-1] == 0
    flow = matched(base, prediction_type="flow", flow_shift=2.0)
    assert isinstance(flow, FlowMatchEulerDiscreteScheduler) and flow.config.shift == 2
    for found, again in ((sample, {"prediction_type": "sample"}), (zero, fields), (flow, {"flow_shift": 2.0})):
        assert matched(found, **again) is found
    assert matched(flow, flow_shift=5.0).config.shift == 5 and matched(flow).config.shift == 2


@pytest.mark.parametrize(
    ("scheduler", "fields", "message"),
    [
        (
            DDIMScheduler(),
            {"rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr=True: .*epsilon does not determine",
        ),
        (DDIMScheduler(rescale_betas_zero_snr=True), {}, "set it to false, or prediction_type to v_prediction"),
        (FlowMatchEulerDiscreteScheduler(), {"rescale_betas_zero_snr": True}, "flow ends in pure noise anyway"),
        (FlowMatchEulerDiscreteScheduler(), {"prediction_type": "epsilon"}, "FlowMatchEuler.* has no noise schedule"),
        (EDMEulerScheduler(), {}, "EDMEulerScheduler has no noise schedule"),
        (EulerDiscreteScheduler(prediction_type="original_sample"), {}, "says prediction_type='original_sample'"),
        (DDIMScheduler(), {"flow_shift": 3.0}, "flow_shift=3.0: the base predicts epsilon"),
        (DDIMScheduler(), {"min_timestep": 1000}, "min_timestep=1000: the base has 1000 timesteps"),
        (DDIMScheduler(), {"max_timestep": 1001}, "max_timestep=1001: the base has 1000 timesteps"),
    ],
)
def test_what_does_not_go_together_with_the_base_is_refused(scheduler, fields, message):
    with pytest.raises(UserError, match=message):
        diffusion(scheduler, **fields)


@pytest.fixture
def run(train_config):
    """Makes the config of a run."""
    usual = {"train_batch_size": 4, "max_train_steps": 30, "learning_rate": 0.05, "validation_steps": 30}
    return lambda **fields: train_config(**usual | fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({"prediction_type": "epsilon", "noise_offset": 0.1}, "epsilon"),
        ({"prediction_type": "sample", "timestep_sampling": "cubic"}, "sample"),
        ({"rescale_betas_zero_snr": True}, "v"),
        ({"prediction_type": "flow", "flow_shift": 3.0, "timestep_sampling": "logit_normal"}, "flow"),
    ],
)
def test_every_objective_is_learned_and_written_into_the_file(run, fields, written):
    config = run(**fields)
    assert read_concept_file(train(config)).modelspec["prediction_type"] == written
    losses = [line["loss"] for line in read_log(config)]
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])


@pytest.mark.slow
def test_a_resumed_run_samples_the_same(run):
    sampling = {"noise_offset": 0.1, "timestep_sampling": "logit_normal", "prediction_type": "flow", "snr_gamma": 5.0}
    config = run(**sampling, max_train_steps=3, validation_steps=0, checkpointing_steps=2)
    whole = read_concept_file(train(config))
    config = replace(config, resume_from_checkpoint="checkpoint-2")
    resumed = read_concept_file(train(config))
    for name, tensors in whole.layers.items():
        assert all(torch.equal(tensor, resumed.layers[name][kind]) for kind, tensor in tensors.items())
    with pytest.raises(UserError, match="noise_offset=0.1, now 0.2"):
        train(replace(config, noise_offset=0.2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"prediction_type": "flow"}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}]
)
def test_objectives_of_sdxl(run, fields, tiny_xl_pipe_folder):
    base = str(tiny_xl_pipe_folder)
    config = run(pretrained_model_name_or_path=base, max_train_steps=1, validation_steps=1, **fields)
    predicts = read_concept_file(train(config)).modelspec["prediction_type"]
    assert predicts == fields["prediction_type"].removesuffix("_prediction")


@pytest.mark.slow
def test_a_base_saved_with_a_flow_scheduler_is_trained_and_generates(run, tiny_pipe, tmp_path):
    tiny_pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    tiny_pipe.save_pretrained(tmp_path / "flow")
    config = run(pretrained_model_name_or_path=str(tmp_path / "flow"), max_train_steps=2, validation_steps=1)
    assert read_concept_file(train(config)).modelspec["prediction_type"] == "flow"
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "flow", safety_checker=None)
    (image,) = generate(pipe, ["a photo of a teapot"], seeds=[0], num_inference_steps=2, progress=False)
    assert image.size == (32, 32)
