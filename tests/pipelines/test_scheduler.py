"""Which scheduler generates a concept as it was trained, and that loading warns of another."""

import warnings
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from safetensors.torch import save_file

import atomdiff
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.pipelines.scheduler import (
    ScheduleConfig,
    common_scheduler,
    fitting_scheduler,
    pipeline_scheduler,
    schedule_settings,
    scheduler_code,
    trained_schedule,
)
from atomdiff.sampling.generate import generate
from atomdiff.utils.errors import UserError
from tests.pipelines.helpers import assert_same_bits, bits, train

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize(
    ("training", "found"),
    [
        ({"config": {**ZERO_SNR, "flow_shift": None, "seed": 1}}, ScheduleConfig("v_prediction", True)),
        ({"config": {"prediction_type": "flow", "flow_shift": 3}}, ScheduleConfig("flow", None, 3.0)),
        ({}, ScheduleConfig()),
        ({"config": ["flow"]}, ScheduleConfig()),
        (
            {"config": {"prediction_type": ["flow"], "rescale_betas_zero_snr": "yes", "flow_shift": True}},
            ScheduleConfig(),
        ),
        ({"config": {"prediction_type": "noise", "flow_shift": float("nan")}}, ScheduleConfig()),
        ({"config": {"flow_shift": -1}}, ScheduleConfig()),
        ({"config": {"flow_shift": 10**400}}, ScheduleConfig()),
        ({"config": {"flow_shift": 1e308}}, ScheduleConfig()),
        ({"config": {"flow_shift": 1e-320}}, ScheduleConfig()),
        ({"config": {"flow_shift": 1000}}, ScheduleConfig(flow_shift=1000.0)),
    ],
)
def test_an_objective_is_what_can_be_of_the_facts_of_a_run(training, found):
    assert ScheduleConfig.read(training) == found


def test_where_nothing_can_be_read_nothing_is_known(tmp_path):
    assert trained_schedule(tmp_path) is trained_schedule(tmp_path / "missing") is None
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 50)
    assert trained_schedule(tmp_path) is None
    for facts in ({}, {"training": "[" * 100_000}, {"training": '{"config": {"prediction_type": "flow"}'}):
        save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", facts)
        assert trained_schedule(tmp_path) is None


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    [
        (PNDMScheduler(**STABLE), ScheduleConfig()),
        (PNDMScheduler(**STABLE), ScheduleConfig("epsilon")),
        (PNDMScheduler(**STABLE), ScheduleConfig("epsilon", False)),
        (EulerDiscreteScheduler(**ZERO_SNR, timestep_spacing="leading"), ScheduleConfig("v_prediction", True)),
        (EulerDiscreteScheduler(**ZERO_SNR), ScheduleConfig()),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), ScheduleConfig("flow", None, 3.0)),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", flow_shift=3.0),
            ScheduleConfig("flow", None, 3.0),
        ),
    ],
)
def test_a_scheduler_that_says_the_same_stays(scheduler, schedule):
    assert fitting_scheduler(schedule, scheduler) is scheduler
    assert common_scheduler([("mug", schedule), ("cat", ScheduleConfig())], scheduler) is scheduler


