"""A tiny SDXL pipeline with the blocks of the real one, and concept files."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import atomdiff
from tests.export.helpers import add_random_adapter, copy_of


@pytest.fixture(scope="session")
def sdxl_template(pipe_template):
    """A tiny SDXL pipeline with the block layout of the real one, random."""

    def text(kind, hidden):
        size = {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        known = pipe_template.text_encoder.config
        tokens = {key: getattr(known, key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        return kind(CLIPTextConfig(projection_dim=24, **size, **tokens)).eval()

    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            attention_head_dim=8,
            cross_attention_dim=56,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=24 + 6 * 4,
            norm_num_groups=8,
        )
        pipe = StableDiffusionXLPipeline(
            vae=pipe_template.vae,
            text_encoder=text(CLIPTextModel, 32),
            text_encoder_2=text(CLIPTextModelWithProjection, 24),
            tokenizer=pipe_template.tokenizer,
            tokenizer_2=copy.deepcopy(pipe_template.tokenizer),
            unet=unet.eval(),
            scheduler=DDIMScheduler.from_config(pipe_template.scheduler.config),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def concepts(pipe_template, tmp_path):
    """Two concept files with a trigger word each."""
    paths = []
    for seed, word in enumerate(["sks", "ohwx"]):
        pipe = copy_of(pipe_template)
        add_random_adapter(pipe, seed=seed, word=word)
        path = tmp_path / f"{word}.atoms.safetensors"
        paths.append(str(atomdiff.save_atoms(pipe, path, dtype=torch.float32, trigger_phrase=f"{word} mug")))
    return paths
