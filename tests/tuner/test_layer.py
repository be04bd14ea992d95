"""Several adapters on one layer, merged and unmerged, and what a layer keeps of them."""

import copy

import pytest
import torch
from torch import nn

from atomdiff.atoms import autograd
from atomdiff.atoms.layout import View
from atomdiff.atoms.merge import adapt_weight
from atomdiff.atoms.update import WeightUpdate
from atomdiff.tuner import AtomConfig, AtomLayer
from atomdiff.utils.errors import UserError


def make_layer(*configs: AtomConfig) -> AtomLayer:
    """A convolution with adapters named a, b, ... with random deltas, all active."""
    torch.manual_seed(0)
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
    updates = [WeightUpdate(View(), spatial), WeightUpdate(View((4, 4), spans_kernel=False), channel)]
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


def test_the_others_keep_the_weights_that_they_were_merged_with():
    layer, other = (make_layer(AtomConfig(channel_block=1), AtomConfig()) for _ in range(2))
    layer.merge()
    layer.set_scale("b", 0.5)
    layer.delete_adapter("a")
    other.merge(adapter_names=["b"])
    assert torch.equal(layer.weight, other.weight)
    layer.unmerge()
    layer.merge()
    assert not torch.equal(layer.weight, other.weight)


def test_a_weight_in_float8_is_not_written_and_its_adapters_come_off():
    layer = make_layer(AtomConfig(channel_block=1), AtomConfig())
    base = layer.weight.to(torch.float8_e4m3fn)
    layer.merge()
    layer.to(torch.float8_e4m3fn)
    with pytest.raises(UserError, match="stored in torch.float8_e4m3fn"):
        layer.write({"b": 1.0})
    layer.delete_adapter("a")
    assert torch.equal(layer.weight.float(), base.float()) and not layer.merged and list(layer.r) == ["b"]


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


@pytest.mark.parametrize("config", [{"channel_block": 4}, {"channel_block": 1, "recursion": 2}, {"joint": True}])
def test_autocast_does_not_blur_what_is_trained(config, monkeypatch):
    layer, seen = make_layer(AtomConfig(**config)), []
    layer.base_layer.to(torch.bfloat16).requires_grad_(False)
    call = autograd.call
    monkeypatch.setattr(autograd, "call", lambda *args: seen.extend(args[2]) or call(*args))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 8, 5, 5))
    assert seen and all(update.matrix.dtype == torch.float32 for update in seen)


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


def sparse_layer() -> AtomLayer:
    return make_layer(AtomConfig(basis="sparse", channel_block=1, num_atoms=4))


def test_sparse_coefficients_follow_the_base_weight_and_the_atoms():
    layer, other = sparse_layer(), nn.Conv2d(8, 8, 3)
    before = layer.adapted_weight(["a"])
    layer.base_layer.load_state_dict(other.state_dict())
    layer.double().float()  # what moves along are not the old coefficients
    expected = AtomLayer(other)
    expected.update_layer("a", AtomConfig(basis="sparse", channel_block=1, num_atoms=4), "conv")
    expected.load_state_dict(layer.state_dict())
    assert torch.equal(layer.adapted_weight(["a"]), expected.adapted_weight(["a"]))
    assert not torch.equal(layer.adapted_weight(["a"]), before)


def test_sparse_coefficients_made_for_inference_serve_training_and_merging_and_move_along(monkeypatch):
    layer, x = sparse_layer(), torch.randn(1, 8, 5, 5)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.tensors("atom_delta")["a"].grad.abs().max() > 0
    monkeypatch.setattr("atomdiff.atoms.atom_basis.sparse_coefficients", lambda *_: pytest.fail("worked out again"))
    layer.merge()
    layer.unmerge()
    expected = layer(x).double()
    torch.testing.assert_close(layer.double()(x.double()), expected, rtol=0, atol=1e-5)


def test_copies_work_out_their_own_coefficients():
    layer, x = sparse_layer(), torch.randn(1, 8, 5, 5)
    assert (
        len(layer._coefficients) == 0
        and torch.equal(copy.deepcopy(layer)(x), layer(x))
        and len(layer._coefficients) == 1
    )
    assert len(copy.deepcopy(layer)._coefficients) == 0


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
