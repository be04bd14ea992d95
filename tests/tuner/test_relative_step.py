"""A learning rate of atoms is relative to the weight: docs/method.md, "Relative updates"."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from atomdiff import AtomConfig


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(
    ("layer", "config", "factor"),
    [
        (nn.Conv2d(16, 8, 3, bias=False), {"channel_block": 1}, 3),
        (nn.Conv2d(8, 8, 5, bias=False), {"channel_block": 1}, 5),
        (nn.Linear(32, 16, bias=False), {"channel_block": 4}, 4),
        (nn.Conv2d(8, 8, 3, bias=False), {"channel_block": 2, "joint": True}, 6),
    ],
)
def test_the_first_step_moves_a_weight_by_the_root_of_d_times_the_rate(layer, config, factor, scale):
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(layer))
    model[0].weight.data = scale * torch.randn_like(layer.weight)
    before = model[0].weight.detach().clone()
    tuned = get_peft_model(model, AtomConfig(target_modules="all", **config))
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-30)
    x = torch.randn(4, before.shape[1], *([9, 9] if before.ndim == 4 else []))
    tuned(x).square().mean().backward()
    optimizer.step()
    change = tuned.merge_and_unload()[0].weight - before
    assert change.norm() / before.norm() == pytest.approx(factor * 1e-3, rel=1e-2)
