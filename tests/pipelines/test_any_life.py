"""After any sequence of calls every bit of the base is back, where it was."""

import random

import pytest
import torch
from diffusers import StableDiffusionPipeline

import atomdiff
from atomdiff.utils.errors import UserError
from tests.pipelines.helpers import (
    addresses,
    assert_same_bits,
    assert_same_state,
    base_bits,
    bits,
    generate,
    pipeline_state,
    predict_repeated,
)

NAMES = {"atoms": "atoms", "dct": "dct atoms", "lora": "lora", "oft": "oft"}
ACTIONS = "load load unload switch switch switch schedule mix merge restore weights disable fail".split()
TABLE = "text_encoder.embeddings.token_embedding.weight"  # longer by the trained words


def act(pipe, files, folder, rng):
    """One random step in the life of a pipeline."""
    names = [concept.name for concept in atomdiff.list_atoms(pipe)]
    atoms = [name for name in names if name in ("atoms", "dct")]
    some = {name: rng.choice([0.0, 0.6, -1.0]) for name in names if rng.random() < 0.6 and name != "oft"}
    offload_base = rng.choice([None, "device", "cpu", "file"])
    action = rng.choice(ACTIONS)
    if action == "load" and (missing := [name for name in NAMES if name not in names]):
        atomdiff.load_atoms(pipe, files[NAMES[missing[0]]], missing[0])
    elif action == "unload" and names:
        atomdiff.unload_atoms(pipe, rng.choice(names))
    elif action == "switch":
        oft = dict.fromkeys({"oft"}.intersection(names), 1.0)
        atomdiff.set_active(pipe, some | oft, offload_base=offload_base)
    elif action == "schedule":
        scheduled = {name: {"weight": 0.7, "steps": {0: 1, 1: 0.2}} for name in atoms}
        atomdiff.set_active(pipe, {**some, **scheduled}, offload_base=offload_base)
        generate(pipe)
    elif action == "mix":
        weights = {name: weight for name, weight in some.items() if name in atoms}
        atomdiff.set_active(pipe, weights, offload_base=offload_base)
        with atomdiff.mixed_batch(pipe, [rng.choice([*atoms, None])]):
            generate(pipe)
    elif action in ("merge", "restore"):
        getattr(atomdiff, action)(pipe)
    elif action == "weights" and some:
        pipe.unet.set_adapters(list(some), [rng.choice([0.0, 1.5]) for _ in some])
        predict_repeated(pipe)
    elif action == "disable":
        rng.choice([pipe.disable_lora, pipe.enable_lora])()
        predict_repeated(pipe)
    elif action == "fail":
        before = pipeline_state(pipe)
        with pytest.raises(UserError):
            atomdiff.load_atoms(pipe, folder, "bad")
        with pytest.raises(UserError):
            atomdiff.set_active(pipe, {**some, "nobody": 1.0}, offload_base=offload_base)
        assert_same_state(pipe, before)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_after_any_life_every_bit_is_back(tiny_pipe_folder, concepts, tmp_path, seed):
    rng = random.Random(seed)
    dtype = [torch.float32, torch.float16, torch.bfloat16][seed % 3]
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipe_folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if seed >= 3:
        pipe.unet.to(memory_format=torch.channels_last)
    before, base, where = pipeline_state(pipe), bits(pipe), addresses(pipe)
    strides = [parameter.stride() for parameter in pipe.unet.parameters()]
    for _ in range(25):
        act(pipe, concepts, tmp_path, rng)
    atomdiff.restore(pipe)
    restored = base_bits(pipe)
    del base[TABLE]
    assert_same_bits({key: restored[key] for key in base}, base)
    atomdiff.unload_atoms(pipe)
    assert_same_state(pipe, before)
    assert addresses(pipe) == where
    assert [parameter.stride() for parameter in pipe.unet.parameters()] == strides