@pytest.mark.parametrize(
    ("schedule", "settings"),
    [
        (ScheduleConfig("v_prediction"), {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}),
        (ScheduleConfig("sample"), {"prediction_type": "sample", "rescale_betas_zero_snr": False}),
        (ScheduleConfig("v_prediction", True), ZERO_SNR),
        (ScheduleConfig("flow"), {"prediction_type": "flow", "flow_shift": 1.0}),
        (ScheduleConfig("flow", None, 2.5), {"prediction_type": "flow", "flow_shift": 2.5}),
    ],
)
@pytest.mark.parametrize("base", [PNDMScheduler(**STABLE), DDIMScheduler(num_train_timesteps=500)])
def test_the_code_makes_the_scheduler_that_draws_as_trained(base, schedule, settings, tiny_pipe):
    wanted = fitting_scheduler(schedule, base)
    assert schedule_settings(wanted) == settings
    wanted = pipeline_scheduler(tiny_pipe, wanted)
    tiny_pipe.scheduler = base
    exec(scheduler_code(wanted, base), {"pipe": tiny_pipe, "diffusers": diffusers})
    found, expected = tiny_pipe.scheduler, wanted
    assert type(found) is type(expected)
    without = [{key: value for key, value in each.config.items() if key[0] != "_"} for each in (found, expected)]
    assert without[0] == without[1]
    if schedule.rescale_betas_zero_snr:
        assert found.config.timestep_spacing == "trailing" and found.alphas_cumprod[-1] == 0
    image = tiny_pipe("a mug", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    tiny_pipe.scheduler = wanted
    (expected,) = generate(tiny_pipe, ["a mug"], seeds=[0], num_inference_steps=2, progress=False)
    assert image.tobytes() == expected.tobytes()


def test_concepts_of_different_schedulers_have_none_in_common():
    base = DDIMScheduler()
    both = [("mug", ScheduleConfig("v_prediction")), ("cat", ScheduleConfig("v_prediction", False))]
    assert common_scheduler(both, base).config.prediction_type == "v_prediction"
    apart = r"different schedulers: 'mug' for a DDIM.*=v_prediction.*, 'cat' for a .*=epsilon.*; one by one"
    with pytest.raises(UserError, match=apart):
        common_scheduler([both[0], ("cat", ScheduleConfig())], base, advice="one by one")
    asked = ScheduleConfig("sample")
    for concepts in ([both[0], ("cat", ScheduleConfig())], []):
        assert schedule_settings(common_scheduler(concepts, base, asked))["prediction_type"] == "sample"
    with pytest.raises(UserError, match="no scheduler can sample the concept 'mug': .*epsilon does not determine"):
        common_scheduler([("mug", ScheduleConfig(None, True))], base)


@pytest.mark.parametrize(
    ("schedule", "asked", "expected"),
    [
        (ScheduleConfig("epsilon"), ScheduleConfig(None, False), ScheduleConfig("epsilon", False)),
        (ScheduleConfig("v_prediction", True), ScheduleConfig("sample"), ScheduleConfig("sample", True)),
        (ScheduleConfig("flow", None, 3.0), ScheduleConfig("flow"), ScheduleConfig("flow", None, 3.0)),
        (ScheduleConfig("flow", None, 3.0), ScheduleConfig(None, False), ScheduleConfig("flow", False, 3.0)),
        (ScheduleConfig("flow", None, 3.0), ScheduleConfig("epsilon"), ScheduleConfig("epsilon")),
        (ScheduleConfig("v_prediction", True), ScheduleConfig("flow"), ScheduleConfig("flow")),
        (ScheduleConfig("flow", None, 3.0), ScheduleConfig(), ScheduleConfig("flow", None, 3.0)),
    ],
)
def test_what_is_asked_for_leaves_the_rest_as_trained(schedule, asked, expected):
    assert schedule.overridden(asked) == expected


def test_diffusers_takes_the_steps_of_euler_for_flow(tiny_pipe):
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert pipeline_scheduler(SimpleNamespace(components={"transformer": None}), flow) is flow
    assert pipeline_scheduler(tiny_pipe, tiny_pipe.scheduler) is tiny_pipe.scheduler
    solver = pipeline_scheduler(tiny_pipe, flow)
    assert schedule_settings(solver) == schedule_settings(flow)
    solver.set_timesteps(5)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep, level, following in zip(solver.timesteps, solver.sigmas[:-1], solver.sigmas[1:], strict=True):
        assert abs(level * 1000 - timestep) < 1  # as in training
        velocity = latents.flip(-1).sin()
        expected = latents + (following - level) * velocity
        latents = solver.step(velocity, timestep, latents).prev_sample
        torch.testing.assert_close(latents, expected)
    assert solver.sigmas[0] > 0.999 and solver.sigmas[-1] == 0


@pytest.mark.slow
def test_flow_gives_like_images_by_both_schedulers(tiny_pipe):
    generated = []
    for scheduler in (flow := FlowMatchEulerDiscreteScheduler(shift=3.0), pipeline_scheduler(tiny_pipe, flow)):
        tiny_pipe.scheduler = scheduler
        (image,) = generate(tiny_pipe, ["a mug"], seeds=[0], num_inference_steps=25, progress=False)
        generated.append(np.asarray(image).astype(int))
    assert abs(generated[0] - generated[1]).mean() < 2


V_ZERO_SNR = {"config": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}}


