"""What concepts change as a LoRA: as near as its rank allows, and as other programs read it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from atomdiff.export.kohya import layer_name
from atomdiff.export.lora import export_lora, low_rank
from atomdiff.export.report import describe_export
from atomdiff.pipelines.differences import layer_differences
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.export.helpers import add_random_adapter, copy_of, generate_latents, load_textual_inversion
from tests.helpers import assert_unchanged, snapshot


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_lora_of_full_rank_gives_the_same_images_in_diffusers(pipe_template, sdxl_template, tmp_path, kind):
    template = {"sd": pipe_template, "sdxl": sdxl_template}[kind]
    pipe = copy_of(template)
    add_random_adapter(pipe, "atoms", word="ohwx", size=0.02)
    expected, before = generate_latents(pipe), snapshot(pipe)
    report = export_lora(pipe, tmp_path / "mug.safetensors", 1000, dtype=torch.float32)
    assert_unchanged(pipe, before)
    assert report.error < 1e-5 and report.path == tmp_path / "mug.safetensors"
    other = copy_of(template)
    other.load_lora_weights(str(report.path))
    load_textual_inversion(other, "ohwx", report.embeddings["ohwx"])
    torch.testing.assert_close(generate_latents(other), expected, atol=2e-3, rtol=0)
    assert (generate_latents(template) - expected).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "loha", "sparse"])
def test_any_method_becomes_a_lora(pipe_template, tmp_path, method):
    pipe = copy_of(pipe_template)
    add_random_adapter(pipe, method)
    expected = generate_latents(pipe)
    report = export_lora(pipe, tmp_path / "x", 4 if method != "sparse" else 1000, dtype=torch.float32)
    assert report.path == tmp_path / "x.safetensors"
    assert report.error < 1e-5 or method == "loha"  # the product of two ranks of 2 has rank 4, too, but not as a kernel
    if method != "loha":
        other = copy_of(pipe_template)
        other.load_lora_weights(str(report.path))
        torch.testing.assert_close(generate_latents(other), expected, atol=1e-3, rtol=0)


def test_low_rank_is_the_truncated_svd():
    generator = torch.Generator().manual_seed(0)
    for shape in ((7, 20), (20, 7), (9, 9), (5, 1)):
        matrix = torch.randn(shape, generator=generator)
        for rank in (1, 3, 50):
            up, down = low_rank(matrix, rank)
            kept = min(rank, *shape)
            assert up.shape == (shape[0], kept) and down.shape == (kept, shape[1])
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            best = left[:, :kept] @ torch.diag(values[:kept]) @ right[:kept]
            torch.testing.assert_close(up @ down, best, atol=1e-5, rtol=0)
            torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), atol=1e-5, rtol=0)


def test_low_rank_of_nothing_is_nothing():
    up, down = low_rank(torch.zeros(4, 6), 2)
    assert not (up @ down).any() and torch.isfinite(up).all() and torch.isfinite(down).all()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_error_of_a_low_rank_is_that_of_the_singular_values(rows, columns, rank, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    up, down = low_rank(matrix, rank)
    expected = torch.linalg.svdvals(matrix)[rank:].norm()
    torch.testing.assert_close((matrix - up @ down).norm(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_reported_error_is_that_of_the_file(pipe_template, tmp_path):
    pipe = copy_of(pipe_template)
    add_random_adapter(pipe)
    wanted = {layer_name(pipe, d.component, d.module): d.parameters["weight"] for d in layer_differences(pipe)}
    report = export_lora(pipe, tmp_path / "x.safetensors", 2)
    file = load_file(report.path)
    assert {layer.name for layer in report.layers} == set(wanted)
    missed, size = 0.0, 0.0
    for layer in report.layers:
        up, down = (file[f"{layer.name}.lora_{side}.weight"].double() for side in ("up", "down"))
        assert layer.rank == len(down) == min(2, len(up), down[0].numel())
        scale = file[f"{layer.name}.alpha"] / len(down)
        found = (scale * up.flatten(1) @ down.flatten(1)).reshape(layer.shape)
        error = float((wanted[layer.name] - found).norm() / wanted[layer.name].norm())
        assert layer.error == pytest.approx(error, rel=1e-4, abs=1e-6)
        missed += float((wanted[layer.name] - found).square().sum())
        size += float(wanted[layer.name].double().square().sum())
    assert report.error == pytest.approx((missed / size) ** 0.5, rel=1e-4) and 0.1 < report.error < 1
    shown = describe_export(report)
    assert f"{len(report.layers)} layers" in shown and "lora_unet_conv_in" in shown and "higher --rank" in shown
    assert "higher --rank" not in describe_export(export_lora(pipe, tmp_path / "x.safetensors", 1000))


def test_biases_that_a_lora_cannot_hold_are_reported(pipe_template, tmp_path):
    pipe = copy_of(pipe_template)
    add_random_adapter(pipe, "ia3")
    report = export_lora(pipe, tmp_path / "x.safetensors")
    assert report.biases_left_out and all("conv1" in name for name in report.biases_left_out)
    assert "has no biases: those of lora_unet_" in describe_export(report)


def test_grouped_and_depthwise_layers_merge_exactly(tiny_pipe, tmp_path):
    for name, groups in (("a", 4), ("b", 8), ("c", 1)):
        tiny_pipe.unet.add_module(f"extra_{name}", nn.Conv2d(8, 8, 3, groups=groups))
    tiny_pipe.unet.add_module("extra_linear", nn.Linear(6, 5))
    names = [f"extra_{name}" for name in ("a", "b", "c", "linear")]
    tiny_pipe.unet.add_adapter(AtomConfig(channel_block=1, target_modules=names))
    for layer in names:
        nn.init.normal_(getattr(tiny_pipe.unet, layer).atom_delta["default"])
    wanted = {f"lora_unet_{d.module}": d.parameters["weight"] for d in layer_differences(tiny_pipe)}
    report = export_lora(tiny_pipe, tmp_path / "x", 100, dtype=torch.float32)
    file = load_file(report.path)
    assert len(report.layers) == 4 and report.error < 1e-6
    assert {layer.name: layer.rank for layer in report.layers} == {
        "lora_unet_extra_a": 8,
        "lora_unet_extra_b": 8,
        "lora_unet_extra_c": 8,
        "lora_unet_extra_linear": 5,
    }
    for name, weight in wanted.items():
        up, down = (file[f"{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        scale = file[f"{name}.alpha"] / up.shape[1]
        torch.testing.assert_close((scale * up @ down).reshape(weight.shape), weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: pipe.vae.add_module("extra", nn.Linear(4, 4)) or ("vae", ["extra"]), "vae.extra"),
        (lambda pipe: pipe.unet.add_module("extra", nn.ConvTranspose2d(4, 4, 3)) or ("unet", ["extra"]), "transposed"),
    ],
)
def test_what_has_no_form_in_such_a_file_is_refused(tiny_pipe, tmp_path, change, message):
    part, names = change(tiny_pipe)
    model = getattr(tiny_pipe, part)
    model.add_adapter(AtomConfig(target_modules=names, channel_block=2), "x")
    nn.init.normal_(next(p for key, p in model.named_parameters() if "_delta.x" in key))
    with pytest.raises(UserError, match=message):
        export_lora(tiny_pipe, tmp_path / "x")
    assert not list(tmp_path.iterdir())
