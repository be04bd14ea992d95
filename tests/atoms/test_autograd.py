import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from atomdiff.atoms import autograd, im2col_autograd
from atomdiff.atoms.autograd import MatrixGradients
from atomdiff.atoms.layout import View
from atomdiff.atoms.merge import parts_of
from atomdiff.atoms.update import WeightUpdate, updated_weight
from atomdiff.tuner import AtomConfig

VARIANTS = {
    "spatial": {"channel_block": 1},
    "blocks": {"channel_block": 4},
    "wide blocks": {"channel_block": 8},
    "few atoms": {"channel_block": 2, "num_atoms": 3},
    "joint": {"channel_block": 2, "joint": True},
    "recursion": {"channel_block": 2, "recursion": 2},
    "recursion of kernels": {"channel_block": 1, "recursion": 2},
    "sparse": {"channel_block": 2, "basis": "sparse"},
    "sparse recursion": {"channel_block": 1, "basis": "sparse", "recursion": 2},
}
LAYERS = {
    "conv": (lambda: nn.Conv2d(8, 16, 3, padding=1), (3, 8, 6, 6)),
    "strided": (lambda: nn.Conv2d(8, 16, 3, stride=2, dilation=2, padding=(2, 1), bias=False), (3, 8, 9, 8)),
    "few positions": (lambda: nn.Conv2d(8, 64, 3, padding=1), (1, 8, 4, 4)),
    "few strided": (lambda: nn.Conv2d(8, 64, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 0)), (2, 8, 5, 6)),
    "grouped": (lambda: nn.Conv2d(8, 16, (3, 5), groups=2, padding="same"), (3, 8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (3, 8, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(8, 16, 1), (3, 8, 6, 6)),
    "circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (3, 8, 6, 6)),
    "line": (lambda: nn.Conv1d(8, 8, 5, padding=2), (3, 8, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 16, 3, stride=2, output_padding=1), (3, 8, 6, 6)),
    "linear": (lambda: nn.Linear(8, 16), (3, 5, 8)),
}


def adapted(layer, variant, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(LAYERS[layer][0]()).requires_grad_(False)
    model = get_peft_model(model, AtomConfig(target_modules=["0"], **VARIANTS[variant]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model, torch.randn(LAYERS[layer][1])


def gradients(model, x, run=None):
    """The output, and the gradients of the input and of everything that is trained."""
    x = x.clone().requires_grad_()
    y = (run or model)(x)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad((y.float() * target).sum(), [x, *trained.values()])
    return {"output": y.detach(), **dict(zip(["input", *trained], actual, strict=True))}


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-3)
        torch.testing.assert_close(actual[name] / scale, tensor / scale, atol=tolerance, rtol=0, msg=name)


def possible(layers, variants):
    """Recursion needs a kernel."""
    flat = ("pointwise", "linear")
    return [(x, y) for x in layers for y in variants if not (x in flat and "recursion" in VARIANTS[y])]


@pytest.mark.parametrize(("layer", "variant"), possible(LAYERS, VARIANTS))
def test_gradients_are_those_of_the_equation(layer, variant, monkeypatch):
    model, x = adapted(layer, variant)
    actual = gradients(model, x)
    monkeypatch.setattr(autograd, "can_recompute", lambda *_: False)
    monkeypatch.setattr("atomdiff.tuner.layer.adapt_weight", updated_weight)
    assert_close(actual, gradients(model, x))


@pytest.mark.parametrize("at_once", [1, 64 * 9 * 4])
def test_any_parts_and_products_give_the_same_numbers(at_once, monkeypatch):
    model, x = adapted("few positions", "blocks" if at_once > 1 else "few atoms")
    expected = gradients(model, x)
    monkeypatch.setattr(im2col_autograd, "_CPU_PART", at_once)
    monkeypatch.setattr(im2col_autograd, "_FEW", 0)
    assert_close(gradients(model, x), expected)


@pytest.mark.parametrize("shape", [(1, 8, 1, 5), (2, 6, 4, 4)])
def test_the_module_says_what_is_wrong_with_an_input(shape):
    model = nn.Sequential(nn.Conv2d(8, 64, 3)).requires_grad_(False)
    model = get_peft_model(model, AtomConfig(target_modules=["0"], channel_block=4))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater|to have 8 channels"):
        model(torch.zeros(shape))


@pytest.mark.parametrize("write", ["merge_adapter", "unmerge_adapter"])
def test_a_weight_that_was_written_meanwhile_is_noticed(write):
    model, x = adapted("conv", "blocks")
    if write == "unmerge_adapter":
        model.merge_adapter()
    y = model(x.requires_grad_()).sum()
    getattr(model, write)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def kept(model, x):
    """What autograd keeps for the backward pass beside the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers(), x]}
    sizes = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x.requires_grad_())
    return sizes


@pytest.mark.parametrize(
    ("layer", "variant"),
    possible(["conv", "few positions", "transposed", "linear"], ["spatial", "blocks", "joint", "recursion"]),
)
def test_nothing_of_the_size_of_a_weight_is_kept(layer, variant, monkeypatch):
    torch.manual_seed(0)
    build = {
        "conv": lambda: nn.Conv2d(64, 64, 3, padding=1),
        "few positions": lambda: nn.Conv2d(64, 128, 3, padding=1),
        "transposed": lambda: nn.ConvTranspose2d(64, 64, 3),
        "linear": lambda: nn.Linear(512, 512),
    }[layer]
    model = nn.Sequential(build()).requires_grad_(False)
    model = get_peft_model(model, AtomConfig(target_modules=["0"], **VARIANTS[variant]))
    x = torch.randn(1, 512) if layer == "linear" else torch.randn(1, 64, 4, 4)
    size = model.base_model.model[0].get_base_layer().weight.numel()
    monkeypatch.setattr(autograd, "_SMALL_WEIGHT", size - 1)
    assert max(kept(model, x), default=0) < size / 2
    monkeypatch.setattr(autograd, "can_recompute", lambda *_: False)
    assert max(kept(model, x)) >= size


@pytest.mark.parametrize(("layer", "variant"), possible(["conv", "linear"], ["spatial", "blocks", "recursion"]))
def test_an_adapted_weight_that_is_kept_gives_the_gradients_of_one_that_is_made_again(layer, variant, monkeypatch):
    model, x = adapted(layer, variant)
    x = (x[:1, ..., :6, :6] if layer == "conv" else x[:1]).clone()
    size = model.base_model.model[0].get_base_layer().weight.numel()
    assert x.numel() < size == max(kept(model, x.clone()))
    expected = gradients(model, x)
    monkeypatch.setattr(autograd, "_SMALL_WEIGHT", 0)
    assert size not in kept(model, x.clone())
    assert_close(gradients(model, x), expected, tolerance=0.0)


@pytest.mark.parametrize(
    ("layer", "variant"), possible(["conv", "few positions", "linear"], ["spatial", "blocks", "recursion"])
)
@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_autocast(layer, variant, frozen):
    model, x = adapted(layer, variant)
    expected = gradients(model, x)
    base = model.base_model.model[0].get_base_layer()
    base.to(frozen)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    actual = gradients(model, x, run)
    assert actual["output"].dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for name, tensor in actual.items() if name != "output")
    assert_close({name: tensor.float() for name, tensor in actual.items()}, expected, tolerance=0.03)


@pytest.mark.parametrize("variant", ["spatial", "blocks", "recursion"])
def test_gradient_checkpointing(variant):
    model, x = adapted("conv", variant)
    assert_close(gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False)), gradients(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["spatial", "blocks", "recursion"])
def test_compiled(variant):
    model, x = adapted("conv", variant)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    actual, expected = gradients(compiled, x), gradients(model, x)
    assert_close({name.replace("_orig_mod.", ""): tensor for name, tensor in actual.items()}, expected)


def test_a_base_that_is_trained_too_gets_its_gradient():
    model, x = adapted("conv", "blocks")
    base = model.base_model.model[0].get_base_layer()
    base.weight.requires_grad_()
    assert "base_model.model.0.base_layer.weight" in gradients(model, x)


def test_a_bias_that_is_trained_too_gets_its_gradient():
    model, x = adapted("conv", "blocks")
    model.base_model.model[0].get_base_layer().bias.requires_grad_()
    assert gradients(model, x)["base_model.model.0.base_layer.bias"].abs().max() > 0


def matrix_gradients(weight, updates, gradient):
    sums = MatrixGradients(updates, weight[0, 0].numel())
    for part in parts_of(weight, updates):
        sums.add(weight[part], gradient[part], part)
    return sums.result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", [((1, 1), None), (None, (4, 2)), ((1, 1), (4, 2)), ((4, 2), None), ((2, 2), (4, 2))])
def test_matrix_gradients(dtype, blocks, monkeypatch):
    monkeypatch.setattr("atomdiff.atoms.merge._CPU_PART", 200)
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 3, 3, dtype=dtype)
    sizes = [(blocks[0], True), (blocks[1], False)]
    views = [View(block, whole) for block, whole in sizes if block]
    updates = [WeightUpdate(view, torch.randn([view.rows(weight).shape[1]] * 2, dtype=dtype) / 5) for view in views]
    leaves = [update.matrix.requires_grad_() for update in updates]
    gradient = torch.randn_like(weight)
    expected = torch.autograd.grad(updated_weight(weight, updates), leaves, gradient)
    for actual, correct in zip(matrix_gradients(weight, updates, gradient), expected, strict=True):
        torch.testing.assert_close(actual, correct, atol=1e-3 if dtype == torch.float32 else 1e-9, rtol=1e-4)


def test_gradients_in_float16_may_be_larger_than_its_numbers():
    weight, gradient = torch.ones(64, 64, 3, 3), torch.full((64, 64, 3, 3), 100.0)
    update = WeightUpdate(View(), torch.zeros(9, 9))
    (actual,) = matrix_gradients(weight.half(), [update], gradient.half())
    torch.testing.assert_close(actual, torch.full((9, 9), 409600.0))


@pytest.mark.parametrize("layer", ["conv", "few positions", "linear", "transposed", "line"])
def test_inputs_without_a_batch(layer, monkeypatch):
    model, x = adapted(layer, "blocks")
    x = x[0, 0] if layer == "linear" else x[0]
    actual = gradients(model, x)
    monkeypatch.setattr(autograd, "can_recompute", lambda *_: False)
    assert_close(actual, gradients(model, x))


@pytest.mark.parametrize("variant", ["spatial", "blocks"])
def test_float64_stays_float64(variant, monkeypatch):
    model, x = adapted("few positions", variant)
    model, x = model.double(), x.double()
    actual = gradients(model, x)
    monkeypatch.setattr(autograd, "can_recompute", lambda *_: False)
    assert_close(actual, gradients(model, x), tolerance=1e-12)


@pytest.mark.parametrize("x", [torch.ones(1, 8, 2, 5), torch.ones(1, 8, 4, 4, dtype=torch.int64)])
def test_the_layer_itself_refuses_what_it_cannot_take(x):
    model = nn.Sequential(nn.Conv2d(8, 64, 3)).requires_grad_(False)
    model = get_peft_model(model, AtomConfig(target_modules=["0"]))
    with pytest.raises(RuntimeError):
        model(x)


def test_half_precision_does_not_lose_a_small_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 256, 3, padding=1, bias=False)).requires_grad_(False).bfloat16()
    model = get_peft_model(model, AtomConfig(target_modules=["0"], channel_block=1))
    x = torch.randn(2, 64, 8, 8).bfloat16()
    base = model(x).float()
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.atom_delta["default"].copy_(0.003 * layer.atom_basis["default"])  # S = .003 I
    change = model(x).float() - base
    assert float((change * base).sum().detach() / base.square().sum().detach()) == pytest.approx(0.003, rel=0.2)


def test_hooks_and_replaced_forwards_are_kept():
    model, x = adapted("few positions", "spatial")
    expected = gradients(model, x)
    base = model.base_model.model[0].get_base_layer()
    handle = base.register_forward_hook(lambda module, inputs, output: 2 * output)
    actual = gradients(model, x)
    assert_close(
        {"output": actual["output"], "input": actual["input"]}, {k: 2 * expected[k] for k in ("output", "input")}
    )
    handle.remove()
    usual = base.forward
    base.forward = lambda x: 2 * usual(x)
    assert_close({"input": gradients(model, x)["input"]}, {"input": 2 * expected["input"]})


def test_a_layer_with_a_forward_of_its_own_keeps_it():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Doubled(8, 8).requires_grad_(False)
    model = get_peft_model(nn.Sequential(layer), AtomConfig(target_modules=["0"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    x = torch.randn(3, 8, requires_grad=True)
    plain = copy.deepcopy(model)
    plain.base_model.model[0].base_layer.__class__ = nn.Linear
    torch.testing.assert_close(model(x), 2 * plain(x))
    actual = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(actual, 2 * torch.autograd.grad(plain(x).sum(), x)[0])
