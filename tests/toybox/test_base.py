from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from atomdiff.toybox.base import (
    MAX_TOKENS,
    RARE_WORDS,
    assemble,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    load_toybox,
)
from atomdiff.toybox.scenes import CLASSES, COLORS, random_caption
from atomdiff.toybox.shapes import PATTERNS
from benchmarks.toybox.train_base import (
    Denoiser,
    Stage,
    as_signal,
    cached_world,
    encode,
    patch_basis,
    run_stage,
    train_denoiser,
)


def test_every_word_of_the_world_is_one_token_and_others_fall_into_letters():
    tokenizer = build_tokenizer()
    for word in (*CLASSES, *COLORS, *PATTERNS, *RARE_WORDS):
        assert len(tokenizer.tokenize(word)) == 1, word
    assert len(tokenizer.tokenize("zebra")) > 1
    assert tokenizer.unk_token_id not in tokenizer("zebra é 42", add_special_tokens=False).input_ids
    assert tokenizer.model_max_length == MAX_TOKENS


def test_the_assembled_pipeline_draws_after_saving_and_loading(tmp_path):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    assemble(build_vae(), tokenizer, build_text_encoder(tokenizer), build_unet()).save_pretrained(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.tokenizer("a red mug").input_ids == tokenizer("a red mug").input_ids
    assert pipe("a photo of a red mug", num_inference_steps=2).images[0].size == (64, 64)


def test_patch_basis_is_orthonormal_and_latents_have_the_documented_shape():
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    basis = patch_basis(images)
    torch.testing.assert_close(basis @ basis.T, torch.eye(8), atol=1e-5, rtol=0)
    assert as_signal(images).shape == (4, 3, 64, 64)
    assert encode(build_vae().eval(), images, torch.device("cpu")).shape == (4, 8, 16, 16)


def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(tmp_path):
    def trained(folder, stops):
        folder.mkdir()
        for stop in stops:
            torch.manual_seed(0)
            model = nn.Linear(4, 4)

            def loss_of(step, model=model, stop=stop):
                if step == stop:
                    raise KeyboardInterrupt
                return model(torch.randn(8, 4)).square().mean()

            try:
                run_stage("stage", Stage(7, 8, 1e-2), model, loss_of, folder, checkpoint_steps=2)
            except KeyboardInterrupt:
                pass
        return model.weight

    assert torch.equal(trained(tmp_path / "a", [None]), trained(tmp_path / "b", [5, None]))


def test_a_drawn_world_is_kept_until_the_renderer_draws_otherwise(tmp_path):
    drawn = []

    def render(count, seed, light=0):
        drawn.append(count)
        return np.full((count, 64, 64, 3), seed + light, dtype=np.uint8), []

    for light, times in ((0, 1), (0, 1), (9, 2)):
        images, captions = cached_world(tmp_path, 40, 1, partial(render, light=light))
        assert images.shape == (40, 64, 64, 3) and int(images[0, 0, 0, 0]) == 1 + light and len(captions) == 40
        assert drawn.count(40) == times


@pytest.mark.slow
def test_text_encoder_and_unet_both_learn(tmp_path):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    denoiser = Denoiser(build_text_encoder(tokenizer), build_unet())
    before = {name: value.detach().clone() for name, value in denoiser.named_parameters()}
    captions = [random_caption(np.random.default_rng(n)) for n in range(8)]
    latents, cpu = torch.randn(8, 8, 16, 16), torch.device("cpu")
    train_denoiser(denoiser, tokenizer, latents, captions, Stage(2, 8, 1e-3), tmp_path, cpu)
    for name, value in denoiser.named_parameters():
        old, new = before[name].double().flatten(), value.detach().double().flatten()
        shrunk = old * (old @ new / (old @ old)).nan_to_num()  # all that weight decay alone could do
        if not name.endswith("k_proj.bias"):  # which attention does not depend on
            assert (new - shrunk).abs().max() > 1e-4, name


def test_the_committed_base_draws_its_latents_from_where_it_was_trained():
    vae = load_toybox(Path(__file__).parents[2] / "samples" / "toybox-sd").vae
    with torch.no_grad():
        posterior = vae.encode(torch.rand(2, 3, 64, 64) * 2 - 1).latent_dist
    assert posterior.std.max() < 1e-3 < posterior.mean.std()
