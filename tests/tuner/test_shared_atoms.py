"""Directions that layers share: the equation by loops, which layers have the same, and how they learn together."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from atomdiff.atoms.basis import dct_atoms
from atomdiff.concepts import peft_folder
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import atom_layers, peft_tensors
from atomdiff.tuner.attach import attach_peft
from atomdiff.tuner.inject import inject
from atomdiff.tuner.shared_directions import in_each_layer, stored_once
from tests.helpers import assert_same_tensors

CONFIG = {"share": "kind", "share_count": 3, "basis": "dct", "channel_block": 1, "target_modules": "all"}


def make_model(name="default", **settings):
    """Two kernels of one kind and one of another, with an adapter of random numbers."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Conv2d(4, 6, 3), "two": nn.Conv2d(6, 4, 3), "wide": nn.Conv2d(4, 4, 5)})
    inject(model, AtomConfig(**{**CONFIG, **settings}), name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_shared" in key or "_mix" in key:
                parameter.normal_(std=0.3)
    return model


def adapted_by_loops(layer):
    """X + A @ sum over k of a_k E_k, kernel by kernel."""
    weight = layer.weight.detach().double().numpy()
    mix, shared = (layer.tensors(f"atom_{kind}")["default"].detach().double().numpy() for kind in ("mix", "shared"))
    atoms = dct_atoms(weight.shape[2:], len(shared[0])).double().numpy()
    delta = np.zeros_like(shared[0])
    for factor, direction in zip(mix, shared, strict=True):
        delta += factor * direction
    adapted = np.empty_like(weight)
    for o, i in np.ndindex(weight.shape[:2]):
        row = weight[o, i].reshape(-1)
        changed = row.copy()
        for atom, change in zip(atoms, delta, strict=True):
            changed += (row @ atom) * change
        adapted[o, i] = changed.reshape(weight.shape[2:])
    return adapted


def test_layers_change_as_the_equation_says():
    for layer in atom_layers(make_model()).values():
        found = layer.adapted_weight(["default"]).detach().numpy()
        np.testing.assert_allclose(found, adapted_by_loops(layer), atol=1e-5)
        assert np.abs(found - layer.weight.detach().numpy()).max() > 1e-2


def test_layers_of_a_kind_have_one_parameter():
    model = make_model()

    def shared(model, name="default"):
        return {path: layer.tensors("atom_shared")[name] for path, layer in atom_layers(model).items()}

    for each in (model, copy.deepcopy(model), model.to(torch.float64)):
        found = shared(each)
        assert found["one"] is found["two"] and found["one"].shape == (3, 9, 9) and found["wide"].shape == (3, 25, 25)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == 3 * 81 + 3 * 625 + 3 * 3
    inject(model, AtomConfig(**CONFIG), "other")
    assert shared(model, "other")["one"] is shared(model, "other")["two"]
    assert shared(model, "other")["one"] is not shared(model)["one"]


def test_a_direction_learns_from_all_layers_and_a_mix_once_there_are_directions():
    model = make_model()
    layers = atom_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.tensors("atom_shared")["default"].zero_()
    x = torch.randn(1, 4, 8, 8)

    def backward():
        model.zero_grad()
        hidden = model["two"](model["one"](x))
        (hidden.square().sum() + model["wide"](x).square().sum()).backward()

    backward()
    assert all(not layer.tensors("atom_mix")["default"].grad.any() for layer in layers.values())
    found = layers["one"].tensors("atom_shared")["default"].grad.clone()
    plain = nn.ModuleDict({name: copy.deepcopy(layer.get_base_layer()) for name, layer in layers.items()})
    inject(plain, AtomConfig(**{**CONFIG, "share": None}), "default")
    hidden = plain["two"](plain["one"](x))
    hidden.square().sum().backward()
    expected = torch.zeros_like(found)
    for name in ("one", "two"):
        gradient = atom_layers(plain)[name].tensors("atom_delta")["default"].grad
        for k, factor in enumerate(layers[name].tensors("atom_mix")["default"]):
            expected[k] += factor.detach() * gradient
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    backward()
    assert all(layer.tensors("atom_mix")["default"].grad.abs().max() > 0 for layer in layers.values())


@pytest.mark.parametrize("settings", [CONFIG, {"recursion": 2, "channel_block": 1}], ids=["shared", "recursion"])
def test_mixes_start_from_the_seed_and_differ_between_layers(settings):
    kind = "atom_mix" if "share" in settings else "recursion_mix"

    def mixes(seed):
        torch.manual_seed(seed + 5)
        model = nn.ModuleDict({"one": nn.Conv2d(4, 6, 3), "two": nn.Conv2d(4, 6, 3)})
        inject(model, AtomConfig(**settings, seed=seed), "default")
        return [layer.tensors(kind)["default"].detach() for layer in atom_layers(model).values()]

    assert all(torch.equal(*each) for each in zip(mixes(1), mixes(1), strict=True))
    assert not torch.equal(*mixes(1)) and not torch.equal(mixes(1)[0], mixes(2)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": "all"}, "share='all': expected 'kind' or None"),
        ({"share_count": 0}, "share_count=0: expected a whole number of at least 1"),
        ({"basis": "svd"}, "share='kind' with basis='svd'.*use basis='dct'"),
        ({"channel_block": 2, "joint": True}, "share='kind' with joint=True: choose one of the two"),
        ({"recursion": 2}, "share='kind' with recursion=2: choose one of the two"),
        ({"pruned": True}, "share='kind' with pruned=True"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AtomConfig(**{**CONFIG, **settings})


class Pair(nn.Module):
    """The model of `make_model` without its adapter, as PEFT wraps it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.wide = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 4, 5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("stored", ["by PEFT", "once"])
def test_directions_are_one_parameter_also_when_peft_has_loaded_them(tmp_path, stored, low_cpu_mem_usage):
    model = get_peft_model(Pair(), AtomConfig(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    expected = peft_tensors(model.base_model.model, "default")
    if stored == "once":
        peft_folder.write(tmp_path, {"unet": (model.peft_config["default"], expected)}, {}, denoiser="unet")
    else:
        model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    sizes = [tensor.numel() for key, tensor in saved.items() if key.endswith("atom_shared")]
    assert sorted(sizes) == [0 if stored == "once" else 3 * 81, 3 * 81, 3 * 625]
    adapters = peft_folder.read(tmp_path, None, denoiser="unet")[0]
    assert_same_tensors(adapters["unet"][1], expected)
    assert peft_folder.count_trained(adapters, {}) == 3 * 81 + 3 * 625 + 3 * 3

    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": True}
    loaded = PeftModel.from_pretrained(Pair(), str(tmp_path), **options)
    shared = {path: layer.tensors("atom_shared")["default"] for path, layer in atom_layers(loaded).items()}
    one, two, wide = shared.values()
    assert one is two and one.requires_grad and wide is not one
    assert loaded.get_nb_trainable_parameters()[0] == 3 * 81 + 3 * 625 + 3 * 3
    assert_same_tensors(peft_tensors(loaded.base_model.model, "default"), expected)


def test_a_layer_of_another_base_gets_no_directions_of_another_kind(tmp_path):
    model = make_model()
    config, tensors = model.peft_config["default"], peft_tensors(model, "default")
    peft_folder.write(tmp_path, {"unet": (config, tensors)}, {}, denoiser="unet")
    for changed in ("one", "two"):
        other_base = Pair()
        setattr(other_base, changed, nn.Conv2d(4, 6, 5))
        read = peft_folder.read(tmp_path, None, denoiser="unet")[0]["unet"]
        assert attach_peft(other_base, *read, "default", lambda module: True) == [changed]
        expected = {key: tensor for key, tensor in tensors.items() if f".{changed}." not in key}
        assert_same_tensors(peft_tensors(other_base, "default"), expected)


def test_directions_that_differ_are_not_put_together():
    tensors = peft_tensors(make_model(), "default")
    first = next(key for key in tensors if key.endswith("one.atom_shared"))
    tensors[first] = tensors[first] + 1
    assert_same_tensors(stored_once(tensors), tensors)
    assert_same_tensors(in_each_layer(tensors), tensors)
