"""One table of promises, over the methods and all kinds of blocks that they adapt."""

import copy
from functools import partial

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import attach_execution_device_hook
from diffusers.hooks import apply_group_offloading
from peft import PeftModel, get_peft_model

from atomdiff.activation_adapters.layer import ActivationLayer
from tests.activation_adapters.methods import CASES, METHODS, call, make_model, shake, trained
from tests.helpers import assert_same_tensors

SOME = [case for case in CASES if case[1] in ("unet", "resnet", "vit")]


def names(case):
    return case.replace(" ", "_") if isinstance(case, str) else None


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ActivationLayer)]


def _by_groups(kind, on_disk, model, folder):
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    options |= {"offload_to_disk_path": str(folder)} if on_disk else {}
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type=kind, **options)


def structure(model):
    return [(path, type(module), set(vars(module))) for path, module in model.named_modules()]


@pytest.mark.parametrize(("method", "name"), CASES, ids=names)
def test_an_adapter_begins_as_the_base_changes_the_output_and_comes_off_exactly(method, name):
    base = make_model(name)
    expected, before, shape = call(base), copy.deepcopy(base.state_dict()), structure(base)
    model = get_peft_model(base, METHODS[method]())
    assert torch.equal(call(model), expected)
    shake(model)
    assert (call(model) - expected).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(call(model), expected)
    removed = model.unload()
    assert torch.equal(call(removed), expected)
    assert structure(removed) == shape
    assert_same_tensors(removed.state_dict(), before)


