import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from atomdiff.base_model import load_base, training_resolution, whole
from atomdiff.errors import UserError
from atomdiff.launch import start_accelerator
from atomdiff.train_config import TrainConfig


@pytest.fixture
def config(tiny_pipe_folder, tmp_path):
    return TrainConfig(
        pretrained_model_name_or_path=str(tiny_pipe_folder),
        instance_data_dir="photos",
        output_dir=str(tmp_path),
        class_name="mug",
        report_to=None,
    )


def test_the_base_without_what_training_does_not_need(config):
    pipe = load_base(config)
    assert pipe.safety_checker is None
    assert load_base(config, unet=pipe.unet).unet is pipe.unet


def test_other_pipelines_are_refused(config, tiny_pipe_folder, tmp_path):
    for file in Path(tiny_pipe_folder).iterdir():
        (tmp_path / file.name).symlink_to(file)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionImg2ImgPipeline"}))
    with pytest.raises(UserError, match="a StableDiffusionImg2ImgPipeline; expected a StableDiffusionPipeline"):
        load_base(dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path)))


def test_the_resolution_is_the_bases_own_unless_given(config, tiny_pipe):
    assert training_resolution(config, tiny_pipe) == 32
    assert training_resolution(dataclasses.replace(config, resolution=48), tiny_pipe) == 48
    with pytest.raises(UserError, match="resolution=36: this base needs a multiple of 8"):
        training_resolution(dataclasses.replace(config, resolution=36), tiny_pipe)


def test_parts_that_were_let_go_come_back_for_a_while(config, tiny_pipe):
    expected = tiny_pipe.vae.state_dict()
    tiny_pipe.vae = None
    unet, text_encoder = tiny_pipe.unet, tiny_pipe.text_encoder
    with whole(config, tiny_pipe):
        assert all(torch.equal(value, expected[name]) for name, value in tiny_pipe.vae.state_dict().items())
        assert tiny_pipe.unet is unet and tiny_pipe.text_encoder is text_encoder
    assert tiny_pipe.vae is None


@pytest.mark.parametrize(
    ("field", "package"),
    [("use_8bit_adam", "bitsandbytes"), ("enable_xformers_memory_efficient_attention", "xformers")],
)
def test_missing_packages_are_user_errors(config, field, package):
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=rf"{field}=True: {package} is missing; pip install"):
        start_accelerator(dataclasses.replace(config, **{field: True}))


def test_fp16_needs_a_gpu(config):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match="mixed_precision='fp16'"):
        start_accelerator(dataclasses.replace(config, mixed_precision="fp16"))
    assert start_accelerator(dataclasses.replace(config, mixed_precision="bf16")).mixed_precision == "bf16"
