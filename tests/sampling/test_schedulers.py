"""Each image is generated with the scheduler that its concepts were trained for."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import atomdiff
from atomdiff.concepts.concept_file import CONCEPT_SUFFIX
from atomdiff.pipelines.scheduler import schedule_settings
from atomdiff.sampling import sample
from atomdiff.sampling.generate import generate
from atomdiff.sampling.sample import save_samples
from atomdiff.training.config import TrainConfig
from atomdiff.training.dreambooth import train
from atomdiff.training.noise import set_training_scheduler
from atomdiff.utils.errors import UserError
from tests.sampling.helpers import QUICK, generate_alone, image_of, pixels

ROOT = Path(__file__).parents[2]


OBJECTIVES = {  # the tiny base predicts v, without zero terminal SNR
    "noise": {"prediction_type": "epsilon"},
    "clean": {"prediction_type": "sample"},
    "zero": {"rescale_betas_zero_snr": True},
    "flow": {"prediction_type": "flow", "flow_shift": 3.0},
    "same": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False},
    "plain": {},
}


@pytest.fixture(scope="module")
def trained(tiny_pipe_folder, tmp_path_factory):
    """Concepts of one step each, by schedule, and one of another method; and their runs."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "photos").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "photos" / "0.png")
    runs = {}
    for name, fields in [*OBJECTIVES.items(), ("lora", OBJECTIVES["noise"])]:
        runs[name] = TrainConfig(
            pretrained_model_name_or_path=str(tiny_pipe_folder),
            instance_data_dir=str(folder / "photos"),
            class_name="mug",
            output_dir=str(folder / "runs" / name),
            adapter=str(ROOT / "configs/experiments/lora/attention_r16/adapter.json") if name == "lora" else "atoms",
            max_train_steps=1,
            validation_steps=0,
            report_to=None,
            **fields,
        )
        path = train(runs[name])
        path.rename(folder / f"{name}{'' if path.is_dir() else CONCEPT_SUFFIX}")
    return folder, runs


@pytest.fixture
def used(monkeypatch):
    """Records the scheduler of each batch with its prompts."""
    schedulers, generate_each = [], sample.generate_each
    monkeypatch.setattr(
        sample,
        "generate_each",
        lambda pipe, prompts, *a, **k: schedulers.append(pipe.scheduler) or generate_each(pipe, prompts, *a, **k),
    )
    return schedulers


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OBJECTIVES, "lora"])
def test_a_concept_is_generated_with_its_training_scheduler(config, trained, used, tiny_pipe, capsys, name):
    folder, runs = trained
    path = folder / name if name == "lora" else folder / f"{name}{CONCEPT_SUFFIX}"
    config = replace(config, prompts=("a photo of sks mug",), seeds=(0,), concepts=(str(path),))
    save_samples(config)
    (scheduler,) = used
    base = tiny_pipe.scheduler
    set_training_scheduler(runs[name], tiny_pipe)  # as validation does
    assert type(scheduler) is type(tiny_pipe.scheduler)
    assert schedule_settings(scheduler) == schedule_settings(tiny_pipe.scheduler)
    assert scheduler.config.get("timestep_spacing") == {"zero": "trailing", "flow": None}.get(name, "leading")
    atomdiff.load_atoms(tiny_pipe, path)  # warns of nothing
    expected = generate(tiny_pipe, ["a photo of sks mug"], seeds=[0], progress=False, **QUICK)[0]
    assert abs(image_of(config, "a photo of sks mug") - pixels(expected)).max() <= 1
    printed = capsys.readouterr().out
    if name in ("same", "plain"):
        assert printed == "" and tiny_pipe.scheduler is base
    else:
        assert f"{name}: generated with a {type(scheduler).__name__} with prediction_type=" in printed
        assert (
            "the base has a DDIMScheduler with prediction_type=v_prediction, rescale_betas_zero_snr=False\n" in printed
        )
        assert abs(image_of(config, "a photo of sks mug") - generate_with(tiny_pipe, base)).max() > 2


