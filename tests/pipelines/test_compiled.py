"""Compiled models: nothing is compiled again, and concepts go in and out."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.testing import CompileCounter

import atomdiff
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.tuner import AtomConfig, AtomLayer
from tests.helpers import add_adapter
from tests.pipelines.helpers import VARIANTS, predict_repeated


def compile_in_place(pipe, counter):
    pipe.unet.compile(backend=counter, fullgraph=True)


def compile_by_wrapping(pipe, counter):
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [compile_in_place, compile_by_wrapping])
def test_compiled_code_outlives_every_switch(pipe_template, compiled):
    torch._dynamo.reset()
    pipe = copy.deepcopy(pipe_template)
    pipe.unet = UNet2DConditionModel(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    for seed, (name, config) in enumerate(VARIANTS.items()):
        add_adapter(pipe, name, config, seed=seed)
    counter = CompileCounter()
    choices = [
        {},
        {"spatial": 1.0},
        {"spatial": 0.5, "dct": 2.0, "sparse": 1.0},
        {"joint": {"weight": 0.8, "blocks": {"down": 0.5, "up.0": 0}}},
        {},
        {"recursive": 1.0, "separable": 0.0},
        {"separable": {"steps": {0: 1, 1: 0.1}}},
    ]
    expected = []
    for concepts in choices:
        atomdiff.set_active(pipe, concepts)
        expected.append(predict_repeated(pipe))
    atomdiff.set_active(pipe, {})  # a model is compiled before there are steps to follow
    compiled(pipe, counter)
    predict_repeated(pipe)
    assert counter.frame_count == 1
    for concepts, prediction in zip(choices, expected, strict=True):
        atomdiff.set_active(pipe, concepts, offload_base="cpu" if len(concepts) == 3 else None)
        torch.testing.assert_close(predict_repeated(pipe), prediction, atol=1e-5, rtol=0)
    pipe.scheduler.set_timesteps(4)
    steps = [predict_repeated(pipe, timestep=step) for step in pipe.scheduler.timesteps]
    weight = pipe.unet.conv_in.base_layer.weight.clone()
    atomdiff.set_active(pipe, {"separable": 0.1})
    torch.testing.assert_close(pipe.unet.conv_in.base_layer.weight, weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        predict_repeated(pipe, timestep=pipe.scheduler.timesteps[-1]), steps[-1], atol=1e-5, rtol=0
    )
    predict_repeated(pipe, timestep=pipe.scheduler.timesteps[0])  # which the weights follow no more
    torch.testing.assert_close(pipe.unet.conv_in.base_layer.weight, weight, atol=1e-6, rtol=0)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_concepts_go_in_and_out_of_a_model_that_torch_compile_has_wrapped(pipe_template, tmp_path):
    torch._dynamo.reset()
    made, pipe = copy.deepcopy(pipe_template), copy.deepcopy(pipe_template)
    add_adapter(made, "made", AtomConfig())
    file = atomdiff.save_atoms(made, tmp_path / "made.atoms.safetensors", "made", dtype=torch.float32)
    base, expected = predict_repeated(pipe), predict_repeated(made)
    compile_by_wrapping(pipe, CompileCounter())
    name = atomdiff.load_atoms(pipe, file)
    torch.testing.assert_close(predict_repeated(pipe), expected, atol=1e-5, rtol=0)
    again = atomdiff.save_atoms(pipe, tmp_path / "again.atoms.safetensors", name, dtype=torch.float32)
    assert read_concept_file(again).layers.keys() == read_concept_file(file).layers.keys()
    atomdiff.unload_atoms(pipe)
    torch.testing.assert_close(predict_repeated(pipe), base, atol=1e-5, rtol=0)
    assert not any(isinstance(module, AtomLayer) for module in pipe.unet.modules())
    torch._dynamo.reset()
