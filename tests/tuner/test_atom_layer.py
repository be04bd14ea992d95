"""Several adapters on one layer, what is targeted, and refusals."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from atomdiff.atoms.layout import View
from atomdiff.atoms.merge import adapt_weight
from atomdiff.atoms.update import WeightUpdate
from atomdiff.tuner import AtomConfig, AtomLayer
from atomdiff.tuner.model import preset_targets, supported_modules
from atomdiff.tuner.variants import atoms_of


def make_layer(*configs: AtomConfig, seed: int = 0) -> AtomLayer:
    """A convolution with adapters named a, b, ... with random deltas, all active."""
    torch.manual_seed(seed)
    layer = AtomLayer(nn.Conv2d(8, 8, 3, padding=1))
    for name, config in zip("abcd", configs, strict=False):
        layer.update_layer(name, config, "conv")
        for deltas in (layer.tensors("atom_delta"), layer.tensors("channel_delta")):
            if name in deltas:
                nn.init.normal_(deltas[name], std=0.1)
    layer.set_adapter(list("abcd"[: len(configs)]))
    return layer


def matrix(layer: AtomLayer, kind: str, name: str) -> torch.Tensor:
    basis, delta = layer.tensors(f"{kind}_basis")[name], layer.tensors(f"{kind}_delta")[name]
    return layer.scaling[name] * basis.T @ delta


def test_adapters_add_up_before_they_touch_the_weight():
    layer = make_layer(AtomConfig(channel_block=4), AtomConfig(channel_block=4, basis="dct"))
    layer.set_scale("b", -0.5)
    spatial = matrix(layer, "atom", "a") + matrix(layer, "atom", "b")
    channel = matrix(layer, "channel", "a") + matrix(layer, "channel", "b")
    updates = [WeightUpdate(View(), spatial), WeightUpdate(View((4, 4), whole=False), channel)]
    expected = adapt_weight(layer.weight, updates)
    torch.testing.assert_close(layer.adapted_weight(["a", "b"]), expected, atol=1e-6, rtol=0)


def test_adapters_with_blocks_of_different_sizes_work_together():
    layer = make_layer(AtomConfig(channel_block=1), AtomConfig(channel_block=2), AtomConfig(channel_block=8))
    x = torch.randn(1, 8, 5, 5)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, atol=1e-6, rtol=0)
    layer.unmerge()
    torch.testing.assert_close(layer(x), y, atol=0, rtol=0)


def test_merging_one_after_the_other_is_merging_both():
    layer, other = (make_layer(AtomConfig(channel_block=1), AtomConfig()) for _ in range(2))
    layer.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        layer.merge(adapter_names=["b"])
    other.merge()
    assert torch.equal(layer.weight, other.weight) and layer.merged_adapters == ["a", "b"]


def test_a_merged_adapter_can_be_deleted():
    layer, other = (make_layer(AtomConfig(channel_block=1), AtomConfig()) for _ in range(2))
    before = layer.weight.clone()
    layer.merge()
    layer.delete_adapter("a")
    other.merge(adapter_names=["b"])
    assert torch.equal(layer.weight, other.weight)
    layer.delete_adapter("b")
    assert torch.equal(layer.weight, before) and not layer.merged and not layer.r


def test_an_adapter_added_while_merged_is_fitted_to_the_base():
    layer, other = make_layer(AtomConfig()), make_layer(AtomConfig())
    layer.merge()
    for each in (layer, other):
        each.update_layer("late", AtomConfig(), "conv")
    assert torch.equal(layer.atom_basis["late"], other.atom_basis["late"])


def test_disabling_a_merged_layer_gives_the_base():
    layer, x = make_layer(AtomConfig(channel_block=4)), torch.randn(1, 8, 5, 5)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x)) and not layer.merged


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing():
    layer = make_layer(AtomConfig())
    before = layer.weight.clone()
    nn.init.constant_(layer.atom_delta["a"], float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


def test_a_merged_layer_moves_with_its_untouched_weight():
    layer = make_layer(AtomConfig())
    expected = layer.weight.detach().half()
    layer.merge()
    layer.half().unmerge()
    assert torch.equal(layer.weight, expected)


def test_autocast_does_not_blur_the_weight():
    layer = make_layer(AtomConfig(channel_block=4), AtomConfig(channel_block=2))
    plain = layer.adapted_weight(["a", "b"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.adapted_weight(["a", "b"]), plain)
        assert layer(torch.randn(1, 8, 5, 5)).dtype == torch.bfloat16


def test_two_convolutions_are_never_run(monkeypatch):
    calls = []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *args: calls.append(1) or convolve(*args))
    make_layer(AtomConfig(), AtomConfig(channel_block=1))(torch.randn(1, 8, 5, 5))
    assert len(calls) == 1


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


def test_presets_honour_exclusions_and_lists_are_names():
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


def test_weights_too_small_for_a_sparse_code_are_told():
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


def coded_layer() -> AtomLayer:
    return make_layer(AtomConfig(basis="sparse", channel_block=1, num_atoms=4))


def test_a_sparse_code_follows_the_base_weight_and_the_atoms():
    layer, other = coded_layer(), nn.Conv2d(8, 8, 3)
    before = layer.adapted_weight(["a"])
    layer.base_layer.load_state_dict(other.state_dict())
    layer.double().float()  # what moves along is not the old code
    fresh = AtomLayer(other)
    fresh.update_layer("a", AtomConfig(basis="sparse", channel_block=1, num_atoms=4), "conv")
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer.adapted_weight(["a"]), fresh.adapted_weight(["a"]))
    assert not torch.equal(layer.adapted_weight(["a"]), before)


def test_a_sparse_code_made_for_inference_serves_training_and_merging_and_moves_along(monkeypatch):
    layer, x = coded_layer(), torch.randn(1, 8, 5, 5)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.tensors("atom_delta")["a"].grad.abs().max() > 0
    monkeypatch.setattr("atomdiff.tuner.atom_basis.sparse_coefficients", lambda *_: pytest.fail("worked out again"))
    layer.merge()
    layer.unmerge()
    expected = layer(x).double()
    torch.testing.assert_close(layer.double()(x.double()), expected, rtol=0, atol=1e-5)


def test_copies_work_out_their_own_codes():
    layer, x = coded_layer(), torch.randn(1, 8, 5, 5)
    assert (
        len(layer._coefficients) == 0
        and torch.equal(copy.deepcopy(layer)(x), layer(x))
        and len(layer._coefficients) == 1
    )
    assert len(copy.deepcopy(layer)._coefficients) == 0


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


def test_the_layer_passes_for_its_base():
    layer = make_layer(AtomConfig())
    assert (layer.groups, layer.kernel_size, layer.in_channels) == (1, (3, 3), 8)
    assert copy.deepcopy(layer).stride == (1, 1)
    with pytest.raises(AttributeError):
        layer.no_such_thing  # noqa: B018


@pytest.mark.parametrize("convert", ["half", "bfloat16", "to", "double"])
@pytest.mark.parametrize("merged", [False, True])
def test_deltas_and_atoms_are_never_rounded(convert, merged):
    layer = make_layer(AtomConfig(channel_block=4), AtomConfig(basis="dct"))
    model = nn.Sequential(layer)
    before = {key: value.clone() for key, value in model.state_dict().items() if "base_layer" not in key}
    if merged:
        layer.merge()
    model.to(torch.bfloat16) if convert == "to" else getattr(model, convert)()
    after = model.state_dict()
    assert before and all(torch.equal(after[key], before[key]) for key in before)
    assert {after[key].dtype for key in before} == {torch.float64 if convert == "double" else torch.float32}
    assert (
        layer.weight.dtype != torch.float32
        and layer(torch.randn(1, 8, 5, 5, dtype=layer.weight.dtype)).isfinite().all()
    )
