"""Bases that are one checkpoint file, in the layout of the original code."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS as CHECKPOINTS
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from PIL import Image
from safetensors.torch import save_file

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.pipelines.open import open_pipeline, pipeline_class, stored_dtype
from atomdiff.sampling.config import SampleConfig
from atomdiff.sampling.generate import generate
from atomdiff.sampling.sample import save_samples
from atomdiff.training.base_model import all_parts_loaded, generate_images, load_base
from atomdiff.training.dreambooth import train
from atomdiff.utils.errors import UserError
from tests.helpers import assert_same_models, based_on, models


@pytest.fixture
def config(train_config):
    return train_config(instance_data_dir="photos", class_name="mug")


# The layout of the original code's checkpoints, written by the rules of its module names.

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def original_unet_name(unet, key):
    """The name of a UNet's tensor; blocks are counted through, with a place for each resampling."""
    layers = unet.config.layers_per_block + 1
    path, _, leaf = key.rpartition(".")
    if path in UNET_ENDS:
        return f"{UNET_ENDS[path]}.{leaf}"
    if path.startswith("mid_block"):
        _, kind, number, *rest = path.split(".")
        name = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        side, block, kind, number, *rest = path.split(".")
        if side == "down_blocks":
            place = 1 + int(block) * layers + (layers - 1 if kind == "downsamplers" else int(number))
            name = f"input_blocks.{place}.{1 if kind == 'attentions' else 0}"
        else:
            attends = "CrossAttn" in unet.config.up_block_types[int(block)]
            place = int(block) * layers + (layers - 1 if kind == "upsamplers" else int(number))
            index = {"resnets": 0, "attentions": 1, "upsamplers": 1 + attends}[kind]
            name = f"output_blocks.{place}.{index}"
    if kind == "resnets":
        rest = [RESNET[rest[0]]]
    if kind == "downsamplers":
        rest = ["op"]
    return ".".join([name, *rest, leaf])


def original_vae(vae):
    blocks, found = len(vae.config.block_out_channels), {}
    for key, value in vae.state_dict().items():
        parts = key.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            side, up = ("down", False) if parts[1] == "down_blocks" else ("up", True)
            number = blocks - 1 - int(parts[2]) if up else int(parts[2])
            inner = ["block", parts[4]] if parts[3] == "resnets" else [f"{side}sample"]
            parts = [parts[0], side, str(number), *inner, *parts[5:]]
        elif parts[1] == "mid_block" and parts[2] == "resnets":
            parts = [parts[0], "mid", f"block_{int(parts[3]) + 1}", *parts[4:]]
        elif parts[1] == "mid_block":
            parts = [parts[0], "mid", "attn_1", VAE_ATTENTION[".".join(parts[4:-1])], parts[-1]]
            value = value[:, :, None, None] if value.ndim == 2 else value
        name = ".".join(parts).replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        found[f"first_stage_model.{name}"] = value
    return found


def original_clip(encoder, prefix):
    state = encoder.state_dict()
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}