@pytest.mark.parametrize("method", ["atoms", "lora"])
def test_loading_warns_of_a_scheduler_that_does_not_fit(tiny_pipe, tmp_path, method, user_warnings):
    train(tiny_pipe, method, word="ohwx")
    path = tmp_path / "mug.atoms.safetensors"
    atomdiff.save_atoms(tiny_pipe, path, training=V_ZERO_SNR)
    atomdiff.unload_atoms(tiny_pipe)
    before = tiny_pipe.scheduler
    with pytest.warns(UserWarning) as caught:
        atomdiff.load_atoms(tiny_pipe, path, "mug")
    (warning,) = user_warnings(caught)
    assert warning.filename == __file__ and tiny_pipe.scheduler is before
    text, line = str(warning.message).split("; run\n")
    assert (
        "'mug' was trained for a DDIMScheduler with prediction_type=v_prediction, rescale_betas_zero_snr=True" in text
    )
    assert "the pipeline has a DDIMScheduler with prediction_type=v_prediction, rescale_betas_zero_snr=False" in text
    exec(line, {"pipe": tiny_pipe})
    assert tiny_pipe.scheduler.alphas_cumprod[-1] == 0 and tiny_pipe.scheduler.config.timestep_spacing == "trailing"
    atomdiff.unload_atoms(tiny_pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atomdiff.load_atoms(tiny_pipe, path, "mug")


@pytest.mark.parametrize("shift", [10**400, 1e-320, 1e308])
def test_a_shift_that_cannot_be_is_no_shift(tiny_pipe, tmp_path, shift):
    train(tiny_pipe)
    training = {"config": {"prediction_type": "flow", "flow_shift": shift}}
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", training=training)
    atomdiff.unload_atoms(tiny_pipe)
    with pytest.warns(UserWarning, match="was trained for a .* with prediction_type=flow, flow_shift=1.0"):
        atomdiff.load_atoms(tiny_pipe, path)


def test_a_warning_of_the_scheduler_that_is_an_error_leaves_the_pipeline_as_it_was(tiny_pipe, tmp_path):
    train(tiny_pipe, word="ohwx")
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", training=V_ZERO_SNR)
    atomdiff.unload_atoms(tiny_pipe)
    before = bits(tiny_pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="was trained for"):
            atomdiff.load_atoms(tiny_pipe, path)
    assert not atomdiff.list_atoms(tiny_pipe)
    assert_same_bits(bits(tiny_pipe), before)


@pytest.mark.slow
def test_a_concept_loads_whatever_the_scheduler(tiny_pipe, tmp_path):
    train(tiny_pipe)
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", training=V_ZERO_SNR)
    atomdiff.unload_atoms(tiny_pipe)
    tiny_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.warns(UserWarning, match="'mug' was trained with another scheduler .*FlowMatchEuler.*no noise sched"):
        atomdiff.load_atoms(tiny_pipe, path)
    tiny_pipe.scheduler = None
    atomdiff.load_atoms(tiny_pipe, read_concept_file(path), "again")
    assert [concept.name for concept in atomdiff.list_atoms(tiny_pipe)] == ["mug", "again"]