def generate_with(pipe, scheduler):
    pipe.scheduler = scheduler
    return pixels(generate(pipe, ["a photo of sks mug"], seeds=[0], progress=False, **QUICK)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_each_prompt_is_generated_as_its_own_concepts_were_trained(config, trained, used, tiny_pipe, capsys):
    names = {"a cat": None, "sks mug <atoms:noise>": "noise", "a mug <atoms:zero>": "zero", "a mug <atoms:plain>": None}
    names |= {"a robot <atoms:noise:0.5>": "noise", "a mug <atoms:noise:0>": None}
    config = replace(config, library=str(trained[0]), prompts=tuple(names), seeds=(0,), sample_batch_size=6)
    save_samples(config)
    settings = [schedule_settings(scheduler) for scheduler in used]
    assert len(settings) == 3 and sum(each == schedule_settings(tiny_pipe.scheduler) for each in settings) == 1
    shown = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(":")[0] for line in shown) == ["noise", "zero"]
    assert abs(image_of(config, "a cat") - generate_alone(tiny_pipe, trained[0], "a cat", {})).max() <= 1
    set_training_scheduler(trained[1]["noise"], tiny_pipe)
    expected = generate_alone(tiny_pipe, trained[0], "a robot", {"noise": 0.5})
    assert abs(image_of(config, "a robot <atoms:noise:0.5>") - expected).max() <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_a_prompt_with_concepts_of_two_schedulers_is_refused_unless_one_is_chosen(config, trained, used):
    prompts = ("a cat", "a sks mug <atoms:zero>")
    both = {"library": str(trained[0]), "concepts": (str(trained[0] / f"plain{CONCEPT_SUFFIX}"),), "seeds": (0,)}
    config = replace(config, prompts=prompts, **both, trigger_words=("zwx",))
    with pytest.raises(
        UserError, match=r"the prompt 'a sks mug <atoms:zero>': .*'plain' for a DDIM.*'zero' for a DDIM"
    ):
        save_samples(config)
    assert not used  # before anything is generated
    save_samples(replace(config, rescale_betas_zero_snr=False))
    assert [scheduler.config.get("rescale_betas_zero_snr") for scheduler in used] == [False]


@pytest.mark.parametrize(
    ("name", "asked", "settings"),
    [
        ("noise", {"rescale_betas_zero_snr": False}, {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}),
        ("flow", {"prediction_type": "flow"}, {"prediction_type": "flow", "flow_shift": 3.0}),
    ],
)
def test_what_is_not_chosen_stays_as_trained(config, trained, used, name, asked, settings):
    path = str(trained[0] / f"{name}{CONCEPT_SUFFIX}")
    save_samples(replace(config, prompts=("a sks mug",), seeds=(0,), concepts=(path,), **asked))
    assert [schedule_settings(scheduler) for scheduler in used] == [settings]


def test_a_choice_against_the_training_is_reported_in_a_line(config, trained, used, capsys):
    config = replace(config, prompts=("a sks mug",), seeds=(0,), concepts=(str(trained[0] / "lora"),))
    save_samples(replace(config, prediction_type="v_prediction"))  # warns of nothing
    printed = capsys.readouterr().out
    chosen = "lora: generated with a DDIMScheduler with prediction_type=v_prediction, rescale_betas_zero_snr=False"
    assert (
        printed == f"{chosen}; trained for a DDIMScheduler with prediction_type=epsilon, rescale_betas_zero_snr=False\n"
    )


@pytest.mark.slow
def test_a_lora_that_does_not_tell_its_training_is_generated_with_any_concept(config, trained, used, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(trained[0] / "lora", foreign, ignore=shutil.ignore_patterns("learned_embeds*"))
    weights = foreign / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    concepts = (str(foreign), str(trained[0] / f"flow{CONCEPT_SUFFIX}"))
    save_samples(replace(config, prompts=("a sks mug",), seeds=(0,), concepts=concepts))
    assert [schedule_settings(scheduler)["prediction_type"] for scheduler in used] == ["flow"]


@pytest.mark.slow
def test_what_is_predicted_can_be_chosen(config, used, tiny_pipe, capsys):
    config = replace(config, prompts=("a mug",), seeds=(0,))
    plain = (save_samples(config), image_of(config, "a mug"))[1]
    chosen = replace(config, prediction_type="epsilon")
    save_samples(chosen)
    assert [scheduler.config.prediction_type for scheduler in used] == ["v_prediction", "epsilon"]
    assert abs(image_of(chosen, "a mug") - plain).max() > 2
    assert "the base: generated with a DDIMScheduler with prediction_type=epsilon" in capsys.readouterr().out
    save_samples(config)  # generated again
    assert len(used) == 3 and np.array_equal(image_of(config, "a mug"), plain)
    with pytest.raises(UserError, match="prediction_type='noise': expected one of"):
        replace(config, prediction_type="noise")
    with pytest.raises(UserError, match="epsilon does not determine the image"):
        save_samples(replace(chosen, rescale_betas_zero_snr=True))