def original_open_clip(encoder, prefix, projection):
    """The text encoder of SD 2.x, the second of SDXL: queries, keys and values in one tensor."""
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    found = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
        "text_projection": projection,
    }
    state.pop("text_projection.weight", None)
    for key, value in state.items():
        name = key.replace("encoder.layers", "transformer.resblocks").replace("self_attn.out", "attn.out")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if "q_proj" in key:
            joined = torch.cat([state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            found[name.replace("self_attn.q_proj.", "attn.in_proj_")] = joined
        elif "self_attn" not in name:
            found[name] = value
    return {prefix + name: value for name, value in found.items()}


def original_layout(pipe):
    """All tensors of a pipeline as in one file of the original code."""
    found = {
        f"model.diffusion_model.{original_unet_name(pipe.unet, key)}": value
        for key, value in pipe.unet.state_dict().items()
    } | original_vae(pipe.vae)
    if "text_encoder_2" in pipe.components:
        found |= original_clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        projection = pipe.text_encoder_2.text_projection.weight.T
        found |= original_open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.", projection)
    elif pipe.unet.config.use_linear_projection:
        encoder = pipe.text_encoder
        full = type(encoder)(type(encoder.config)(**{**encoder.config.to_dict(), "num_hidden_layers": 24}))
        full.load_state_dict(encoder.state_dict(), strict=False)  # files have a last layer that SD 2.x skips
        projection = torch.randn(encoder.config.hidden_size, encoder.config.projection_dim)
        found |= original_open_clip(full, "cond_stage_model.model.", projection)
    else:
        found |= original_clip(pipe.text_encoder, "cond_stage_model.transformer.")
    return {name: value.contiguous().clone() for name, value in found.items()}


def write_checkpoint(pipe, tmp_path, suffix=".safetensors"):
    """Write a pipeline to one file, and its configs, without weights, to a folder."""
    pipe.save_pretrained(tmp_path / "configs")
    for weights in (tmp_path / "configs").rglob("*.safetensors"):
        weights.unlink()
    file = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": original_layout(pipe), "global_step": 7}, file)
    else:
        save_file(original_layout(pipe), file)
    return {"pretrained_model_name_or_path": str(file), "single_file_config": str(tmp_path / "configs")}


@pytest.fixture
def uneven_xl_pipe(tiny_xl_pipe):
    """SDXL whose text encoders differ in size, as the real ones do: by that, files tell them apart."""
    pipe, second = tiny_xl_pipe, tiny_xl_pipe.text_encoder_2
    size = {"hidden_size": 48, "intermediate_size": 96}
    pipe.register_modules(
        text_encoder_2=type(second)(type(second.config)(**second.config.to_dict() | size)).eval(),
        unet=type(pipe.unet).from_config({**pipe.unet.config, "cross_attention_dim": 32 + 48}).eval(),
    )
    return pipe


@pytest.fixture
def deep_sd2_pipe(tiny_sd2_pipe):
    """SD 2.x with as many layers in its text encoder as the real one has: diffusers counts on them; and its words."""
    pipe, encoder = tiny_sd2_pipe, tiny_sd2_pipe.text_encoder
    changes = {"num_hidden_layers": 23, "hidden_act": "gelu"}
    pipe.register_modules(text_encoder=type(encoder)(type(encoder.config)(**encoder.config.to_dict() | changes)).eval())
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("tiny_pipe", ".safetensors"),
        ("tiny_pipe", ".ckpt"),
        ("deep_sd2_pipe", ".safetensors"),
        ("deep_sd2_pipe", ".ckpt"),
        ("uneven_xl_pipe", ".safetensors"),
    ],
)
def test_a_checkpoint_file_loads_with_configs_of_its_architecture(config, kind, suffix, request, tmp_path):
    pipe = request.getfixturevalue(kind)
    config = dataclasses.replace(config, **write_checkpoint(pipe, tmp_path, suffix))
    loaded = load_base(config)
    assert_same_models(loaded, pipe)
    assert loaded.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    images = [generate_images(config, each, 32, ["a mug"], [0])[0].tobytes() for each in (loaded, pipe)]
    assert images[0] == images[1]
    loaded.vae, vae = None, loaded.vae
    with all_parts_loaded(config, loaded):
        assert_same_models(loaded, pipe)
        assert loaded.vae is not vae


def test_a_pipeline_opens_in_the_dtypes_that_it_is_stored_in(tiny_pipe, tmp_path):
    tiny_pipe.unet.to(torch.float16)
    tiny_pipe.text_encoder.to(torch.bfloat16)
    tiny_pipe.save_pretrained(tmp_path / "pipe")
    tiny_pipe.to(torch.float16)
    tiny_pipe.save_pretrained(tmp_path / "pipe", variant="fp16")
    dtypes = {"unet": torch.float16, "text_encoder": torch.bfloat16, "vae": torch.float32}
    opened = open_pipeline(str(tmp_path / "pipe"), None)
    assert {name: part.dtype for name, part in models(opened).items()} == dtypes
    opened = open_pipeline(str(tmp_path / "pipe"), None, variant="fp16")
    assert {part.dtype for part in models(opened).values()} == {torch.float16}
    tiny_pipe.unet.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.fp16-*.safetensors"))) > 1
    assert stored_dtype(tmp_path / "shards", "fp16") == torch.float16
    write_checkpoint(tiny_pipe, tmp_path)  # writes model.safetensors, all of it in float16
    opened = open_pipeline(str(tmp_path / "model.safetensors"), None, single_file_config=str(tmp_path / "configs"))
    assert {part.dtype for part in models(opened).values()} == {torch.float16}
    (tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="cannot be loaded"):
        open_pipeline(str(tmp_path / "pipe"), None)


def test_atomdiff_sample_generates_with_a_checkpoint_file(tiny_pipe, tmp_path):
    fields = write_checkpoint(tiny_pipe, tmp_path)
    folder = save_samples(
        SampleConfig(**fields, prompts=("a mug",), num_inference_steps=2, output_dir=str(tmp_path / "samples"))
    )
    assert len(list(folder.glob("*.png"))) == 2  # the image and the grid


