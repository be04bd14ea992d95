"""What PEFT's own tests ask of every method, here of atoms: names, random starts, statuses, switching, saving."""

import copy

import pytest
import torch
from peft import NoMatchingPeftModuleError, PeftModel, get_layer_status, get_model_status, get_peft_model
from torch import nn

from atomdiff.tuner import AtomConfig, AtomLayer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.line = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.line(torch.tanh(self.up(torch.tanh(self.conv(x)))).mean((2, 3)))))


CONFIGS = {
    "blocks": {"target_modules": ["conv", "up", "line"], "channel_block": 2},
    "kernels": {"target_modules": ["conv"], "channel_block": 1},
    "joint": {"target_modules": ["conv", "up"], "channel_block": 2, "joint": True},
    "recursion": {"target_modules": ["conv"], "channel_block": 1, "recursion": 2},
    "sparse": {"target_modules": ["conv", "line"], "channel_block": 2, "basis": "sparse"},
}
X = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(params=CONFIGS)
def config(request):
    return AtomConfig(**CONFIGS[request.param], init_weights=False)


def test_layers_say_their_sizes(net):
    model = get_peft_model(net, AtomConfig(target_modules=["conv", "up", "line"], channel_block=2))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AtomLayer)}
    sizes = [(layer.in_features, layer.out_features) for layer in layers.values()]
    assert sizes == [(4, 8), (8, 4), (4, 6)]


def test_a_random_start_changes_the_output_and_the_usual_one_does_not(net, config):
    expected = net(X)
    usual = copy.deepcopy(config)
    usual.init_weights = True
    assert torch.allclose(get_peft_model(copy.deepcopy(net), usual)(X), expected, atol=1e-6)
    changed = get_peft_model(net, config)(X)
    assert torch.isfinite(changed).all() and (changed - expected).abs().max() > 1e-3


def test_several_adapters_act_together_and_statuses_tell_of_them(net, config):
    model = get_peft_model(net, config, "a")
    model.add_adapter("b", copy.deepcopy(config))
    outputs = {}
    for active in ("a", "b", ["a", "b"]):
        model.base_model.set_adapter(active)
        outputs[str(active)] = model(X)
    assert (outputs["a"] - outputs["b"]).abs().max() > 1e-4
    assert (outputs["['a', 'b']"] - outputs["a"]).abs().max() > 1e-4
    for status in get_layer_status(model):
        assert status.active_adapters == ["a", "b"] and status.available_adapters == ["a", "b"]
        assert status.enabled and status.merged_adapters == [] and status.requires_grad == {"a": True, "b": True}
    status = get_model_status(model)
    assert (status.adapter_model_type, status.peft_types) == ("AtomModel", {"a": "ATOMS", "b": "ATOMS"})
    assert status.num_adapter_layers == len(config.target_modules) and status.trainable_params > 0
    model.merge_adapter()
    assert torch.allclose(model(X), outputs["['a', 'b']"], atol=1e-5)
    assert get_model_status(model).merged_adapters == ["a", "b"]
    model.unmerge_adapter()
    model.set_requires_grad("b", False)
    assert get_model_status(model).requires_grad == {"a": True, "b": False}
    model.delete_adapter("b")
    model.set_adapter("a")
    assert torch.allclose(model(X), outputs["a"], atol=1e-6)
    assert get_model_status(model).available_adapters == ["a"]


@pytest.mark.slow
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapters_load_in_every_way(net, config, tmp_path, low_cpu_mem_usage):
    config.modules_to_save = ["head"]
    model = get_peft_model(copy.deepcopy(net), config)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].bias.add_(1)
    model.save_pretrained(tmp_path)
    expected = model(X)
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(net), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, torch_device="cpu"
    )
    assert torch.allclose(loaded(X), expected, atol=1e-5)
    half = PeftModel.from_pretrained(net.bfloat16(), tmp_path, autocast_adapter_dtype=True, torch_device="cpu")
    assert torch.allclose(half(X.bfloat16()).float(), expected, atol=0.1)


def test_nothing_to_adapt_is_peft_s_own_error(net):
    for fields in ({"target_modules": ["nothing"]}, {"target_modules": ["conv"], "exclude_modules": ["conv"]}):
        with pytest.raises(NoMatchingPeftModuleError, match="matches no layer of this Net") as caught:
            get_peft_model(net, AtomConfig(**fields))
        assert isinstance(caught.value, ValueError)
    with pytest.raises(TypeError, match="target_parameters"):
        AtomConfig(target_parameters=["conv.weight"])
