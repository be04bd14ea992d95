"""Pipelines that users name: damaged ones and other kinds are refused."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from atomdiff.pipelines.config import BaseModelConfig
from atomdiff.pipelines.open import open_base, open_pipeline
from atomdiff.utils.errors import UserError

DAMAGES = {
    "an index that is a list": ("model_index.json", b"[]"),
    "an index that is null": ("model_index.json", b"null"),
    "an index without a class": ("model_index.json", b"{}"),
    "an unknown class": ("model_index.json", b'{"_class_name": "FooPipeline"}'),
    "an empty text encoder": ("text_encoder/model.safetensors", b""),
    "a torn text encoder": ("text_encoder/model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
    "no tokenizer": ("tokenizer", None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_of_a_pipeline_is_a_user_error(tiny_pipe_folder, tmp_path, damage):
    folder, (name, content) = shutil.copytree(tiny_pipe_folder, tmp_path / "base"), DAMAGES[damage]
    if content is None:
        shutil.rmtree(folder / name)
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded|lacks files of its tokenizer"):
        open_pipeline(str(folder))


def test_what_wants_text_to_image_says_which_field_names_another_pipeline(tiny_pipe_folder, tmp_path):
    folder = shutil.copytree(tiny_pipe_folder, tmp_path / "base")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"))
    with pytest.raises(UserError, match="base=.*: found a StableDiffusionInpaintPipeline; expected a pipeline of"):
        open_base(BaseModelConfig(pretrained_model_name_or_path=str(folder)), field="base")


def test_a_folder_that_lacks_weights_is_refused_before_they_are_used(tiny_pipe_folder, tmp_path):
    folder = shutil.copytree(tiny_pipe_folder, tmp_path / "base")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({key: value for key, value in weights.items() if key != "conv_in.weight"}, file)
    with pytest.raises(UserError, match="lacks weights of its unet: copy it again"):
        open_pipeline(str(folder))
