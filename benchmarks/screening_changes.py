"""The changes that `screening.py` tries, one at a time, each with what was predicted before the first run.

The predictions reason from the toybox's first edition: its learning rates, steps and preservation, on one to eight
subjects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Change:
    """What differs from the baseline, and what that was predicted to do."""

    why: str
    """The reason of the prediction."""
    gain: float
    """Predicted difference of the normalized gain from the baseline's."""
    drift: float
    """Predicted difference of the drift."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the training run."""
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the adapter."""
    rate: float = 1.0
    """Learning rate over that of the baseline."""


RECIPE = {
    "uniform timesteps": Change(
        "outlines and patterns are decided in the middle, which uniform sampling sees less often",
        -0.04,
        0.0,
        {"timestep_sampling": "uniform"},
    ),
    "noisier timesteps": Change(
        "palette and layout are decided there, and the token has the palette already",
        -0.02,
        0.01,
        {"logit_mean": 0.5},
    ),
    "cubic timesteps": Change(
        "images of the second edition have the colors and the coarse pattern of the base, not of the photos: those are "
        "decided where there is much noise, which the baseline hardly sees (one timestep in seventy is above 900)",
        0.15,
        0.02,
        {"timestep_sampling": "cubic"},
    ),
    "less noisy timesteps": Change(
        "texture is decided there, but fewer steps see what it must fit to", -0.01, -0.01, {"logit_mean": -0.5}
    ),
    "timesteps below 700": Change(
        "as T-LoRA says (arXiv 2507.05964), the noisiest timesteps overfit most; a first look at capacity by timestep",
        -0.01,
        -0.02,
        {"max_timestep": 700},
    ),
    "timesteps below 500": Change(
        "the same, farther: what is left cannot change outlines", -0.10, -0.04, {"max_timestep": 500}
    ),
    "min-SNR 5": Change(
        "with v-prediction its weights fall only where there is little noise, where texture is", -0.02, 0.0,
        {"snr_gamma": 5.0},
    ),
    "EMA": Change(
        "the cosine schedule averages already; early parameters pull back", -0.02, -0.005, {"use_ema": True}
    ),
    "preservation class, weight 0.3": Change(
        "a third of the pull of weight 1", -0.05, -0.02, {"preservation": "class", "preservation_weight": 0.3}
    ),
    "preservation class, weight 0.3, twice the learning rate": Change(
        "what twice the learning rate adds to drift is what preservation takes away", 0.02, 0.0,
        {"preservation": "class", "preservation_weight": 0.3}, rate=2.0,
    ),
    "preservation class, weight 1": Change(
        "drift fell by a third for a sixth of the gain, on two subjects of the first edition",
        -0.15,
        -0.05,
        {"preservation": "class"},
    ),
    "preservation blank, weight 0.3": Change(
        "the empty prompt tells little of what prompts show", -0.01, -0.005,
        {"preservation": "blank", "preservation_weight": 0.3},
    ),
    "preservation blank, weight 1": Change(
        "the same, and it lowered drift by a tenth at most on two subjects", -0.04, -0.01, {"preservation": "blank"}
    ),
    "half the learning rate": Change("-.14 and -.02 on the first edition", -0.10, -0.02, rate=0.5),
    "twice the learning rate": Change("+.05 and +.02 on the first edition", 0.04, 0.02, rate=2.0),
    "half the token learning rate": Change(
        "the palette needs the token to move far", -0.03, 0.0, {"token_learning_rate": 1e-2}
    ),
    "a tenth of the token learning rate": Change(
        "boat and balloon are more like their subjects without the trigger word than with it: guidance adds to how far "
        "the token has moved",
        0.2,
        -0.01,
        {"token_learning_rate": 2e-3},
    ),
    "twice the token learning rate": Change("it arrives anyway", 0.0, 0.0, {"token_learning_rate": 4e-2}),
    "150 steps": Change("half the way, less what the schedule saves", -0.08, -0.015, {"max_train_steps": 150}),
    "600 steps": Change("the last hundred steps of 300 gain little", 0.03, 0.015, {"max_train_steps": 600}),
    "batches of 4": Change("steps are noisier, and there are as many", -0.03, 0.0, {"train_batch_size": 4}),
    "batches of 4, 600 steps": Change(
        "the same images in twice the steps", 0.01, 0.015, {"train_batch_size": 4, "max_train_steps": 600}
    ),
    "batches of 4, 600 steps, half the learning rate": Change(
        "600 steps of 8 gain .077, drift .015: steps are what counts, and smaller ones drift less", 0.02, -0.005,
        {"train_batch_size": 4, "max_train_steps": 600}, rate=0.5,
    ),
    "batches of 2, 1200 steps, half the learning rate": Change(
        "the same once more; gradients of two images are noisy", 0.03, 0.01,
        {"train_batch_size": 2, "max_train_steps": 1200}, rate=0.5,
    ),
    "constant learning rate": Change(
        "more movement, and no quiet end", 0.0, 0.015, {"lr_scheduler": "constant"}
    ),
}  # fmt: skip
"""Changes of the recipe, from configs/demo.yaml with atoms/default."""

_NEAR_OUTPUT = r"up_blocks\.[1-3]\..*conv\w*|conv_out|up_blocks\.[1-3]\..*ff\.net\.2"  # the baseline's
_FIRST = r"down_blocks.*conv\w*|conv_in"
_FIRST_ATTENTION = r"down_blocks.*attn[12]\.to_(q|k|v|out\.0)"
_LAST_ATTENTION = r"up_blocks\.[1-3]\..*attn[12]\.to_(q|k|v|out\.0)"
_FEWER_OF_8 = {
    "target_modules": f"{_NEAR_OUTPUT}|{_FIRST_ATTENTION}",
    "channel_block_pattern": {"up_blocks\\.1\\..*conv2": 8},
}

LAYERS = {
    "cross-attention as well": Change(
        "with a better base atoms keep its colors where LoRA, in attention, has those of the subject: the word of the "
        "token acts there",
        0.06,
        0.01,
        adapter={"target_modules": f"{_NEAR_OUTPUT}|.*attn2\\.to_[kv]"},
    ),
    "all layers": Change(
        "attention adds where patterns go, and drift", 0.03, 0.03, adapter={"target_modules": "all"}
    ),
    "all layers, blocks of 4": Change(
        "without the blocks of 8, half the bytes; what all layers bring are other places, not parameters", 0.11, 0.03,
        adapter={"target_modules": "all", "channel_block_pattern": {}},
    ),
    "all layers, blocks of 2 away from the output": Change(
        "the baseline's layers as they are, and a sixteenth of the parameters in each of the others", 0.06, 0.02,
        adapter={
            "target_modules": "all",
            "channel_block": 2,
            "channel_block_pattern": {
                r"up_blocks\.1\..*conv2|up_blocks\.1\..*ff\.net\.2": 8,
                _NEAR_OUTPUT: 4,
            },
        },
    ),
    "all layers but those of the first blocks, blocks of 4": Change(
        "no gradient has to go through the first blocks, which see the noisy image", 0.10, 0.02,
        adapter={
            "target_modules": "all",
            "exclude_modules": r"(down_blocks|time_embedding|conv_in).*",
            "channel_block_pattern": {},
        },
    ),
    "convolutions of the first blocks as well, blocks of 4": Change(
        "all layers without those of the first blocks are no better than the baseline, so it is the first blocks that "
        "matter: what they see is the noisy image, and colors are decided where there is much noise",
        0.06,
        0.015,
        adapter={"target_modules": f"{_NEAR_OUTPUT}|{_FIRST}", "channel_block_pattern": {}},
    ),
    "convolutions and attention of the first blocks as well, blocks of 4": Change(
        "the same, and the token's word", 0.09, 0.02,
        adapter={"target_modules": f"{_NEAR_OUTPUT}|{_FIRST}|{_FIRST_ATTENTION}", "channel_block_pattern": {}},
    ),
    "attention of the first blocks as well, fewer blocks of 8": Change(
        "the first blocks' attention is what brings .1, their convolutions bring nothing; blocks of 8 where they fit",
        0.07,
        0.01,
        adapter=_FEWER_OF_8,
    ),
    "attention of the first blocks as well, fewer blocks of 8, twice the learning rate": Change(
        "adds what twice the learning rate brought the baseline", 0.06, 0.03, adapter=_FEWER_OF_8, rate=2.0
    ),
    "attention of the first and the last blocks as well, blocks of 4": Change(
        "attention of the last blocks in place of blocks of 8, for as many bytes", 0.05, 0.015,
        adapter={
            "target_modules": f"{_NEAR_OUTPUT}|{_FIRST_ATTENTION}|{_LAST_ATTENTION}", "channel_block_pattern": {}
        },
    ),
}  # fmt: skip
"""Changes of the layers, from configs/demo.yaml with atoms/near_output."""

ADAPTER = {
    "basis dct": Change("with all 9 atoms the basis is a rotation; only AdamW's steps differ", 0.0, 0.0,
                        adapter={"basis": "dct"}),
    "basis sparse": Change("coefficients of a learned dictionary, as in the paper: steps are not relative", -0.02, 0.0,
                           adapter={"basis": "sparse"}),
    "3 atoms": Change("most of a kernel's energy, but few directions to move in", -0.04, -0.01,
                      adapter={"num_atoms": 3}),
    "6 atoms": Change("the last three atoms carry little", -0.01, 0.0, adapter={"num_atoms": 6}),
    "18 sparse atoms": Change("an overcomplete dictionary moves in no more directions than 9", -0.02, 0.0,
                              adapter={"basis": "sparse", "num_atoms": 18}),
    "channel blocks of 1": Change("kernels alone cannot make a color", -0.20, -0.03,
                                  adapter={"channel_block": 1}, rate=4.0),
    "channel blocks of 2": Change("a quarter of the parameters in channels", -0.08, -0.01,
                                  adapter={"channel_block": 2}, rate=1.4),
    "channel blocks of 8": Change("four times the parameters in channels", 0.05, 0.02,
                                  adapter={"channel_block": 8}, rate=0.6),
    "channel blocks of 16": Change("sixteen times; more of them move unrelated images", 0.07, 0.04,
                                   adapter={"channel_block": 16}, rate=0.35),
    "joint blocks of 2": Change("kernels and channels as one: more freedom than separate ones of 2", 0.0, 0.0,
                                adapter={"channel_block": 2, "joint": True}),
    "recursion of 2": Change("a mix for each input channel, but no channel blocks", -0.10, 0.0,
                             adapter={"channel_block": 1, "recursion": 2}, rate=0.6),
    "recursion of 2, channel blocks of 4": Change("adds the mixes to the baseline", 0.01, 0.01,
                                                  adapter={"recursion": 2}, rate=0.6),
    "3 atoms, recursion of 2": Change(
        "with recursion 9 atoms bring .10 at the baseline's drift, and without it 3 are as good as 9: so a third of "
        "the mixes", 0.08, 0.0, adapter={"channel_block": 1, "recursion": 2, "num_atoms": 3}, rate=0.84,
    ),
    "3 atoms, recursion of 1": Change(
        "half of that again, as many parameters as atoms/default: each input channel scales one set of atoms", 0.03,
        0.0, adapter={"channel_block": 1, "recursion": 1, "num_atoms": 3}, rate=0.84,
    ),
    "recursion of 1": Change(
        "nine sets of scales in place of nine mixes of two", 0.05, 0.0,
        adapter={"channel_block": 1, "recursion": 1}, rate=0.84,
    ),
    "1 atom, recursion of 1": Change(
        "3 atoms with it do as well as 9 with recursion of 2, so channels count, not kernels: a scale for each input "
        "channel along one atom, a third of the parameters", -0.03, -0.01,
        adapter={"channel_block": 1, "recursion": 1, "num_atoms": 1}, rate=2.5,
    ),
    "shared by kind": Change("four directions for all layers of a kind", -0.12, -0.02,
                             adapter={"basis": "dct", "share": "kind", "share_count": 4}, rate=4.0),
    "conv+proj": Change("projections around attention mix channels", 0.02, 0.01,
                        adapter={"target_modules": "conv+proj"}),
    "attention": Change("no kernels: layout and words, less texture", -0.10, -0.01,
                        adapter={"target_modules": "attention"}),
    "cross-attention": Change("only how words act", -0.20, -0.02, adapter={"target_modules": "cross_attention"}),
    "all layers": Change("convolutions and attention add up", 0.05, 0.03, adapter={"target_modules": "all"}),
}  # fmt: skip
"""Changes of the adapter, from atoms/conv."""
