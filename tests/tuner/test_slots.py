"""Slots: a module with them is the same module, and without them it is as it was."""

import copy

import pytest
import torch
from torch import nn

from atomdiff.tuner.slots import add_slot, remove_empty_slots, replace_children


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 3)

    def forward(self, x, factor=1):
        return factor * self.line(x)


def run(block, cls, *args, **kwargs):
    return block.after(cls.forward(block, *args, **kwargs))


def test_a_slot_is_called_and_removed():
    block = Block().eval()
    x, before = torch.randn(2, 3), dict(vars(block))
    expected, keys = block(x, factor=2), list(block.state_dict())
    assert type(add_slot(block, "after", run)) is nn.Identity and not block.after.training
    assert isinstance(block, Block) and type(block).__name__ == "Block" and list(block.state_dict()) == keys
    assert torch.equal(block(x, factor=2), expected)
    block.after = nn.ReLU()
    copied = copy.deepcopy(block)
    for each in (block, copied):
        assert torch.equal(each(x, factor=2), expected.relu())
    remove_empty_slots(block)
    assert torch.equal(block(x, factor=2), expected.relu())  # it is not empty
    assert add_slot(block, "after", run) is block.after
    block.after = nn.Identity()
    remove_empty_slots(block)
    assert type(block) is Block and vars(block).keys() == before.keys() and not hasattr(block, "after")
    assert torch.equal(block(x, factor=2), expected) and torch.equal(copied(x, factor=2), expected.relu())


def test_children_are_replaced_in_a_copy_only():
    block, x = Block(), torch.randn(2, 3)
    expected = block(x)
    changed = replace_children(block, Block, line=lambda x: x + 1)
    assert torch.equal(changed(x, 2), 2 * (x + 1)) and torch.equal(block(x), expected)


def add_one(block, cls, *args, **kwargs):
    return block.plus(cls.forward(block, *args, **kwargs) + 1)


def double(block, cls, *args, **kwargs):
    return block.twice(2 * cls.forward(replace_children(block, cls), *args, **kwargs))


def test_slots_of_several_tuners_act_whichever_came_first(tmp_path):
    x = torch.randn(2, 3)
    block = Block().eval()
    expected = block(x)
    for slots in ({"plus": add_one, "twice": double}, {"twice": double, "plus": add_one}):
        for name, run in slots.items():
            add_slot(block, name, run)
            block._modules[name] = nn.Sequential()
        loaded = torch.load(_saved(block, tmp_path), weights_only=False)
        for each in (block, copy.deepcopy(block), loaded):
            assert torch.equal(each(x), 2 * (expected + 1))
        forward = block.forward  # as accelerate keeps it
        block.plus = nn.Identity()
        remove_empty_slots(block)
        assert torch.equal(block(x), 2 * expected) and torch.equal(forward(x), 2 * expected)
        block.twice = nn.Identity()
        remove_empty_slots(block)
        assert type(block) is Block and torch.equal(block(x), expected) and torch.equal(forward(x), expected)


def _saved(block, folder):
    torch.save(block, folder / "block.pt")
    return folder / "block.pt"


def test_a_slot_that_would_be_passed_by_is_refused():
    block = Block()
    add_slot(block, "plus", add_one)
    block.forward = block.forward
    with pytest.raises(ValueError, match="another library has replaced the forward of this Block"):
        add_slot(block, "twice", double)
    assert add_slot(block, "another", add_one) is block.another
