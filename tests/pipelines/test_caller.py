"""Which pipeline calls a model."""

import pytest
import torch
from diffusers import DiffusionPipeline

from atomdiff.pipelines.caller import find_caller


class Pipeline(DiffusionPipeline):
    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet)

    def __call__(self, model):
        latents = torch.zeros(3, 4, 8, 8)
        return find_caller(model), len(latents)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_is_found_also_where_it_is_compiled(compiled):
    plain = torch.nn.Module()
    part = torch.compile(plain) if compiled else plain
    pipe = Pipeline(None)
    pipe.unet = part
    for model in (part, plain):  # hooks are given the one that they were put on
        caller, count = pipe(model)
        assert caller is not None and caller.pipe is pipe and caller.latents == count
    assert pipe(torch.nn.Module())[0] is None
    assert find_caller(part) is None
