"""One table of promises, over atoms in several settings and, where they can keep them, over LoRA and OFT."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from atomdiff.tuner import AtomConfig, AtomLayer

TOLERANCE = {"atol": 1e-5, "rtol": 0}


class Toy(nn.Module):
    """Convolutions with every setting that a module can have, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, (3, 1), groups=2, padding=(1, 0), padding_mode="circular")
        self.depthwise = nn.Conv2d(8, 8, 5, groups=8, padding="same", dilation=(1, 2), padding_mode="replicate")
        self.wide = nn.Conv2d(8, 12, (2, 7), padding=(1, 3), bias=False)
        self.point = nn.Conv2d(12, 12, 1)
        self.transposed = nn.ConvTranspose2d(12, 12, (3, 2), stride=2, groups=3, output_padding=1)
        self.line = nn.Conv1d(12, 12, 3, padding=1)
        self.to_q = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.plain, self.strided, self.grouped, self.depthwise, self.wide, self.point, self.transposed):
            x = torch.tanh(layer(x))
        return self.to_q(torch.tanh(self.line(x.flatten(2))).mean(2))


METHODS: dict[str, Callable[[], PeftConfig]] = {
    "spatial": lambda: AtomConfig(channel_block=1),
    "few atoms": lambda: AtomConfig(channel_block=1, num_atoms=2),
    "blocks": lambda: AtomConfig(target_modules="all"),
    "blocks of attention": lambda: AtomConfig(channel_block=2, target_modules="attention"),
    "blocks, dct": lambda: AtomConfig(basis="dct", target_modules="all"),
    "own blocks": lambda: AtomConfig(
        channel_block=1, channel_block_pattern={"to_q": 5, "wide": 4}, target_modules=r"to_q|wide|point"
    ),
    "joint": lambda: AtomConfig(joint=True, channel_block=2, num_atoms=3, target_modules="all"),
    "recursion": lambda: AtomConfig(recursion=2, channel_block=1),
    "recursion, blocks, dct": lambda: AtomConfig(recursion=2, basis="dct", target_modules="all"),
    "sparse": lambda: AtomConfig(basis="sparse", target_modules=["wide", "depthwise", "to_q"]),
    "sparse, overcomplete": lambda: AtomConfig(
        basis="sparse", channel_block=1, num_atoms=20, target_modules=["plain", "line"]
    ),
    "sparse, joint": lambda: AtomConfig(
        basis="sparse", channel_block=2, joint=True, num_atoms=5, target_modules=["plain", "transposed"]
    ),
    "sparse, recursion": lambda: AtomConfig(basis="sparse", recursion=2, target_modules=["line", "to_q"]),
    "shared": lambda: AtomConfig(share="kind", share_count=2, basis="dct", target_modules="all"),
    "adaptive": lambda: AtomConfig(select="adaptive", target_modules="all"),
    "lora": lambda: LoraConfig(r=2, target_modules=["plain", "wide", "to_q"]),
    "oft": lambda: OFTConfig(r=2, oft_block_size=0, target_modules=["to_q"]),  # its merged convolutions differ
}
ATOMS = [name for name in METHODS if name not in ("lora", "oft")]


@pytest.fixture
def base() -> Toy:
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(base: nn.Module, method: str, seed: int = 2) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), METHODS[method]())
    shake(model, "default", seed)
    return model


