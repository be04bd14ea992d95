"""Whole runs on a tiny pipeline of each architecture."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from atomdiff.cli.summary import describe
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.concepts.parameter_count import count_parameters
from atomdiff.pipelines.load import load_atoms, unload_atoms
from atomdiff.sampling.config import SampleConfig
from atomdiff.sampling.sample import save_samples
from atomdiff.training.dreambooth import train
from atomdiff.tuner import AtomConfig
from tests.helpers import assert_unchanged, concept_bytes, generate_image, read_log, snapshot

pytestmark = pytest.mark.slow

KINDS = ["tiny_sd2_pipe", "tiny_xl_pipe"]
PROMPT = "a photo of sks teapot"


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def config(train_config, kind, request):
    folder = request.getfixturevalue(f"{kind}_folder")
    return train_config(pretrained_model_name_or_path=str(folder), learning_rate=0.05)


@pytest.fixture
def pipe(kind, request):
    return request.getfixturevalue(kind)


def test_a_run_with_class_images_and_a_sheet_gives_a_concept(config, pipe, tmp_path, kind):
    config = dataclasses.replace(
        config, with_prior_preservation=True, num_class_images=2, validation_steps=2, checkpointing_steps=2
    )
    concept = train(config)
    assert [line["step"] for line in read_log(config)] == [1, 2, 3]
    folder = Path(config.output_dir)
    assert len(list((folder / "class_images").glob("*.png"))) == 2
    assert len(list(folder.glob("validation/step-*.png"))) == 3  # before, at step 2, at the end

    again = dataclasses.replace(config, resume_from_checkpoint=str(folder / "checkpoint-2"), max_train_steps=3)
    first = concept_bytes(concept)
    assert concept_bytes(train(again)) == first

    before, base = snapshot(pipe), generate_image(pipe, PROMPT)
    load_atoms(pipe, concept, "teapot")
    assert np.abs(generate_image(pipe, PROMPT) - base).max() > 1e-3
    unload_atoms(pipe, "teapot")
    assert_unchanged(pipe, before)
    assert np.array_equal(generate_image(pipe, PROMPT), base)

    contents = read_concept_file(concept)
    encoders = {name for name in pipe.components if name.startswith("text_encoder")}
    assert set(contents.tokens["sks"]) == encoders
    architecture = "stable-diffusion-xl-v1-base" if "xl" in kind else "stable-diffusion"
    assert contents.modelspec["architecture"] == f"{architecture}/atoms"
    assert contents.modelspec["prediction_type"] == ("epsilon" if "xl" in kind else "v")
    assert architecture in describe(concept, config.pretrained_model_name_or_path)

    folder = save_samples(
        SampleConfig(
            config.pretrained_model_name_or_path,
            str(tmp_path / "samples"),
            concepts=(str(concept),),
            prompts=(PROMPT,),
            num_inference_steps=2,
        )
    )
    assert (folder / "grid.png").is_file()


def test_bf16_and_gradient_checkpointing_go_through(config, half_precision):
    precise = {"gradient_checkpointing": True, "mixed_precision": half_precision}
    train(dataclasses.replace(config, **precise, validation_steps=3))
    assert all(np.isfinite(line["loss"]) for line in read_log(config))


def test_numbers_are_counted_without_weights(config):
    counted = count_parameters(config.pretrained_model_name_or_path, AtomConfig())
    concept = read_concept_file(train(dataclasses.replace(config, max_train_steps=1, train_token=False)))
    tensors = [(kind, tensor) for layer in concept.layers.values() for kind, tensor in layer.items()]
    trained = sum(tensor.numel() for kind, tensor in tensors if kind.endswith("_delta"))
    assert counted.num_trainable_parameters == trained
