"""What full tuning changed, as atoms: exactly where atoms can, by least squares where they cannot."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import nn

import atomdiff
from atomdiff.atoms.basis import dct_atoms, svd_atoms
from atomdiff.atoms.layout import View
from atomdiff.atoms.sparse import sparse_coefficients
from atomdiff.concepts.concept_file import write_concept_file
from atomdiff.export import extract as extract_module
from atomdiff.export.extract import ExtractConfig, extract, extract_concept
from atomdiff.export.extraction import describe_extraction
from atomdiff.export.least_squares import fit_layer
from atomdiff.export.shared_directions import improved_mixes, nearest_mixes
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.utils.errors import UserError

CONFIGS = {
    "kernels": {"channel_block": 1},
    "few kernels": {"channel_block": 1, "num_atoms": 4},
    "separable": {"channel_block": 4},
    "separable, dct": {"channel_block": 2, "basis": "dct", "num_atoms": 5},
    "joint": {"channel_block": 2, "joint": True, "num_atoms": 20},
    "channels": {"channel_block": 4, "target_modules": "attention"},
    "everything": {"channel_block": 4, "target_modules": "all"},
    "sparse": {"channel_block": 1, "basis": "sparse", "num_atoms": 12, "target_modules": ["conv_in", "conv_out"]},
    "sparse, separable": {"channel_block": 2, "basis": "sparse", "target_modules": ["conv_in", "conv_out"]},
}


def concept(unet, config, size=0.05, seed=0):
    """Random deltas in an adapter `made`."""
    unet.add_adapter(config, "made")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in unet.named_parameters():
            if "_delta.made" in key:
                parameter.normal_(std=size, generator=generator)


def merged(unet):
    """The same UNet with its concept written into the weights, without adapter layers."""
    state = {}
    for layer in unet.modules():
        if hasattr(layer, "merge"):
            layer.merge()
    for key, value in unet.state_dict().items():
        if "atom_" not in key:
            state[key.replace(".base_layer", "")] = value.clone()
    tuned = UNet2DConditionModel.from_config(unet.config)
    tuned.load_state_dict(state)
    return tuned.eval()


def draw(unet, width=32):
    generator = torch.Generator().manual_seed(0)
    noise, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, width, generator=generator)
    with torch.no_grad():
        return unet(noise, 5, text).sample


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_concept_that_was_merged_is_found_again(tiny_pipe, tmp_path, kind):
    made = copy.deepcopy(tiny_pipe.unet)
    concept(made, AtomConfig(**CONFIGS[kind]))
    tuned = merged(made)
    before = {key: value.clone() for key, value in tiny_pipe.unet.state_dict().items()}
    found = extract(tiny_pipe, tuned, AtomConfig(**CONFIGS[kind]), title="mug", trigger_phrase="a mug")
    assert all(torch.equal(value, before[key]) for key, value in tiny_pipe.unet.state_dict().items())
    assert found.explained > 1 - (1e-6 if "sparse" not in kind else 1e-4) and not found.unexplained
    assert found.explained_of_all == found.explained
    base = draw(tiny_pipe.unet)
    path = tmp_path / "mug.atoms.safetensors"
    write_concept_file(path, found.concept, torch.float32)
    assert atomdiff.load_atoms(tiny_pipe, path) == "mug"
    expected = draw(tuned)
    torch.testing.assert_close(draw(tiny_pipe.unet), expected, atol=1e-2 * float((expected - base).abs().max()), rtol=0)
    assert (expected - base).abs().max() > 1e-2


def explained_by_lstsq(rows, target, coefficients):
    """Share explained by A @ dD for any dD, by numpy's own least squares."""
    source, aim = coefficients.double().numpy(), (target - rows).double().numpy()
    fitted = source @ np.linalg.lstsq(source, aim, rcond=None)[0]
    return 1 - np.square(aim - fitted).sum() / np.square(aim).sum()


