"""A base architecture is one class: here one with another denoiser, conditioning and names, and nothing else for it."""

import dataclasses
from pathlib import Path

import diffusers
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

import atomdiff
from atomdiff.bases.base import PromptEmbeds
from atomdiff.bases.find import BASES, find_base, register_base
from atomdiff.bases.stable_diffusion import StableDiffusion
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.export.export import ExportConfig, export_concepts
from atomdiff.export.kohya import layer_name
from atomdiff.training.dreambooth import TrainConfig, train
from tests.helpers import generate_image, read_log, write_images


class TinyPipeline(StableDiffusionPipeline):
    """Its denoiser is called `painter`, and attends to every prompt twice as strongly."""

    def __init__(self, vae, text_encoder, tokenizer, painter: diffusers.UNet2DConditionModel, scheduler):
        diffusers.DiffusionPipeline.__init__(self)
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, painter=painter, scheduler=scheduler
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._is_unet_config_sample_size_int = True
        self.image_processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def unet(self):
        return self.painter

    safety_checker = feature_extractor = image_encoder = None

    def encode_prompt(self, *args, **kwargs):
        return tuple(2 * embeds for embeds in super().encode_prompt(*args, **kwargs))


class TinyBase(StableDiffusion):
    name, pipeline_class, pipeline_options, checkpoint_types = "Tiny", "TinyPipeline", {}, ()
    architectures = {"tiny-v1": "tiny"}
    denoiser = "painter"
    layer_prefixes = {"painter": ("lora_painter",), "text_encoder": ("lora_tiny_te",)}
    embedding_names = {"text_encoder": "tiny_params"}

    def matches(self, components):
        return "painter" in components

    def architecture(self, pipe):
        return "tiny-v1"

    def encode_prompts(self, text_encoders, token_ids):
        return PromptEmbeds(2 * super().encode_prompts(text_encoders, token_ids).prompt_embeds, None)


@pytest.fixture
def base(monkeypatch):
    monkeypatch.setattr(diffusers, "TinyPipeline", TinyPipeline, raising=False)
    base = TinyBase()
    register_base(base)
    yield base
    BASES.remove(base)


@pytest.fixture
def folder(base, tiny_pipe, tmp_path):
    parts = {name: getattr(tiny_pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    TinyPipeline(**parts, painter=tiny_pipe.unet).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def config(folder, tmp_path):
    images = write_images(tmp_path / "images", widths=[32])
    return TrainConfig(
        pretrained_model_name_or_path=str(folder),
        instance_data_dir=str(images),
        output_dir=str(tmp_path / "out"),
        class_name="teapot",
        max_train_steps=2,
        learning_rate=0.05,
        validation_steps=2,
        num_inference_steps=2,
        report_to=None,
    )


@pytest.mark.slow
def test_a_base_trains_loads_generates_and_exports_by_its_names(base, config, tmp_path):
    concept = train(config)
    assert len(list(Path(config.output_dir).glob("validation/*.png"))) == 2
    contents = read_concept_file(concept)
    assert all(module.startswith("painter.") for module in contents.layers) and contents.layers
    assert contents.modelspec["architecture"] == "tiny-v1/atoms" and contents.modelspec["resolution"] == "32x32"

    pipe = TinyPipeline.from_pretrained(config.pretrained_model_name_or_path)
    assert find_base(pipe.components) is base

    before = generate_image(pipe, "a sks teapot")
    atomdiff.load_atoms(pipe, concept, "teapot")
    assert np.abs(generate_image(pipe, "a sks teapot") - before).max() > 1e-3
    atomdiff.unload_atoms(pipe, "teapot")
    assert np.array_equal(generate_image(pipe, "a sks teapot"), before)
    assert layer_name(pipe, "painter", "conv_in") == "lora_painter_conv_in"

    exported = export_concepts(
        ExportConfig(config.pretrained_model_name_or_path, (str(concept),), "lora", str(tmp_path / "teapot"), rank=4)
    )
    with safe_open(exported.path, "pt") as file:
        assert all(key.startswith("lora_painter_") for key in file.keys())  # noqa: SIM118
        assert file.metadata()["ss_base_model_version"] == "tiny"
        assert file.metadata()["modelspec.architecture"] == "tiny-v1/lora"
    with safe_open(exported.embeddings["sks"], "pt") as file:
        assert list(file.keys()) == ["tiny_params"]
    atomdiff.load_atoms(pipe, exported.path, "again")
    assert np.abs(generate_image(pipe, "a sks teapot") - before).max() > 1e-3


@pytest.mark.slow
def test_training_conditions_on_what_the_pipeline_does(base, config, folder):
    """The loss of a step is another than that of the same weights as Stable Diffusion, whose embeddings are half."""

    def losses(config):
        train(config)
        return [line["loss"] for line in read_log(config)]

    config = dataclasses.replace(config, validation_steps=0, logging_steps=1, train_token=False)
    doubled = losses(config)
    base.encode_prompts = super(TinyBase, base).encode_prompts
    assert losses(dataclasses.replace(config, output_dir=config.output_dir + "-half")) != doubled
