"""Images from prompts and seeds."""

import numpy as np
import pytest
import torch

from atomdiff.sampling.generate import generate, image_size
from atomdiff.utils.errors import UserError
from tests.sampling.helpers import QUICK, pixels


def test_an_image_depends_on_its_prompt_and_seed_but_not_on_its_batch(tiny_pipe):
    prompts, seeds = ["a red mug", "a blue cat", "a red mug", "a robot", "a red mug"], [1, 2, 3, 4, 1]
    together = generate(tiny_pipe, prompts, seeds=seeds, batch_size=5, progress=False, **QUICK)
    apart = generate(tiny_pipe, prompts, seeds=seeds, batch_size=2, progress=False, **QUICK)
    alone = [
        generate(tiny_pipe, [prompt], seeds=[seed], progress=False, **QUICK)[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    for images in zip(together, apart, alone, strict=True):
        assert max(abs(pixels(images[0]) - pixels(other)).max() for other in images) <= 1  # rounding
    assert abs(pixels(together[0]) - pixels(together[4])).max() <= 1
    assert abs(pixels(together[0]) - pixels(together[2])).max() > 5  # another seed
    assert abs(pixels(alone[0]) - pixels(generate(tiny_pipe, ["a robot"], seeds=[1], **QUICK)[0])).max() > 0


def test_global_randomness_is_neither_used_nor_changed(tiny_pipe):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(tiny_pipe, ["a mug"], seeds=[3], **QUICK)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert np.array_equal(pixels(generate(tiny_pipe, ["a mug"], seeds=[3], **QUICK)[0]), pixels(first))


def test_size_and_negative_prompt_reach_the_pipeline(tiny_pipe):
    plain = generate(tiny_pipe, ["a mug"], seeds=[0], height=48, width=40, **QUICK)[0]
    assert plain.size == (40, 48)
    other = generate(tiny_pipe, ["a mug"], seeds=[0], height=48, width=40, negative_prompt="a red cat", **QUICK)[0]
    assert not np.array_equal(pixels(plain), pixels(other))


def test_the_progress_bar_counts_images_and_the_pipelines_own_is_put_back(tiny_pipe, capfd):
    tiny_pipe.set_progress_bar_config(desc="mine")
    generate(tiny_pipe, ["a mug"] * 3, seeds=[0, 1, 2], batch_size=2, **QUICK)
    assert capfd.readouterr().err == "generating: 3 images\n"  # a line where the output is no terminal
    generate(tiny_pipe, ["a mug"], seeds=[0], progress=False, **QUICK)
    assert capfd.readouterr().err == ""
    assert tiny_pipe._progress_bar_config == {"desc": "mine"}


def test_prompts_and_seeds_come_in_pairs(tiny_pipe):
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        generate(tiny_pipe, ["a", "b"], seeds=[0], **QUICK)


def test_a_base_that_needs_larger_multiples_says_so(tiny_pipe, monkeypatch):
    monkeypatch.setattr(tiny_pipe, "vae_scale_factor", 16)
    with pytest.raises(UserError, match="height=40: this base needs a multiple of 16"):
        generate(tiny_pipe, ["a mug"], seeds=[0], height=40, progress=False, **QUICK)


def test_a_lone_side_of_a_base_that_is_not_square(tiny_pipe):
    tiny_pipe.unet.register_to_config(sample_size=[8, 12])
    assert image_size(tiny_pipe, 64, None) == (64, 48)
    assert image_size(tiny_pipe, None, 64) == (32, 64)
