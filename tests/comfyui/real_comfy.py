"""ComfyUI itself, from the folder that `COMFYUI_PATH` names, with models of the size of the tiny pipelines."""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.comfyui.comfy_stand_in import comfy_name
from tests.tiny_models import make_tokenizer

VOCABULARY = 49408  # rows of every embedding table in ComfyUI


def install(folder):
    """Import ComfyUI for the CPU, with models in `folder`."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import folder_paths

    folder_paths.models_dir = str(folder)
    folder_paths.folder_names_and_paths["loras"][0][:] = [str(Path(folder) / "loras")]
    return []


def unet_config(unet):
    """A UNet's settings, as ComfyUI has them."""
    config = unet.config
    is_xl = config.addition_embed_type == "text_time"
    depths = config.transformer_layers_per_block
    depths = [depths] * len(config.block_out_channels) if isinstance(depths, int) else depths
    kinds = [
        int(kind.startswith("CrossAttn")) * depth for kind, depth in zip(config.down_block_types, depths, strict=True)
    ]
    each = config.layers_per_block
    return {
        "image_size": 32,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.block_out_channels[0],
        "channel_mult": [channels // config.block_out_channels[0] for channels in config.block_out_channels],
        "num_res_blocks": [each] * len(kinds),
        "transformer_depth": [depth for depth in kinds for _ in range(each)],
        "transformer_depth_output": [depth for depth in kinds for _ in range(each + 1)],
        "transformer_depth_middle": depths[-1],
        "context_dim": config.cross_attention_dim,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config.use_linear_projection,
        "legacy": False,
        "use_temporal_attention": False,
        "num_classes": "sequential" if is_xl else None,
        "adm_in_channels": config.projection_class_embeddings_input_dim if is_xl else None,
    }


def make_model(pipe):
    """As a checkpoint loader's MODEL, with the weights of a pipeline's UNet."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    config = unet_config(pipe.unet)
    kind = comfy.supported_models.SDXL if config["num_classes"] else comfy.supported_models.SD15
    model = comfy.model_base.BaseModel(kind(config))
    keys, state = comfy.utils.unet_to_diffusers(config), pipe.unet.state_dict()
    model.diffusion_model.load_state_dict({keys[key]: value for key, value in state.items()})
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def make_clip(pipe):
    """As a checkpoint loader's CLIP, with the weights of a pipeline's text encoders and the tiny tokenizer."""
    import comfy.sd
    from comfy import sd1_clip, sdxl_clip

    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    encoders = {name: getattr(pipe, ours) for ours, name in names.items() if hasattr(pipe, ours)}
    is_xl = len(encoders) > 1
    tokenizer = partial(sd1_clip.SDTokenizer, _saved_tokenizer())

    class XLTokenizer(sdxl_clip.SDXLTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            self.clip_l = tokenizer(embedding_directory=embedding_directory)
            self.clip_g = tokenizer(embedding_directory=embedding_directory, embedding_key="clip_g")

    class XLClip(sdxl_clip.SDXLClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            torch.nn.Module.__init__(self)
            for name, encoder in encoders.items():
                make = _encoder(encoder, layer_norm_hidden_state=False)
                part = make(device=device, dtype=dtype, model_options=model_options)
                part.options_default = ("hidden", -2, True)  # ComfyUI's own check asks for three layers at least
                setattr(self, name, part)
            self.dtypes = {dtype}

    first = _encoder(pipe.text_encoder, return_projected_pooled=False)
    target = SimpleNamespace(
        params={},
        clip=XLClip if is_xl else partial(sd1_clip.SD1ClipModel, clip_model=first),
        tokenizer=XLTokenizer if is_xl else partial(sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
    )
    clip = comfy.sd.CLIP(target, embedding_directory=[], model_options={"dtype": torch.float32})
    for name, encoder in encoders.items():
        width = encoder.config.hidden_size
        state = {"text_projection.weight": torch.eye(width)}  # where transformers' model has none
        state |= {comfy_name(key): value for key, value in encoder.state_dict().items()}
        table = torch.zeros(VOCABULARY, width)
        key = "text_model.embeddings.token_embedding.weight"
        table[: len(state[key])] = state[key]
        found = getattr(clip.cond_stage_model, name).load_sd({**state, key: table})
        assert not found.missing_keys and not found.unexpected_keys
    return clip


def _encoder(encoder, **options):
    from comfy import sd1_clip

    config = encoder.config
    tokens = {"start": config.bos_token_id, "end": config.eos_token_id, "pad": config.pad_token_id}
    config = {**config.to_dict(), "num_hidden_layers": config.num_hidden_layers}
    return partial(sd1_clip.SDClipModel, textmodel_json_config=config, special_tokens=tokens, **options)


def _saved_tokenizer():
    folder = tempfile.mkdtemp()
    make_tokenizer().save_pretrained(folder)
    return folder
