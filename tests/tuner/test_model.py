"""Which layers of a model get an adapter: presets, names, refusals."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from atomdiff.atoms.variants import atoms_of
from atomdiff.tuner import AtomConfig, AtomLayer
from atomdiff.tuner.model import preset_targets, supported_modules


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8), nn.Identity()])
        self.proj_in, self.ff, self.norm = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.LayerNorm(8)
        self.attn2, self.proj_out = nn.ModuleDict({"to_k": nn.Linear(8, 8)}), nn.Linear(8, 8)
        self.conv1, self.conv = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, (1, 3))


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("conv", {"0.conv1", "0.conv"}),
        ("conv+proj", {"0.conv1", "0.conv", "0.proj_in", "0.proj_out"}),
        ("attention", {"0.to_q", "0.to_out.0", "0.attn2.to_k"}),
        ("cross_attention", {"0.attn2.to_k"}),
        (
            "all",
            {"0.conv1", "0.conv", "0.to_q", "0.to_out.0", "0.proj_in", "0.proj_out", "0.ff", "0.attn2.to_k"},
        ),
    ],
)
def test_presets_mean_the_same_with_adapters_there(preset, names):
    model = nn.Sequential(Attention())
    assert preset_targets(model, preset) == names
    wrapped = get_peft_model(model, LoraConfig(target_modules=["to_q", "conv1"])).base_model.model
    assert preset_targets(wrapped, preset) == names
    tuner = get_peft_model(nn.Sequential(Attention()), AtomConfig(target_modules=preset)).base_model
    assert set(tuner.targeted_module_names) == names


def targeted(model: nn.Module, config: AtomConfig) -> set[str]:
    return set(get_peft_model(model, config).base_model.targeted_module_names)


def test_presets_honor_exclusions_and_lists_are_names():
    config = AtomConfig(target_modules="attention", exclude_modules=["to_q", "to_k"])
    assert targeted(nn.Sequential(Attention()), config) == {"0.to_out.0"}
    config = AtomConfig(target_modules=["conv", "ff", "proj_in"])
    assert targeted(nn.Sequential(Attention()), config) == {"0.conv", "0.ff", "0.proj_in"}


def test_layers_can_be_chosen_by_their_index():
    def blocks() -> nn.Module:
        return nn.ModuleDict({"down": nn.ModuleList([Attention() for _ in range(3)]), "mid": Attention()})

    for target in ("conv", ["conv1", "conv"]):
        config = AtomConfig(target_modules=target, layers_to_transform=[0, 2], layers_pattern="down")
        assert targeted(blocks(), config) == {"down.0.conv1", "down.0.conv", "down.2.conv1", "down.2.conv"}
    config = AtomConfig(target_modules="cross_attention", layers_to_transform=1, layers_pattern="down")
    assert targeted(blocks(), config) == {"down.1.attn2.to_k"}


def test_modules_to_save_are_left_to_peft():
    config = AtomConfig(target_modules="all", modules_to_save=["ff"])
    assert "0.ff" not in targeted(nn.Sequential(Attention()), config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ["conv3"]},
            r"\['conv3'\] matches no layer of this Sequential: there are 'conv' \(2 layers",
        ),
        ({"target_modules": "conv", "exclude_modules": ".*"}, "exclude_modules='.*' matches no layer.*by name: 0.to_q"),
        ({"recursion": 2, "target_modules": "attention"}, "recursion=2 decomposes kernels larger than 1x1, and none"),
        ({"channel_block": 3}, r"block of 3 divides no .* \(0.conv1 has 8 and 8\): use a divisor, or 1"),
        (
            {"channel_block": 1, "channel_block_pattern": {"ff": 5}, "target_modules": "all"},
            r"a channel block of 5 divides no .* \(0.ff has",
        ),
        ({"num_atoms": 10}, "num_atoms=10, but the kernel of 0.conv1 has only 9.*None.*sparse"),
        ({"num_atoms": 145, "joint": True}, "num_atoms=145, but a block of 4 x 4 kernels of 0.conv1 has only 144"),
    ],
)
def test_settings_with_nothing_to_act_on_are_refused_before_anything_changes(fields, message):
    model = nn.Sequential(Attention())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, AtomConfig(**fields))
    assert not any(isinstance(module, AtomLayer) for module in model.modules())


def test_presets_that_match_nothing_say_what_there_is():
    with pytest.raises(ValueError, match=r"'attention' matches no layer.*'conv' \(1 layers\), 'conv\+proj' \(1"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4)), AtomConfig(target_modules="attention"))
    with pytest.raises(ValueError, match="'conv' matches no layer of this ReLU: it has no layer that atoms can adapt"):
        get_peft_model(nn.ReLU(), AtomConfig())


def test_weights_too_small_for_sparse_coefficients_are_named():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    nn.init.constant_(model[0].weight, 1e-4)
    with pytest.warns(UserWarning, match="no row of 0 is longer than sparsity=0.001.*lower sparsity"):
        get_peft_model(model, AtomConfig(basis="sparse", channel_block=1))


def test_weights_that_another_module_reads_are_left_alone():
    model = nn.ModuleDict(
        {"fused": nn.TransformerEncoderLayer(8, 2, 16), "decoder": nn.TransformerDecoderLayer(8, 2, 16)}
    )
    assert preset_targets(model, "all") == {"decoder.linear1", "decoder.linear2"}  # the others' forward is never run
    for name in ("out_proj", "fused.linear1"):
        with pytest.raises(TypeError, match="another module's forward"):
            get_peft_model(model, AtomConfig(target_modules=[name]))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    with pytest.raises(TypeError, match=r"weight of 0 .* a parametrization"):
        get_peft_model(normed, AtomConfig(target_modules=["0"]))


def test_shared_weights_are_left_alone():
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "head": nn.Linear(4, 8), "free": nn.Linear(4, 4)})
    model["head"].weight = model["table"].weight
    assert preset_targets(model, "all") == {"free"}
    with pytest.raises(TypeError, match="weight of head is shared with another module"):
        get_peft_model(model, AtomConfig(target_modules=["head"]))


def test_all_linear_means_what_it_means_in_peft():
    config = AtomConfig(target_modules="all-linear")
    assert targeted(nn.Sequential(Attention()), config) == {
        "0.to_q",
        "0.to_out.0",
        "0.ff",
        "0.attn2.to_k",
        "0.proj_out",
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_second_adapter_joins_the_layer_also_below_other_methods():
    model = nn.Sequential(Attention())
    model = get_peft_model(model, AtomConfig(target_modules=["to_q"])).base_model.model
    model = get_peft_model(model, LoraConfig(target_modules=["to_q"]), adapter_name="low_rank").base_model.model
    model = get_peft_model(model, AtomConfig(target_modules=["to_q"]), adapter_name="second").base_model.model
    layers = [module for module in model.modules() if isinstance(module, AtomLayer)]
    assert [list(layer.r) for layer in layers] == [["default", "second"]]
    assert set(supported_modules(model)) == set(supported_modules(nn.Sequential(Attention())))


@pytest.mark.parametrize(
    ("config", "shape", "expected"),
    [
        (AtomConfig(channel_block=1), (8, 8, 3, 3), {"atom_delta": (9, 9)}),
        (AtomConfig(num_atoms=4), (8, 8, 3, 3), {"atom_delta": (4, 9), "channel_delta": (16, 16)}),
        (AtomConfig(), (8, 3, 3, 1), {"atom_delta": (3, 3), "channel_delta": (4, 4)}),
        (AtomConfig(), (8, 8), {"channel_delta": (16, 16)}),
        (AtomConfig(num_atoms=9), (8, 8, 1, 1), {"channel_delta": (16, 16)}),
        (AtomConfig(channel_block=1), (8, 8), {"atom_delta": (1, 1)}),
        (AtomConfig(joint=True), (8, 8, 3, 3), {"atom_delta": (144, 144)}),
        (AtomConfig(joint=True, num_atoms=20), (8, 3, 3, 3), {"atom_delta": (20, 36)}),
        (AtomConfig(joint=True, num_atoms=20), (8, 8), {"channel_delta": (16, 16)}),
        (
            AtomConfig(channel_block=1, recursion=2),
            (8, 320, 3, 3),
            {"recursion_delta": (9, 2, 9), "recursion_mix": (320, 9, 2)},
        ),
        (AtomConfig(channel_block=1, basis="sparse", num_atoms=15), (8, 8, 3, 3), {"atom_delta": (15, 9)}),
    ],
)
def test_shapes_of_what_is_trained(config, shape, expected):
    assert {
        kind: s for atoms in atoms_of(config, "layer", shape) for kind, s in atoms.parameter_shapes().items()
    } == expected


def test_other_modules_are_refused_by_name():
    with pytest.raises(TypeError, match="0.norm is a LayerNorm; atoms adapt Conv1d, Conv2d, .*Linear"):
        get_peft_model(nn.Sequential(Attention()), AtomConfig(target_modules=["norm"]))
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="weight of 0 is torch.int8"):
        get_peft_model(model, AtomConfig(target_modules=["0"]))
