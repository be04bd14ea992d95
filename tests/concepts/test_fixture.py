"""Concept files of 0.1.0's formats, kept as they were written: they must load and act as they did then, forever."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import atomdiff
from atomdiff.concepts.concept_file import read_concept_file

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "fixtures" / "robot.atoms.safetensors"
THEN = json.loads(FILE.with_name("robot.json").read_text())
SHARED = FILE.with_name("shared.atoms.safetensors")
FIRST_SHARED = FILE.with_name("shared-first.atoms.safetensors")
PAGE = ROOT / "docs" / "concept-file.md"


@pytest.fixture(scope="module")
def adapted():
    """A pipeline that has loaded the file, merged; and its UNet's weights before."""
    pipe = StableDiffusionPipeline.from_pretrained(FILE.with_name("tiny-sd"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    before = {name: parameter.detach().clone() for name, parameter in pipe.unet.named_parameters()}
    atomdiff.load_atoms(pipe, FILE)
    atomdiff.set_active(pipe, "robot")
    return pipe, before


def changes(pipe, before, part="unet"):
    parameters = pipe.components[part].named_parameters()
    after = {name.replace(".base_layer", ""): parameter.detach() for name, parameter in parameters}
    found = {name: (after[name] - weight).double().flatten() for name, weight in before.items()}
    return {name.removesuffix(".weight"): change for name, change in found.items() if change.any()}


def check_changes(found, then):
    assert found.keys() == then.keys()
    for layer, (norm, product) in then.items():
        noise = torch.randn(found[layer].numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert float(found[layer].norm()) == pytest.approx(norm, rel=1e-4)
        assert float(found[layer] @ noise) == pytest.approx(product, abs=1e-3 * norm)


def test_what_it_says_is_read():
    concept = read_concept_file(FILE)
    assert concept.config.channel_block == 4 and concept.config.basis == "svd"
    assert concept.trigger_phrase == "sks robot" and concept.base_model == "tests/fixtures/tiny-sd"
    assert concept.training["steps"] == 60 and concept.training["config"]["timestep_sampling"] == "logit_normal"
    assert concept.tokens["sks"]["text_encoder"].shape == (32,)
    assert {name.removeprefix("unet.") for name in concept.layers} == THEN["layers"].keys()


def test_it_changes_the_weights_as_it_did(adapted):
    check_changes(changes(*adapted), THEN["layers"])


@pytest.mark.parametrize("file", [SHARED, FIRST_SHARED], ids=["compact", "first"])
def test_shared_directions_change_the_weights_as_they_did(file):
    pipe = StableDiffusionPipeline.from_pretrained(FILE.with_name("tiny-sd"), torch_dtype=torch.float32)
    parts = {part: pipe.components[part] for part in ("unet", "text_encoder")}
    before = {part: {n: p.detach().clone() for n, p in model.named_parameters()} for part, model in parts.items()}
    concept = read_concept_file(file)
    assert concept.trigger_phrase == "sks robot" and concept.tokens["sks"]["text_encoder"].shape == (32,)
    assert concept.training["config"]["prediction_type"] == "v_prediction"
    atomdiff.load_atoms(pipe, file)
    atomdiff.set_active(pipe, file.name.partition(".")[0])
    found = {f"{part}.{name}": change for part in parts for name, change in changes(pipe, before[part], part).items()}
    then = json.loads(SHARED.with_name("shared.json").read_text())["layers"]
    check_changes({name: change for name, change in found.items() if "token_embedding" not in name}, then)


def test_it_generates_the_image_that_it_did(adapted):
    pipe, _ = adapted
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
    image = pipe("a photo of sks robot in the snow", output_type="np", **settings).images[0]
    blurred = image.reshape(4, 8, 4, 8, 3).mean((1, 3, 4))  # a quarter of the width each
    np.testing.assert_allclose(blurred, THEN["image"], atol=0.01)


def test_the_page_of_the_format_reads_it_without_atomdiff(adapted, monkeypatch, capsys):
    pipe, before = adapted
    _, code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {"json", "numpy", "safetensors"}
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code, names)
    assert f"# {capsys.readouterr().out}" in code
    np.testing.assert_allclose(names["adapted"], pipe.unet.conv_out.base_layer.weight.detach(), atol=1e-5)
    assert not np.allclose(names["adapted"], before["conv_out.weight"], atol=1e-3)


def test_the_page_of_the_format_reads_shared_directions_without_atomdiff(monkeypatch, capsys):
    code, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {"json", "numpy", "safetensors", "zlib"}
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code, names)
    assert f"# {capsys.readouterr().out}" in code
    layers = read_concept_file(SHARED).layers
    expected = {
        f"{module}.{name}_delta": torch.einsum("k,kmd->md", tensors[f"{name}_mix"], tensors[f"{name}_shared"])
        for module, tensors in layers.items()
        for name in ("atom", "channel")
        if f"{name}_mix" in tensors
    }
    assert names["deltas"].keys() == expected.keys() and len(expected) > len(layers)
    for key, delta in expected.items():
        np.testing.assert_allclose(names["deltas"][key], delta, atol=1e-6)


def test_the_page_of_the_format_has_its_numbers():
    page, data = PAGE.read_text(), FILE.read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert (
        f"{len(data):,} bytes" in page and f"| {header} |" in page and f"| {len(data) - 8 - header:,} bytes |" in page
    )
    shared = SHARED.read_bytes()
    assert f"{len(shared):,} bytes, of which {len(shared) - 8 - int.from_bytes(shared[:8], 'little'):,}" in page
