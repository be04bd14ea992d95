"""Which scheduler draws a concept as it was trained."""

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

from atomdiff.pipelines.scheduler import (
    Objective,
    code_for,
    common_scheduler,
    fitting_scheduler,
    scheduler_for,
    settings_of,
    trained_objective,
)
from atomdiff.sampling.sample import generate
from atomdiff.utils.errors import UserError

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@pytest.mark.parametrize(
    ("training", "found"),
    [
        ({"config": {**ZERO_SNR, "flow_shift": None, "seed": 1}}, Objective("v_prediction", True)),
        ({"config": {"prediction_type": "flow", "flow_shift": 3}}, Objective("flow", None, 3.0)),
        ({}, Objective()),
        ({"config": ["flow"]}, Objective()),
        ({"config": {"prediction_type": ["flow"], "rescale_betas_zero_snr": "yes", "flow_shift": True}}, Objective()),
        ({"config": {"prediction_type": "noise", "flow_shift": float("nan")}}, Objective()),
        ({"config": {"flow_shift": -1}}, Objective()),
        ({"config": {"flow_shift": 10**400}}, Objective()),
        ({"config": {"flow_shift": 1e308}}, Objective()),
        ({"config": {"flow_shift": 1e-320}}, Objective()),
        ({"config": {"flow_shift": 1000}}, Objective(flow_shift=1000.0)),
    ],
)
def test_an_objective_is_what_can_be_of_the_facts_of_a_run(training, found):
    assert Objective.read(training) == found


def test_where_nothing_can_be_read_nothing_is_known(tmp_path):
    assert trained_objective(tmp_path) is trained_objective(tmp_path / "missing") is None
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 50)
    assert trained_objective(tmp_path) is None
    for facts in ({}, {"training": "[" * 100_000}, {"training": '{"config": {"prediction_type": "flow"}'}):
        save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors", facts)
        assert trained_objective(tmp_path) is None


@pytest.mark.parametrize(
    ("scheduler", "objective"),
    [
        (PNDMScheduler(**STABLE), Objective()),
        (PNDMScheduler(**STABLE), Objective("epsilon")),
        (PNDMScheduler(**STABLE), Objective("epsilon", False)),
        (EulerDiscreteScheduler(**ZERO_SNR, timestep_spacing="leading"), Objective("v_prediction", True)),
        (EulerDiscreteScheduler(**ZERO_SNR), Objective()),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), Objective("flow", None, 3.0)),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", flow_shift=3.0), Objective("flow", None, 3.0)),
    ],
)
def test_a_scheduler_that_says_the_same_stays(scheduler, objective):
    assert fitting_scheduler(objective, scheduler) is scheduler
    assert common_scheduler([("mug", objective), ("cat", Objective())], scheduler) is scheduler


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (Objective("v_prediction"), {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}),
        (Objective("sample"), {"prediction_type": "sample", "rescale_betas_zero_snr": False}),
        (Objective("v_prediction", True), ZERO_SNR),
        (Objective("flow"), {"prediction_type": "flow", "flow_shift": 1.0}),
        (Objective("flow", None, 2.5), {"prediction_type": "flow", "flow_shift": 2.5}),
    ],
)
@pytest.mark.parametrize("base", [PNDMScheduler(**STABLE), DDIMScheduler(num_train_timesteps=500)])
def test_the_code_makes_the_scheduler_that_draws_as_trained(base, objective, settings, tiny_pipe):
    wanted = fitting_scheduler(objective, base)
    assert settings_of(wanted) == settings
    wanted = scheduler_for(tiny_pipe, wanted)
    tiny_pipe.scheduler = base
    exec(code_for(wanted, base), {"pipe": tiny_pipe, "diffusers": diffusers})
    found, expected = tiny_pipe.scheduler, wanted
    assert type(found) is type(expected)
    without = [{key: value for key, value in each.config.items() if key[0] != "_"} for each in (found, expected)]
    assert without[0] == without[1]
    if objective.rescale_betas_zero_snr:
        assert found.config.timestep_spacing == "trailing" and found.alphas_cumprod[-1] == 0
    picture = tiny_pipe("a mug", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    tiny_pipe.scheduler = wanted
    (expected,) = generate(tiny_pipe, ["a mug"], seeds=[0], num_inference_steps=2, progress=False)
    assert picture.tobytes() == expected.tobytes()


def test_concepts_of_different_schedulers_have_none_in_common():
    base = DDIMScheduler()
    both = [("mug", Objective("v_prediction")), ("cat", Objective("v_prediction", False))]
    assert common_scheduler(both, base).config.prediction_type == "v_prediction"
    apart = r"different schedulers: 'mug' for a DDIM.*=v_prediction.*, 'cat' for a .*=epsilon.*; one by one"
    with pytest.raises(UserError, match=apart):
        common_scheduler([both[0], ("cat", Objective())], base, advice="one by one")
    asked = Objective("sample")
    for concepts in ([both[0], ("cat", Objective())], []):
        assert settings_of(common_scheduler(concepts, base, asked))["prediction_type"] == "sample"
    with pytest.raises(UserError, match="no scheduler draws the concept 'mug': .*epsilon says nothing"):
        common_scheduler([("mug", Objective(None, True))], base)


@pytest.mark.parametrize(
    ("objective", "asked", "expected"),
    [
        (Objective("epsilon"), Objective(None, False), Objective("epsilon", False)),
        (Objective("v_prediction", True), Objective("sample"), Objective("sample", True)),
        (Objective("flow", None, 3.0), Objective("flow"), Objective("flow", None, 3.0)),
        (Objective("flow", None, 3.0), Objective(None, False), Objective("flow", False, 3.0)),
        (Objective("flow", None, 3.0), Objective("epsilon"), Objective("epsilon")),
        (Objective("v_prediction", True), Objective("flow"), Objective("flow")),
        (Objective("flow", None, 3.0), Objective(), Objective("flow", None, 3.0)),
    ],
)
def test_what_is_asked_for_leaves_the_rest_as_trained(objective, asked, expected):
    assert objective.changed(asked) == expected


def test_diffusers_takes_the_steps_of_euler_for_flow(tiny_pipe):
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert scheduler_for(SimpleNamespace(components={"transformer": None}), flow) is flow
    assert scheduler_for(tiny_pipe, tiny_pipe.scheduler) is tiny_pipe.scheduler
    solver = scheduler_for(tiny_pipe, flow)
    assert settings_of(solver) == settings_of(flow)
    solver.set_timesteps(5)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep, level, following in zip(solver.timesteps, solver.sigmas[:-1], solver.sigmas[1:], strict=True):
        assert abs(level * 1000 - timestep) < 1  # as in training
        velocity = latents.flip(-1).sin()
        expected = latents + (following - level) * velocity
        latents = solver.step(velocity, timestep, latents).prev_sample
        torch.testing.assert_close(latents, expected)
    assert solver.sigmas[0] > 0.999 and solver.sigmas[-1] == 0


def test_flow_is_drawn_alike_by_both_schedulers(tiny_pipe):
    drawn = []
    for scheduler in (flow := FlowMatchEulerDiscreteScheduler(shift=3.0), scheduler_for(tiny_pipe, flow)):
        tiny_pipe.scheduler = scheduler
        (picture,) = generate(tiny_pipe, ["a mug"], seeds=[0], num_inference_steps=25, progress=False)
        drawn.append(np.asarray(picture).astype(int))
    assert abs(drawn[0] - drawn[1]).mean() < 2
