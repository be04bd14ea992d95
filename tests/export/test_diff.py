"""What concepts change as exact differences."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import atomdiff
from atomdiff.export.diff import export_diff
from atomdiff.export.kohya import layer_name
from atomdiff.export.lora import export_lora
from atomdiff.export.pipeline_folder import export_pipeline
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.export.helpers import add_random_adapter, copy_of
from tests.helpers import assert_unchanged, snapshot


def test_a_difference_is_the_whole_difference(pipe_template, tmp_path):
    pipe = copy_of(pipe_template)
    add_random_adapter(pipe, "ia3")
    before = snapshot(pipe)
    report = export_diff(pipe, tmp_path / "x.safetensors", dtype=torch.float32, trigger_phrase="ohwx mug")
    assert_unchanged(pipe, before)
    atomdiff.merge(pipe)
    merged = {path: module for path, module in pipe.unet.named_modules() if hasattr(module, "weight")}
    file = load_file(report.path)
    assert any(key.endswith(".diff_b") for key in file)  # IA3 scales biases
    for path, module in pipe_template.unet.named_modules():
        if (key := f"{layer_name(pipe, 'unet', path)}.diff") in file:
            now = merged[f"{path}.base_layer"]
            assert torch.equal(module.weight + file.pop(key), now.weight)
            if (key_b := f"{key}_b") in file:
                torch.testing.assert_close(module.bias + file.pop(key_b), now.bias)
    assert not file and report.error < 1e-6
    with safe_open(report.path, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_module"] == "lycoris.kohya" and json.loads(metadata["ss_network_args"]) == {
        "algo": "full"
    }
    assert metadata["modelspec.architecture"] == "stable-diffusion/lora" and metadata["modelspec.title"] == "x"
    assert metadata["modelspec.trigger_phrase"] == "ohwx mug"


@pytest.mark.slow
def test_half_precision_bases_are_exported_as_exactly_as_others(pipe_template, tmp_path):
    pipe = copy_of(pipe_template)
    pipe.to(torch.bfloat16)
    wide = copy_of(pipe_template)
    wide.to(torch.bfloat16).to(torch.float32)
    files = []
    for each in (pipe, wide):
        add_random_adapter(each)
        before = snapshot(each)
        files.append(load_file(export_diff(each, tmp_path / "x.safetensors", dtype=torch.float32).path))
        assert_unchanged(each, before)
    for key, value in files[1].items():
        torch.testing.assert_close(files[0][key], value, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
def test_weights_and_merging_and_what_is_active_count(pipe_template, tmp_path):
    pipe = copy_of(pipe_template)
    add_random_adapter(pipe, name="one")
    add_random_adapter(pipe, name="two", seed=1)
    pipe.set_adapters(["one", "two"], [0.5, -0.25])
    atomdiff.merge(pipe)
    file = load_file(export_diff(pipe, tmp_path / "x.safetensors", dtype=torch.float32).path)
    assert all(concept.merged for concept in atomdiff.list_atoms(pipe))  # as they were
    change = pipe.unet.conv_in.base_layer.weight - pipe_template.unet.conv_in.weight
    torch.testing.assert_close(file["lora_unet_conv_in.diff"], change, atol=1e-6, rtol=0)
    atomdiff.restore(pipe)
    pipe.set_adapters(["one", "two"], [0.0, 0.0])
    with pytest.raises(UserError, match="nothing to export"):
        export_diff(pipe, tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_modules_taken_over_as_a_whole_are_refused(tiny_pipe, tmp_path):
    tiny_pipe.unet.add_adapter(AtomConfig(modules_to_save=["conv_out"]))
    for export in (export_lora, export_diff, export_pipeline):
        with pytest.raises(UserError, match="conv_out as a whole"):
            export(tiny_pipe, tmp_path / "x")


def test_numbers_that_half_precision_cannot_hold_are_refused(tiny_pipe, tmp_path):
    add_random_adapter(tiny_pipe, size=1e6)
    with pytest.raises(UserError, match="too large for torch.float16"):
        export_diff(tiny_pipe, tmp_path / "x")
    with pytest.raises(UserError, match="rank=0"):
        export_lora(tiny_pipe, tmp_path / "x", 0)