@pytest.mark.parametrize(("method", "name"), CASES, ids=names)
def test_every_parameter_learns_and_nothing_else_does(method, name):
    base = make_model(name)
    before = copy.deepcopy(base.state_dict())
    model = trained(method, base)
    call(model, grad=True).square().sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert gradients and all("default" in key for key in gradients)
    # The adapters in the last block of a ViT change tokens that its head does not read: it reads the class token.
    read = [gradient for key, gradient in gradients.items() if name not in ("vit", "deit") or ".1.after_" not in key]
    assert read and all(gradient is not None for gradient in read)
    assert sum(bool(gradient.any()) for gradient in read) > 0.7 * len(read)  # behind a ReLU some have none
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    assert_same_tensors(model.unload().state_dict(), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(("method", "name"), SOME, ids=names)
def test_saved_is_reloaded(method, name, low_cpu_mem_usage, tmp_path):
    model = trained(method, make_model(name))
    model.save_pretrained(tmp_path)
    options = {"adapter_name": "again", "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path, **options)
    torch.testing.assert_close(call(loaded), call(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("method", "name"), [case for case in SOME if case[1] != "unet"], ids=names)
def test_a_head_is_trained_and_saved_beside_an_adapter(method, name, tmp_path):
    base = make_model(name)
    plain = call(base)
    config = METHODS[method]()
    config.modules_to_save = ["classifier"]
    model = get_peft_model(base, config)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    head = {key for key in trainable if "classifier" in key}
    assert head and len(head) < len(trainable)
    shake(model)
    with torch.no_grad():
        for key in head:
            model.get_parameter(key).add_(1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path)
    torch.testing.assert_close(call(loaded), call(model.eval()), atol=1e-5, rtol=0)
    assert (call(loaded) - plain).abs().max() > 0.5
    with loaded.disable_adapter():
        assert torch.equal(call(loaded), plain)


@pytest.mark.parametrize(("method", "name"), [case for case in SOME if case[1] != "unet"], ids=names)
def test_transformers_saves_and_loads_adapters(method, name, tmp_path):
    model = make_model(name)
    plain = call(model)
    model.add_adapter(METHODS[method]())
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = make_model(name)
    loaded.load_adapter(str(tmp_path), "again")
    torch.testing.assert_close(call(loaded), call(model.eval()), atol=1e-5, rtol=0)
    assert (call(loaded) - plain).abs().max() > 1e-4
    loaded.delete_adapter("again")
    assert torch.equal(call(loaded), plain)


@pytest.mark.parametrize(("method", "name"), SOME, ids=names)
def test_two_adapters_with_weights(method, name):
    base = make_model(name)
    alone = call(trained(method, copy.deepcopy(base)))
    other = call(trained(method, copy.deepcopy(base), seed=3))
    plain, model = call(base), trained(method, base)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.add_adapter("other", METHODS[method]())
    shake(model, "other", seed=3)

    def with_weights(**weights):
        for layer in layers_of(model):
            layer.set_adapter(list(weights))
            for adapter, weight in weights.items():
                layer.set_scale(adapter, weight)
        return call(model)

    assert torch.equal(with_weights(default=1), alone)
    assert torch.equal(with_weights(other=1), other)
    assert torch.equal(with_weights(other=0), plain)
    half, both = with_weights(default=0.5), with_weights(default=1, other=1)
    for one, another in ((half, alone), (half, plain), (both, alone), (both, other)):
        assert (one - another).abs().max() > 1e-5
    model.delete_adapter("other")
    assert torch.equal(with_weights(default=1), alone)


@pytest.mark.parametrize(("method", "name"), SOME, ids=names)
def test_merging_is_refused_and_changes_nothing(method, name):
    model = trained(method, make_model(name))
    expected = call(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="depends on its input"):
            merge()
    assert torch.equal(call(model), expected)


@pytest.mark.parametrize(("method", "name"), SOME, ids=names)
def test_half_precision_and_autocast_compute_in_their_dtype(method, name):
    def inputs(dtype):
        return lambda model: call(_InDtype(model, dtype))

    model = trained(method, make_model(name))
    expected = call(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = call(model)
    half = inputs(torch.bfloat16)(copy.deepcopy(model).bfloat16())
    below = trained(method, make_model(name).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        trainable = call(below)  # float32 comes in, as from a training step
    assert {p.dtype for p in below.parameters() if p.requires_grad} == {torch.float32}
    for output in (mixed, trainable, half, inputs(torch.bfloat16)(below)):
        torch.testing.assert_close(output.float(), expected, atol=0.1 * float(expected.abs().max()), rtol=0)
    assert half.dtype == torch.bfloat16


WAYS = {
    "sequential": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, str(folder), torch.device("cpu")),
    "hooks on blocks": lambda model, folder: attach_execution_device_hook(model, torch.device("cpu")),
}
BY_GROUPS = {
    f"{kind} on {'disk' if on_disk else 'the CPU'}": partial(_by_groups, kind, on_disk)
    for kind in ("leaf_level", "block_level")
    for on_disk in (False, True)
}


@pytest.mark.parametrize(
    ("method", "name", "way"),
    [
        (*case, way)
        for case in [*SOME, ("mona", "unet of SDXL")]
        for way in [*WAYS, *(BY_GROUPS if "unet" in case[1] else ())]  # groups are for models of diffusers
    ],
    ids=names,
)
def test_adapters_act_in_models_that_are_offloaded_afterwards(method, name, way, tmp_path):
    model = make_model(name)
    plain, wrapped = call(model), trained(method, model)
    expected = call(model)
    (WAYS | BY_GROUPS)[way](model, tmp_path)
    assert sum(parameter.is_meta for parameter in model.parameters()) > 10 or way not in ("sequential", "disk")
    for _ in range(2):
        assert torch.equal(call(model), expected)
    wrapped.unload()
    assert torch.equal(call(model), plain)


class _InDtype:
    """A model that is given floating-point inputs in a dtype."""

    def __init__(self, model, dtype):
        self.model, self.dtype, self.config = model, dtype, model.config

    def __call__(self, *inputs):
        cast = [x.to(self.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
        return self.model(*cast)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_gives_the_same_gradients(method):
    def gradients(model):
        model.train()
        torch.manual_seed(5)  # of the dropout
        call(model, grad=True).square().sum().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    base = make_model("unet of SDXL")
    plain = gradients(trained(method, copy.deepcopy(base)))
    base.enable_gradient_checkpointing()
    again = gradients(trained(method, base))
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_models_compute_the_same(method):
    model = trained(method, make_model("unet"))
    expected = call(model)
    compiled = torch.compile(model, backend="eager")
    latents, text = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(latents, 5, text).sample, model(latents, 5, text).sample)
    assert torch.equal(call(model), expected)


@pytest.mark.parametrize(("method", "name"), CASES, ids=names)
def test_a_pickled_model_is_the_same_model(method, name, tmp_path):
    model = trained(method, make_model(name)).base_model.model
    expected, shape = call(model), structure(model)
    for protocol in (2, 5):
        torch.save(model, tmp_path / "model.pt", pickle_protocol=protocol)
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(call(loaded), expected) and structure(loaded) == shape
    shake(loaded, seed=4)
    assert torch.equal(call(model), expected) and not torch.equal(call(loaded), expected)


@pytest.mark.parametrize(("method", "name"), SOME, ids=names)
def test_a_copy_is_a_model_of_its_own(method, name):
    model = trained(method, make_model(name))
    expected = call(model)
    copied = copy.deepcopy(model)
    shake(copied, seed=4)
    assert torch.equal(call(model), expected) and not torch.equal(call(copied), expected)
