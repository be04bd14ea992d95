"""The parts of the toybox's base, and the folders that are made of trained weights."""

import json
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline

from atomdiff.toybox.judge import Judge, load_judge
from atomdiff.toybox.world import CLASSES, COLORS, PATTERNS, SCENES
from atomdiff.utils.assets import ASSETS
from benchmarks.pretrain import train
from benchmarks.pretrain.architecture import (
    MAX_TOKENS,
    RARE_WORDS,
    assemble,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from benchmarks.pretrain.weights import save_shards


def parts():
    torch.manual_seed(0)
    return {"vae": build_vae(), "text_encoder": build_text_encoder(build_tokenizer()), "unet": build_unet()}


def test_every_word_of_the_world_is_one_token_and_others_fall_into_letters():
    tokenizer = build_tokenizer()
    for word in (*CLASSES, *COLORS, *PATTERNS, *RARE_WORDS, *" ".join(SCENES.values()).split()):
        assert len(tokenizer.tokenize(word)) == 1, word
    assert len(tokenizer.tokenize("zebra")) > 1
    assert tokenizer.unk_token_id not in tokenizer("zebra \u00e9 42", add_special_tokens=False).input_ids
    assert tokenizer.model_max_length == MAX_TOKENS


@pytest.mark.slow
def test_weights_become_a_pipeline_and_a_judge_that_load(tmp_path, monkeypatch):
    torch.manual_seed(1)
    judge = Judge().eval()
    own = parts()
    save_shards({"judge": judge, **own}, tmp_path / "weights")
    (tmp_path / "weights" / "report.json").write_text(json.dumps({"scaling_factor": 0.25}))
    options = ["--out", str(tmp_path / "weights"), "--pipeline", str(tmp_path / "samples" / "toybox-sd")]
    monkeypatch.setattr(sys, "argv", ["train", *options])
    train.main()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "samples" / "toybox-sd")
    assert pipe.vae.config.scaling_factor == 0.25
    for name, module in own.items():
        for key, value in getattr(pipe, name).state_dict().items():
            torch.testing.assert_close(value, module.state_dict()[key], atol=1e-3, rtol=1e-3)
    loaded = load_judge(tmp_path / "samples" / "toybox-judge")
    image = torch.rand(1, 3, 128, 128)
    torch.testing.assert_close(loaded(image)[1], judge(image)[1], atol=5e-3, rtol=0)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.tokenizer("a red mug").input_ids == build_tokenizer()("a red mug").input_ids
    assert pipe("a photo of a red mug", num_inference_steps=2).images[0].size == (128, 128)


def test_the_scheduler_starts_from_pure_noise():
    built = parts()
    pipe = assemble(built["vae"], build_tokenizer(), built["text_encoder"], built["unet"])
    assert pipe.scheduler.alphas_cumprod[-1] < 1e-7 and pipe.scheduler.config.prediction_type == "v_prediction"
    embedded = json.loads((ASSETS / "samples" / "toybox-sd" / "scheduler" / "scheduler_config.json").read_text())
    built = json.loads(pipe.scheduler.to_json_string())
    assert embedded | {"_diffusers_version": ""} == built | {"_diffusers_version": ""}
