"""Methods whose layers share tensors: several adapters in one model, each with its own, and PEFT's own files."""

import copy

import pytest
import torch
from peft import (
    FrodConfig,
    LoraConfig,
    PveraConfig,
    RandLoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import activate, peft_tensors
from atomdiff.tuner.attach import attach_peft, delete_adapter
from atomdiff.tuner.inject import inject
from atomdiff.tuner.shared_state import shared_state

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")

TARGETS = ["one", "two"]
METHODS = {
    "vera": lambda **own: VeraConfig(r=4, save_projection=False, **own),
    "vera with projections": lambda **own: VeraConfig(r=4, **own),
    "pvera": lambda **own: PveraConfig(r=4, **own),
    "randlora": lambda **own: RandLoraConfig(r=4, save_projection=False, **own),
    "tinylora": lambda **own: TinyLoraConfig(r=2, u=8, **own),
    "unilora": lambda **own: UniLoraConfig(r=2, theta_d_length=32, **own),
    "vblora": lambda **own: VBLoRAConfig(r=2, num_vectors=8, vector_length=4, **own),
}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 16)

    def forward(self, x):
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Toy().eval()


@pytest.fixture
def x():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def trained(base, config, seed):
    """The tensors that PEFT saves of an adapter that it added and that was trained, and the model's output."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 3)
    return model.eval()


def saved(model):
    return {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("method", METHODS)
def test_what_peft_saved_computes_the_same(base, x, method):
    config = METHODS[method](target_modules=TARGETS)
    model = trained(base, config, seed=2)
    tensors = saved(model)
    attach_peft(base, config, tensors, "mine")
    torch.testing.assert_close(base(x), model(x), atol=1e-5, rtol=0)
    written = peft_tensors(base, "mine")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_one_method_keep_what_is_theirs(base, x, method):
    configs = {"a": METHODS[method](target_modules=TARGETS), "b": METHODS[method](target_modules=["two", "three"])}
    models = {name: trained(base, config, seed) for seed, (name, config) in enumerate(configs.items())}
    before, plain = {key: value.clone() for key, value in base.state_dict().items()}, base(x)
    outputs = {name: model(x) for name, model in models.items()}
    assert all((output - plain).abs().max() > 1e-3 for output in outputs.values())
    for name, config in configs.items():
        attach_peft(base, config, saved(models[name]), name)
    for name in ("a", "b", "a"):
        activate(base, [name])
        torch.testing.assert_close(base(x), outputs[name], atol=1e-5, rtol=0)
    delete_adapter(base, "a")
    activate(base, ["b"])
    torch.testing.assert_close(base(x), outputs["b"], atol=1e-5, rtol=0)
    delete_adapter(base, "b")
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert torch.equal(base(x), plain)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_of_a_deleted_adapter(base, method):
    for name in ("stays", "goes"):
        inject(base, METHODS[method](target_modules=TARGETS), name)
    delete_adapter(base, "goes")
    assert all("goes" not in held for held in shared_state(base).values())
    assert not [key for key, _ in [*base.named_parameters(), *base.named_buffers()] if "goes" in key.split(".")]


def test_a_method_that_keeps_more_than_layers_is_refused(base):
    with pytest.raises(ValueError, match="FROD adapters are more than layers: use peft.get_peft_model"):
        inject(base, FrodConfig(target_modules=TARGETS), "mine")


@pytest.mark.parametrize("method", ["vera", "randlora", "unilora"])
def test_layers_that_have_other_adapters_are_measured_below_them(base, x, method):
    config = METHODS[method](target_modules=TARGETS)
    model = trained(base, config, seed=2)
    for name, other in (("lora", LoraConfig(r=2, target_modules=TARGETS)), ("atoms", AtomConfig(target_modules="all"))):
        inject(base, other, name)
    attach_peft(base, config, saved(model), "mine")
    activate(base, ["mine"])
    torch.testing.assert_close(base(x), model(x), atol=1e-5, rtol=0)
    assert list(base.peft_config) == ["lora", "atoms", "mine"]


def test_where_peft_does_not_find_a_layer_below_other_adapters_it_is_said(base):
    inject(base, LoraConfig(r=2, target_modules=TARGETS), "lora")
    with pytest.raises(ValueError, match="TINYLORA does not find the layer 'one' below other adapters: load it first"):
        inject(base, METHODS["tinylora"](target_modules=TARGETS), "mine")