@pytest.mark.parametrize(
    ("layer", "config", "view"),
    [
        (nn.Conv2d(8, 16, 3), {"channel_block": 1}, View()),
        (nn.Conv2d(8, 16, 3), {"channel_block": 1, "num_atoms": 3}, View()),
        (nn.Conv2d(8, 16, 3), {"channel_block": 1, "num_atoms": 3, "basis": "dct"}, View()),
        (nn.Conv2d(8, 8, 3, groups=8), {"channel_block": 1}, View()),
        (nn.ConvTranspose2d(8, 4, (3, 2), groups=2), {"channel_block": 1}, View()),
        (nn.Conv2d(8, 16, 3), {"channel_block": 2, "joint": True}, View((2, 2))),
        (nn.Conv2d(8, 16, 1), {"channel_block": 2}, View((2, 2), spans_kernel=False)),
        (nn.Linear(20, 12), {"channel_block": 4}, View((4, 4), spans_kernel=False)),
        (nn.Linear(7, 5), {"channel_block": 1}, View()),
    ],
)
def test_a_random_change_is_explained_as_far_as_least_squares_can(layer, config, view):
    generator = torch.manual_seed(0)
    layer.reset_parameters()  # it was made when the tests were collected
    base = layer.weight.detach()
    tuned = base + 0.1 * torch.randn(base.shape, generator=generator)
    tensors, residual = fit_layer(layer, tuned, AtomConfig(target_modules="all", **config), "layer")
    rows, target = view.rows(base), view.rows(tuned)
    size = rows.shape[1]
    count = min(config.get("num_atoms", size), size)
    atoms = dct_atoms(base.shape[2:], count) if "basis" in config else svd_atoms(rows, count)
    expected = explained_by_lstsq(rows, target, rows @ atoms.T)
    share = 1 - residual**2 / float((tuned - base).square().sum())
    assert share == pytest.approx(expected, abs=1e-5) and 0 < share < 1
    if count > 1:  # m * d of the numbers of a change without structure, give or take chance
        assert share == pytest.approx(count * size / base.numel(), rel=0.9)
    assert (set(tensors) == {"atom_delta"}) is ("basis" in config)


def test_a_sparse_code_explains_as_far_as_least_squares_can():
    layer = nn.Conv2d(8, 16, 3)
    base = layer.weight.detach()
    tuned = base + 0.05 * torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    config = AtomConfig(channel_block=1, basis="sparse", num_atoms=12)
    tensors, residual = fit_layer(layer, tuned, config, "layer")
    rows = View().rows(base)
    coefficients = sparse_coefficients(rows, tensors["atom_basis"], config.sparsity)
    expected = explained_by_lstsq(rows, View().rows(tuned), coefficients)
    assert 1 - residual**2 / float((tuned - base).square().sum()) == pytest.approx(expected, abs=1e-5)


def test_kernels_and_channels_together_are_at_a_minimum():
    """No small step from the solution, of either factor, comes nearer."""
    layer = nn.Conv2d(8, 8, 3)
    base = layer.weight.detach()
    generator = torch.Generator().manual_seed(0)
    tuned = base + 0.1 * torch.randn(base.shape, generator=generator)
    tensors, residual = fit_layer(layer, tuned, AtomConfig(channel_block=2), "layer")

    def loss(delta, channel_delta):
        spatial = tensors["atom_basis"].double().T @ delta
        channel = tensors["channel_basis"].double().T @ channel_delta
        blocks = base.double().reshape(4, 2, 4, 2, 9).permute(0, 2, 1, 3, 4).reshape(16, 4, 9)
        aims = tuned.double().reshape(4, 2, 4, 2, 9).permute(0, 2, 1, 3, 4).reshape(16, 4, 9)
        adapted = (torch.eye(4) + channel).T @ blocks @ (torch.eye(9) + spatial)
        return (aims - adapted).square().sum()

    deltas = [tensors[kind].double().requires_grad_() for kind in ("atom_delta", "channel_delta")]
    value = loss(*deltas)
    assert float(value.detach().sqrt()) == pytest.approx(residual, rel=1e-5)
    gradients = torch.autograd.grad(value, deltas)
    start = [torch.zeros_like(delta, requires_grad=True) for delta in deltas]
    nothing = loss(*start)
    slopes = torch.autograd.grad(nothing, start)
    assert all(gradient.norm() < 1e-2 * slope.norm() for gradient, slope in zip(gradients, slopes, strict=True))
    spatial_only = fit_layer(layer, tuned, AtomConfig(channel_block=1), "layer")[1]
    assert residual < spatial_only < float(nothing.detach().sqrt())


