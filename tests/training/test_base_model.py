"""The base of a run: which are taken, their parts, and images by them."""

import dataclasses
import json
import shutil

import pytest
import torch

from atomdiff.training.base_model import all_parts_loaded, copy_base, generate_images, load_base, training_resolution
from atomdiff.utils.errors import UserError
from tests.helpers import assert_same_models, assert_unchanged, based_on, models, snapshot

KINDS = ["tiny_pipe", "tiny_sd2_pipe", "tiny_xl_pipe"]


@pytest.fixture
def config(train_config):
    return train_config(instance_data_dir="photos", class_name="mug")


def test_the_base_without_what_training_does_not_need(config):
    pipe = load_base(config)
    assert pipe.safety_checker is None
    assert load_base(config, unet=pipe.unet).unet is pipe.unet


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_base_loads_from_its_folder(config, kind, request):
    pipe = request.getfixturevalue(kind)
    loaded = load_base(based_on(config, request.getfixturevalue(f"{kind}_folder")))
    assert type(loaded) is type(pipe)
    assert_same_models(loaded, pipe)
    assert training_resolution(config, loaded) == 32


@pytest.mark.parametrize(
    ("kind", "changes", "found"),
    [
        ("tiny_pipe", {"_class_name": "StableDiffusionImg2ImgPipeline"}, "found a StableDiffusionImg2ImgPipeline; exp"),
        ("tiny_pipe", {"_class_name": "FluxPipeline"}, "found a FluxPipeline; expected a pipeline of Stable Diffusion"),
        ("tiny_xl_pipe", {"text_encoder": [None, None]}, "without text_encoder, such as a refiner"),
    ],
)
def test_other_pipelines_are_refused(config, kind, changes, found, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(f"{kind}_folder"), tmp_path / "base")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
    with pytest.raises(UserError, match=found):
        load_base(based_on(config, folder))


def test_an_inpainting_unet_is_refused(config, tiny_pipe, tmp_path):
    fields = {key: value for key, value in tiny_pipe.unet.config.items() if not key.startswith("_")}
    tiny_pipe.register_modules(unet=type(tiny_pipe.unet)(**fields | {"in_channels": 9}))
    tiny_pipe.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="a UNet of 9 channels, as for inpainting, with a VAE of 4"):
        load_base(based_on(config, tmp_path / "base"))


def test_the_resolution_is_the_bases_own_unless_given(config, tiny_pipe):
    assert training_resolution(config, tiny_pipe) == 32
    assert training_resolution(dataclasses.replace(config, resolution=48), tiny_pipe) == 48
    with pytest.raises(UserError, match="resolution=36: this base needs a multiple of 8"):
        training_resolution(dataclasses.replace(config, resolution=36), tiny_pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_were_freed_are_reloaded_for_a_while(config, kind, request):
    pipe = request.getfixturevalue(kind)
    config = based_on(config, request.getfixturevalue(f"{kind}_folder"))
    freed = [name for name in models(pipe) if name != "unet"]
    expected = {name: models(pipe)[name].state_dict() for name in freed}
    unet = pipe.unet
    for name in freed:
        setattr(pipe, name, None)
    with all_parts_loaded(config, pipe):
        for name in freed:
            state = models(pipe)[name].state_dict()
            assert all(torch.equal(value, expected[name][key]) for key, value in state.items())
        assert pipe.unet is unet
    assert all(getattr(pipe, name) is None for name in freed)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_decoded_in_float32_under_autocast(config, kind, request, monkeypatch):
    pipe = request.getfixturevalue(kind)
    decoded, decode = [], pipe.vae.decoder.forward
    monkeypatch.setattr(pipe.vae.decoder, "forward", lambda x, *a: decoded.append(decode(x, *a)) or decoded[-1])
    with torch.autocast("cpu", torch.bfloat16):
        images = generate_images(config, pipe, 32, ["a mug", "a cat"], [0, 1])
    assert [image.size for image in images] == [(32, 32)] * 2
    assert {output.dtype for output in decoded} == {torch.float32}
    assert "decode" not in vars(pipe.vae)


def test_copies_of_a_base_share_weights_only_if_asked(tiny_pipe):
    before = snapshot(tiny_pipe)
    shared, own = (copy_base(tiny_pipe, share_weights=share) for share in (True, False))
    weight = tiny_pipe.unet.conv_in.weight
    assert shared.unet.conv_in.weight.data_ptr() == weight.data_ptr() != own.unet.conv_in.weight.data_ptr()
    assert shared.text_encoder.get_input_embeddings().weight.data_ptr() not in {
        parameter.data_ptr() for parameter in tiny_pipe.text_encoder.parameters()
    }
    shared.unet.to(torch.bfloat16).requires_grad_(False)
    assert weight.dtype == torch.float32 and weight.requires_grad
    assert_unchanged(tiny_pipe, before)