def shake(model: nn.Module, name: str, seed: int = 2) -> None:
    """Give an adapter random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}" in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key.replace(".base_layer", ""): value.clone() for key, value in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = bits(model)
    assert all(torch.equal(now[key].view(torch.uint8), value.view(torch.uint8)) for key, value in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_adapter_changes_the_output(base, x, method):
    assert (trained(base, method)(x) - base(x)).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_is_the_identity(base, x, method):
    new = get_peft_model(copy.deepcopy(base), METHODS[method]())(x)
    assert torch.equal(new, base(x)) if method in ATOMS else torch.allclose(new, base(x), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_merged_is_unmerged_is_reloaded(base, x, method, tmp_path):
    model = trained(base, method)
    unmerged = model(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), unmerged, **TOLERANCE)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), unmerged, **TOLERANCE)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), unmerged, **TOLERANCE)
    if method in ATOMS:
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("method", ATOMS)
def test_reloaded_under_another_seed_and_in_another_dtype(base, method, dtype, tolerance, tmp_path):
    model = trained(base, method)
    model.save_pretrained(tmp_path)
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"seed": 7}))
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base).to(dtype), tmp_path)
    pairs = zip(*([m for m in each.modules() if isinstance(m, AtomLayer)] for each in (model, loaded)), strict=True)
    updates = []
    for before, after in pairs:
        weight, again = (layer.adapted_weight(["default"]).detach().double() for layer in (before, after))
        size = float(weight.abs().max())
        updates.append(float((weight - before.weight).abs().max()) / size)
        assert after.weight.dtype == dtype
        torch.testing.assert_close(again, weight, rtol=0, atol=tolerance * size)
    assert max(updates) > 3 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("method", ATOMS)
def test_reloaded_without_own_memory(base, x, method, tmp_path):
    model = trained(base, method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("method", METHODS)
def test_removal_is_exact(base, x, method):
    before, model = bits(base), trained(base, method)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    removed = model.unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in removed.modules())
    assert torch.equal(removed(x), base(x))
    assert_same_bits(removed, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ATOMS)
def test_unmerging_gives_every_bit_back(base, method, dtype):
    base = base.to(dtype)
    before, model = bits(base), trained(base, method)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_bits(model.unload(), before)


@pytest.mark.parametrize("method", METHODS)
def test_only_adapter_numbers_are_trained(base, x, method):
    before, model = bits(base), get_peft_model(copy.deepcopy(base), METHODS[method]())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # half of a LoRA has no gradient at first
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert (model(x) - base(x)).abs().max() > 1e-4
    assert_same_bits(model.unload(), before)


@pytest.mark.parametrize("method", ATOMS)
def test_every_delta_learns(base, x, method):
    model = get_peft_model(copy.deepcopy(base), METHODS[method]())
    model(x).square().sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    deltas = {key: gradient for key, gradient in gradients.items() if "_delta." in key or "_shared." in key}
    assert deltas and all(gradient.abs().max() > 0 for gradient in deltas.values())
    others = ("_mix.", ".atom_select_score.")
    assert all(any(name in key for name in others) for key in gradients.keys() - deltas.keys())


@pytest.mark.parametrize("method", ATOMS)
def test_deltas_are_float32_on_any_base_and_compute_in_its_dtype(base, x, method):
    model = get_peft_model(copy.deepcopy(base).to(torch.bfloat16), METHODS[method]())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ATOMS)
def test_scale_goes_from_the_base_to_the_concept(base, x, method):
    model = trained(base, method)
    layers = [module for module in model.modules() if isinstance(module, AtomLayer)]
    full = model(x)
    for layer in layers:
        layer.set_scale("default", 0.0)
    assert torch.equal(model(x), base(x))
    for layer in layers:
        layer.set_scale("default", 0.5)
        layer.scale_layer(4.0)
        layer.unscale_layer(2.0)
    assert torch.equal(model(x), full)
    for layer in layers:
        layer.scale_layer(0.25)
    assert not torch.equal(model(x), full)
    for layer in layers:
        layer.unscale_layer()
    assert torch.equal(model(x), full)


@pytest.mark.slow
def test_only_deltas_and_fitted_atoms_are_saved(base):
    for method, kinds in {
        "blocks": {"delta", "basis"},
        "blocks, dct": {"delta"},
        "sparse": {"delta", "basis"},
        "recursion, blocks, dct": {"delta", "mix"},
    }.items():
        keys = get_peft_model(copy.deepcopy(base), METHODS[method]()).state_dict()
        added = {key.split(".")[-2] for key in keys if key.endswith(".default")}
        assert {kind.rpartition("_")[2] for kind in added} == kinds