def test_kernels_without_all_dimensions_are_fitted_as_well():
    layer = nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        layer.weight[..., 2] = layer.weight[..., 1]
    change = 0.1 * torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    tuned = (layer.weight.detach().reshape(-1, 9) @ (torch.eye(9) + change)).reshape(8, 8, 3, 3)
    tensors, residual = fit_layer(layer, tuned, AtomConfig(channel_block=1), "layer")
    assert residual < 1e-4 and tensors["atom_delta"].abs().max() < 10


def test_what_cannot_be_explained_is_counted(tiny_pipe):
    tuned = copy.deepcopy(tiny_pipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.unet.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 100)
        tuned.text_encoder.get_input_embeddings().weight[3] += 1
    found = extract(tiny_pipe, tuned)
    parameters = dict(tiny_pipe.unet.named_parameters())
    biases = sum(name.endswith("bias") for name in parameters)
    norms = sum(name.endswith("weight") and p.ndim == 1 for name, p in parameters.items())
    assert found.unexplained["biases"][0] == biases and found.unexplained["weights of norms"][0] == norms
    assert found.unexplained["other weights"][0] == len(parameters) - biases - norms - len(found.layers)
    numbers = sum(p.numel() for name, p in parameters.items() if name.endswith("bias"))
    assert found.unexplained["biases"][1] == pytest.approx(numbers**0.5 / 100, rel=0.1)
    assert found.other_models == {"text_encoder": 1}
    everything = sum(float((new - parameters[name]).square().sum()) for name, new in tuned.unet.named_parameters())
    explained = sum(layer.difference**2 - layer.residual**2 for layer in found.layers)
    assert found.explained_of_all == pytest.approx(explained / everything, rel=1e-4)
    assert 0 < found.explained_of_all < found.explained < 0.2
    shown = describe_extraction(found)
    assert f"{biases} biases" in shown and "1 tensors of the text_encoder" in shown
    assert all(layer.module in shown for layer in found.layers)


def test_layers_that_stayed_are_not_in_the_file(tiny_pipe):
    tuned = copy.deepcopy(tiny_pipe.unet)
    with torch.no_grad():
        tuned.conv_in.weight.mul_(1.5)
    found = extract(tiny_pipe.unet, tuned)
    assert list(found.concept.layers) == ["unet.conv_in"] and found.explained == pytest.approx(1, abs=1e-6)


def test_half_precision_models_are_compared_in_float32(tiny_pipe):
    made = copy.deepcopy(tiny_pipe.unet)
    concept(made, AtomConfig(channel_block=1))
    tuned = merged(made)
    found = extract(tiny_pipe.unet.to(torch.bfloat16), tuned.to(torch.bfloat16), AtomConfig(channel_block=1))
    assert 0.9 < found.explained < 0.9999 and tiny_pipe.unet.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for kinds in found.concept.layers.values() for t in kinds.values())


def break_shape(unet):
    unet.conv_out = nn.Conv2d(32, 8, 3)


def break_numbers(unet):
    unet.conv_in.weight.data[0] = float("nan")


