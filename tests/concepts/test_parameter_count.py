"""Numbers and bytes of adapters on the real architectures, without weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from atomdiff.bases.architectures import ARCHITECTURES, open_architecture
from atomdiff.concepts.parameter_count import count_parameters, describe_count
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError

# Parameters as their makers state them: UNets 860 M, 866 M and 2.6 G, ResNet-50 25.6 M, ConvNeXt-B 88.6 M.
PARAMETERS = {
    "sd-1.5": 859_520_964,
    "sd-2.1": 865_910_724,
    "sdxl": 2_567_463_684,
    "resnet-50": 25_557_032,
    "convnext-base": 88_591_464,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_the_real_ones_and_take_every_preset(name):
    count = count_parameters(name, AtomConfig(target_modules="conv", channel_block=1, num_atoms=3))
    assert count.num_parameters == PARAMETERS[name]
    counts = [count_parameters(name, AtomConfig(target_modules=preset)) for preset in ("conv", "all")]
    sizes = [each.num_trainable_parameters for each in counts]
    assert count.num_trainable_parameters < sizes[0] < sizes[1]


def test_spatial_atoms_of_sd15_are_those_of_the_design():
    count = count_parameters("sd-1.5", AtomConfig(channel_block=1))
    assert count.groups == {("atom_delta", (9, 9)): 52} and count.num_trainable_parameters == 52 * 81
    assert count.file_bytes == 2 * 2 * 52 * 81  # deltas and atoms
    assert count_parameters("sd-1.5", AtomConfig(channel_block=1, basis="dct")).file_bytes == 2 * 52 * 81


def test_the_papers_share_of_resnet50():
    """The paper's 0.004 % of ResNet-50: one thousand numbers, seven atoms on each of the sixteen 3x3 convolutions."""
    names = [
        name for name, m in open_architecture("resnet-50").named_modules() if getattr(m, "kernel_size", 0) == (3, 3)
    ]
    count = count_parameters("resnet-50", AtomConfig(channel_block=1, num_atoms=7, target_modules=names))
    assert count.groups == {("atom_delta", (7, 9)): 16}
    assert round(100 * count.share, 3) == 0.004


@pytest.mark.parametrize(
    "config",
    [
        AtomConfig(basis="sparse", num_atoms=20, channel_block=1),
        AtomConfig(recursion=2, channel_block=2),
        AtomConfig(joint=True, channel_block=2, target_modules="all"),
        LoraConfig(r=2, target_modules=["0", "1"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_counts_are_those_of_a_real_model(config):
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1))

    real = get_peft_model(model(), config)
    expected = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    with torch.device("meta"):
        count = count_parameters(model(), config)
    assert count.num_trainable_parameters == expected
    assert f"{expected:,}" in describe_count(count)


def test_counting_leaves_the_config_as_it_is():
    config = AtomConfig()
    count_parameters("resnet-50", config)
    assert not config.filled_by_loader


def test_folders_are_architectures_too(tiny_pipe, tiny_pipe_folder):
    count = count_parameters(str(tiny_pipe_folder), AtomConfig())
    assert count.num_parameters == tiny_pipe.unet.num_parameters()
    assert count_parameters(str(tiny_pipe_folder), None).share == 1


def test_what_cannot_be_counted_is_said(tmp_path):
    with pytest.raises(UserError, match="no architecture .*; known are sd-1.5, sd-2.1"):
        count_parameters(str(tmp_path), AtomConfig())
    with pytest.raises(UserError, match=r"does not fit .*'attention' matches no layer .*'conv' \(17 layers\)"):
        count_parameters("resnet-50", AtomConfig(target_modules="attention"))