@pytest.mark.slow
def test_every_file_of_sd2_is_taken_for_one_that_predicts_v_unless_told(config, deep_sd2_pipe, tmp_path):
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: torch.zeros(8, 1024)}, tmp_path / "2.x.safetensors")
    known = CHECKPOINTS[infer_diffusers_model_type({key: torch.zeros(8, 1024)})]["pretrained_model_name_or_path"]
    assert known == "stabilityai/stable-diffusion-2-1"  # of 768 pixels; where the configs come from if none are named
    assert pipeline_class(str(tmp_path / "2.x.safetensors")) == "StableDiffusionPipeline"

    fields = write_checkpoint(deep_sd2_pipe, tmp_path)  # the configs say v_prediction, as those of 2.1
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photos" / "0.png")
    run = dataclasses.replace(
        config, **fields, instance_data_dir=str(tmp_path / "photos"), prediction_type="epsilon", max_train_steps=1
    )
    concept = train(run)
    assert read_concept_file(concept).modelspec["prediction_type"] == "epsilon"
    sampling = SampleConfig(**fields, prompts=("a mug",), num_inference_steps=2, output_dir=str(tmp_path / "samples"))
    images = {}
    for name, changes in {
        "v": {},
        "epsilon": {"prediction_type": "epsilon"},
        "concept": {"concepts": (str(concept),), "weights": (1e-9,)},
    }.items():
        (file,) = save_samples(dataclasses.replace(sampling, **changes)).glob("a-mug*")
        images[name] = np.asarray(Image.open(file)).astype(int)
    deep_sd2_pipe.scheduler = make_scheduler(deep_sd2_pipe, "epsilon")
    (expected,) = generate(deep_sd2_pipe, ["a mug"], seeds=[0], num_inference_steps=2, progress=False)
    assert abs(images["epsilon"] - np.asarray(expected)).max() <= 1 >= abs(images["concept"] - expected).max()
    assert abs(images["v"] - expected).max() > 2


def make_scheduler(pipe, predicts):
    return type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=predicts)


class Attack:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("described_by", ["configs", None])
def test_a_ckpt_with_a_program_in_it_is_refused(config, tiny_pipe, tmp_path, described_by):
    fields = write_checkpoint(tiny_pipe, tmp_path)
    file, trap = tmp_path / "model.ckpt", tmp_path / "trap"
    file.write_bytes(pickle.dumps({"state_dict": Attack(str(trap))}))
    fields["single_file_config"] = described_by and fields["single_file_config"]
    with pytest.raises(UserError, match=r"model.ckpt' exists, but cannot be loaded.*convert it to .safetensors"):
        load_base(based_on(config, file, single_file_config=fields["single_file_config"]))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (8,)}, "is a xl_refiner"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)}, "is a inpainting"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "img_in.weight": (8, 64)}, "is a flux"),
    ],
)
def test_checkpoint_files_of_other_architectures_are_refused(config, tensors, found, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"x.safetensors' {found}.*: expected Stable Diffusion 1.x, 2.x or"):
        load_base(based_on(config, tmp_path / "x.safetensors"))


def test_a_checkpoint_file_that_does_not_fit_its_configs_is_refused(config, tiny_pipe, tiny_xl_pipe_folder, tmp_path):
    fields = write_checkpoint(tiny_pipe, tmp_path)
    wrong = {**fields, "single_file_config": str(tiny_xl_pipe_folder)}
    with pytest.raises(UserError, match="cannot be loaded as a StableDiffusionXLPipeline.*with single_file_config"):
        load_base(dataclasses.replace(config, **wrong))
    for missing in ("diffusion_model.out.2.weight", "transformer.text_model.final_layer_norm.bias"):
        tensors = original_layout(tiny_pipe)
        del tensors[next(name for name in tensors if name.endswith(missing))]
        save_file(tensors, fields["pretrained_model_name_or_path"])
        with pytest.raises(UserError, match="model.safetensors' lacks weights of a StableDiffusionPipeline"):
            load_base(dataclasses.replace(config, **fields))
    with pytest.raises(UserError, match="missing.safetensors' is not a folder or file here"):
        load_base(dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "missing.safetensors")))


def test_configs_for_a_base_that_is_no_file_are_refused(config):
    with pytest.raises(UserError, match="single_file_config='configs': describes a checkpoint file, but .* is not one"):
        load_base(dataclasses.replace(config, single_file_config="configs"))


@pytest.mark.slow
def test_another_vae(config, tiny_pipe, tmp_path):
    with torch.no_grad():
        tiny_pipe.vae.decoder.conv_out.bias += 1
    tiny_pipe.vae.save_pretrained(tmp_path / "vae")
    tiny_pipe.save_pretrained(tmp_path / "pipe")
    save_file(original_layout(tiny_pipe), tmp_path / "vae.safetensors")
    for name in ("vae", "pipe", "vae.safetensors"):
        own = dataclasses.replace(
            config,
            pretrained_vae_model_name_or_path=str(tmp_path / name),
            single_file_config=str(tmp_path / "pipe") if name.endswith(".safetensors") else None,
        )
        pipe = load_base(own)
        assert_same_models(pipe, tiny_pipe)
        pipe.vae = None
        with all_parts_loaded(own, pipe):
            assert_same_models(pipe, tiny_pipe)
    with pytest.raises(UserError, match="pretrained_vae_model_name_or_path='no/such/vae': cannot be loaded"):
        load_base(dataclasses.replace(config, pretrained_vae_model_name_or_path="no/such/vae"))