def add_layer(unet):
    unet.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (lambda unet: None, {}, "has the same parameters as the base"),
        (
            lambda unet: unet.conv_in.bias.data.add_(1),
            {},
            r"matches 20 layers, none of which was tuned; tuned were conv_in.bias",
        ),
        (break_shape, {}, r"conv_out.weight of the tuned model has shape \(8, 32, 3, 3\), and that of the base"),
        (lambda unet: delattr(unet, "conv_out"), {}, "tuned model has no conv_out.weight, conv_out.bias: another"),
        (add_layer, {}, "base has no extra.weight, extra.bias: another architecture"),
        (break_numbers, {}, "not finite, in conv_in.weight"),
        (lambda unet: unet.add_adapter(AtomConfig(), "x"), {}, r"tuned model has adapters \(x\)"),
        (lambda unet: unet.conv_in.weight.data.add_(1), {"recursion": 2}, "extract without recursion"),
        (lambda unet: unet.conv_in.weight.data.add_(1), {"target_modules": ["nothing"]}, "matches no layer"),
        (lambda unet: unet.conv_in.weight.data.add_(1), {"modules_to_save": ["conv_out"]}, "leave it out"),
        (
            lambda unet: unet.conv_in.weight.data.add_(1),
            {"select": "adaptive", "select_budget": "9KB"},
            "select_budget='9KB': layers are chosen in training only; .* atomdiff prune",
        ),
    ],
)
def test_mistakes_are_reported(tiny_pipe, change, config, said):
    tuned = copy.deepcopy(tiny_pipe.unet)
    change(tuned)
    with pytest.raises(UserError, match=said):
        extract(tiny_pipe, tuned, AtomConfig(**config))


@pytest.mark.parametrize("form", ["pipelines", "unets"])
def test_folders_become_a_concept_file(tiny_pipe, tiny_pipe_folder, tmp_path, form):
    made = copy.deepcopy(tiny_pipe.unet)
    concept(made, AtomConfig(channel_block=1))
    tuned = merged(made)
    (tmp_path / "adapter.json").write_text(json.dumps({"peft_type": "ATOMS", "channel_block": 1}))
    base = tiny_pipe_folder
    if form == "unets":
        base = tiny_pipe_folder / "unet"
        tuned.save_pretrained(tmp_path / "tuned")
    else:
        pipe = copy.deepcopy(tiny_pipe)
        pipe.unet = tuned
        pipe.save_pretrained(tmp_path / "tuned")
    output = tmp_path / "out" / "mug.atoms.safetensors"
    config = ExtractConfig(
        str(base), str(tmp_path / "tuned"), str(output), str(tmp_path / "adapter.json"), "a mug", save_dtype="float32"
    )
    found = extract_concept(config)
    assert found.explained > 1 - 1e-6
    atomdiff.load_atoms(tiny_pipe, output)
    torch.testing.assert_close(draw(tiny_pipe.unet), draw(tuned), atol=1e-3, rtol=0)
    with safe_open(output, "pt") as file:
        facts = file.metadata()
    assert facts["base_model"] == str(base) and facts["trigger_phrase"] == facts["modelspec.trigger_phrase"] == "a mug"
    assert json.loads(facts["training"])["explained"] > 0.999 and facts["modelspec.title"] == "mug"


def test_models_are_loaded_as_they_are_stored(tiny_pipe, tmp_path, monkeypatch):
    made = copy.deepcopy(tiny_pipe.unet)
    concept(made, AtomConfig(channel_block=1))
    merged(made).save_pretrained(tmp_path / "tuned")
    tiny_pipe.unet.to(torch.float16).save_pretrained(tmp_path / "base")
    seen = []
    monkeypatch.setattr(extract_module, "_denoiser", lambda model: seen.append(model.dtype) or ("unet", model))
    found = extract_concept(ExtractConfig(str(tmp_path / "base"), str(tmp_path / "tuned"), str(tmp_path / "x")))
    assert set(seen) == {torch.float16, torch.float32} and found.explained > 0.9


def test_wrong_folders_are_reported(tiny_pipe_folder, tmp_path):
    base = str(tiny_pipe_folder)
    with pytest.raises(UserError, match="holds a AutoencoderKL"):
        extract_concept(ExtractConfig(base, f"{base}/vae", str(tmp_path / "x")))
    with pytest.raises(UserError, match="cannot be loaded"):
        extract_concept(ExtractConfig(base, str(tmp_path), str(tmp_path / "x")))
    for adapter in ("full", "none"):
        with pytest.raises(UserError, match=f"adapter='{adapter}' is not an AtomConfig"):
            extract_concept(ExtractConfig(base, base, str(tmp_path / "x"), adapter))
    assert not (tmp_path / "x").exists()


def test_rounding_to_half_precision_is_no_tuning(tiny_pipe):
    tuned = copy.deepcopy(tiny_pipe)
    with torch.no_grad():
        tuned.unet.conv_in.weight.mul_(1.1)
    tuned.text_encoder.half().float()
    assert extract(tiny_pipe, tuned, AtomConfig(target_modules=["conv_in"])).other_models == {}


def test_shared_directions_are_found_again(tiny_pipe):
    config = AtomConfig(share="kind", share_count=2, basis="dct", channel_block=1)
    unet = copy.deepcopy(tiny_pipe.unet)
    unet.add_adapter(config, "made")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in unet.named_parameters():
            if "_shared.made" in key or "_mix.made" in key:
                parameter.normal_(std=0.2, generator=generator)
    tuned = merged(unet)
    found = extract(tiny_pipe.unet, tuned, config)
    assert found.explained > 0.9999
    assert {tensors["atom_shared"].shape for tensors in found.concept.layers.values()} == {(2, 9, 9)}
    assert len({id(tensors["atom_shared"]) for tensors in found.concept.layers.values()}) == 1
    atomdiff.load_atoms(tiny_pipe, found.concept, "found")
    with torch.no_grad():
        for path, layer in atom_layers(tiny_pipe.unet).items():
            torch.testing.assert_close(
                layer.adapted_weight(["found"]), tuned.get_submodule(path).weight, atol=1e-4, rtol=0
            )


def tuned_with(unet, config):
    """A copy of a UNet with a random concept of these settings written into its weights."""
    made = copy.deepcopy(unet)
    made.add_adapter(config, "made")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if ".made" in key:
                parameter.normal_(std=0.2, generator=generator)
    return merged(made)


@pytest.mark.parametrize("count", [1, 3])
def test_shared_directions_of_kernels_and_channels_are_found_again(tiny_pipe, count):
    config = AtomConfig(share="kind", share_count=count, basis="dct", channel_block=2, target_modules=["conv1"])
    assert extract(tiny_pipe.unet, tuned_with(tiny_pipe.unet, config), config).explained > 0.9999


def test_shared_directions_explain_weights_and_not_deltas(tiny_pipe):
    """Kernels that are nearly constant hardly follow some deltas: those that they follow count."""
    config = {"basis": "dct", "channel_block": 1, "target_modules": ["conv1", "conv2"]}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in tiny_pipe.unet.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                size = 3 * module.weight.std()
                module.weight += size * torch.randn(*module.weight.shape[:2], 1, 1, generator=generator)
    tuned = tuned_with(tiny_pipe.unet, AtomConfig(**config))
    found = extract(tiny_pipe.unet, tuned, AtomConfig(**config, share="kind", share_count=4))
    assert found.explained > 0.6  # 0.4 by the nearest deltas


def test_shared_directions_are_at_a_minimum():
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(6, 20, 3, generator=generator, dtype=torch.float64)
    missing = torch.randn(6, 20, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    equations = factors.mT @ factors, factors.mT @ missing
    mixes, directions = (tensor.requires_grad_() for tensor in improved_mixes(start, *equations))
    loss = (missing - factors @ (mixes @ directions).reshape(6, 3, 4)).square().sum()
    loss.backward()
    assert loss < missing.square().sum() and mixes.grad.norm() + directions.grad.norm() < 0.1
    assert improved_mixes(torch.cat([start] * 4, 1), *equations)[0].shape == (6, 8)  # more directions than layers


def test_fewer_shared_directions_are_the_nearest():
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(6, 9, generator=generator, dtype=torch.float64), torch.arange(1.0, 7.0).double()
    mixes, directions = nearest_mixes(rows, weights, 2)
    left, values, right = np.linalg.svd(weights[:, None] * rows, full_matrices=False)
    nearest = (left[:, :2] * values[:2]) @ right[:2]
    np.testing.assert_allclose(weights[:, None] * (mixes @ directions), nearest, atol=1e-12)
