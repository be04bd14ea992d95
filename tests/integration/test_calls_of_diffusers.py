"""Diffusers' own calls beside ours: they mean the same, and leave nothing that unloading does not put right."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

import atomdiff
from atomdiff.tuner import AtomLayer
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter, assert_same_tensors, assert_unchanged, predict, snapshot

pytestmark = pytest.mark.slow

PARTS = ["unet", "text_encoder"]
CALLS = {
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "fuse_lora": lambda pipe: pipe.fuse_lora(components=PARTS),
    "fuse and unload": lambda pipe: (pipe.fuse_lora(components=PARTS), pipe.unload_lora_weights()),
    "unfuse_lora": lambda pipe: pipe.unfuse_lora(components=PARTS),
    "fuse and unfuse": lambda pipe: (pipe.fuse_lora(components=PARTS), pipe.unfuse_lora(components=PARTS)),
    "delete the atoms": lambda pipe: pipe.delete_adapters("mug"),
    "delete all": lambda pipe: pipe.delete_adapters(["mug", "style"]),
    "fuse and delete": lambda pipe: (pipe.fuse_lora(components=PARTS), pipe.delete_adapters(["mug", "style"])),
    "disable_lora": lambda pipe: (pipe.disable_lora(), predict(pipe)),
    "unload_textual_inversion": lambda pipe: pipe.unload_textual_inversion(),
    "unload_lora of the UNet": lambda pipe: pipe.unet.unload_lora(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("order", [("mug",), ("mug", "style"), ("style", "mug")], ids="-".join)
@pytest.mark.parametrize("merged", [True, False])
def test_unloading_is_exact_whatever_diffusers_did(tiny_pipe, concept_files, call, order, merged):
    before = snapshot(tiny_pipe)
    for name in order:
        atomdiff.load_atoms(tiny_pipe, concept_files[name], name)
    if merged:
        atomdiff.set_active(tiny_pipe, dict.fromkeys(order, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            CALLS[call](tiny_pipe)
        except ValueError:  # of diffusers: there is nothing to delete
            pytest.skip("diffusers refuses it")
    atomdiff.restore(tiny_pipe)
    atomdiff.unload_atoms(tiny_pipe)
    assert_unchanged(tiny_pipe, before)


def test_a_name_whose_layers_are_gone_is_free(tiny_pipe, concept_files):
    atomdiff.load_atoms(tiny_pipe, concept_files["mug"], "x")
    expected = predict(tiny_pipe)
    tiny_pipe.unload_lora_weights()
    assert [(c.name, c.layers) for c in atomdiff.list_atoms(tiny_pipe)] == [("x", {})]  # the word is still there
    atomdiff.load_atoms(tiny_pipe, concept_files["mug"], "x")
    assert torch.equal(predict(tiny_pipe), expected)
    tiny_pipe.delete_adapters("x")
    atomdiff.load_atoms(tiny_pipe, concept_files["cat"], "x")
    assert [(c.name, c.trigger_words) for c in atomdiff.list_atoms(tiny_pipe)] == [("x", ("zwx",))]


def nested(weights):
    return [{"unet": weights, "text_encoder": 1.0}]


@pytest.mark.parametrize(
    "weights", [{"down": 0.5, "mid": 0, "up": 1}, {"down": {"block_1": 0.3}}, {"up": {"block_0": [0.2, 0.6]}}]
)
def test_nested_blocks_mean_the_same_in_set_adapters_and_set_active(tiny_pipe, concept_files, weights):
    atomdiff.load_atoms(tiny_pipe, concept_files["mug"], "mug")
    full = predict(tiny_pipe)
    tiny_pipe.set_adapters(["mug"], nested(weights))
    by_diffusers = predict(tiny_pipe)
    atomdiff.set_active(tiny_pipe, {"mug": {"blocks": weights}})
    torch.testing.assert_close(predict(tiny_pipe), by_diffusers, atol=1e-5, rtol=0)
    assert (by_diffusers - full).abs().max() > 1e-4
    with pytest.raises(UserError, match="no layer in 'down_blocks.7'"):
        tiny_pipe.set_adapters(["mug"], nested({"down": {"block_7": 1}}))


def test_the_other_calls_of_diffusers_work(tiny_pipe, concept_files):
    for name in ("mug", "cat"):
        atomdiff.load_atoms(tiny_pipe, concept_files[name], name)
    predicted = predict(tiny_pipe)
    assert tiny_pipe.get_active_adapters() == ["cat"]
    assert tiny_pipe.get_list_adapters() == dict.fromkeys(PARTS, ["mug", "cat"])
    moved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            AtomLayer,
            "_move_adapter_to_device_of_base_layer",
            lambda _, name, device: moved.append((name, torch.device(device))),
        )
        tiny_pipe.set_lora_device(["mug"], "meta")
    assert {(name, torch.device(device)) for name, device in moved} == {("mug", torch.device("meta"))}
    tiny_pipe.set_lora_device(["mug", "cat"], "cpu")
    assert torch.equal(predict(tiny_pipe), predicted)
    with pytest.raises(UserError, match="fuse_qkv_projections copies weights that concepts adapt"):
        tiny_pipe.fuse_qkv_projections(vae=False)


@pytest.mark.parametrize("merged", [True, False])
def test_saving_a_pipeline_with_concepts_writes_the_base(tiny_pipe, concept_files, tmp_path, merged):
    tiny_pipe.save_pretrained(tmp_path / "before")
    for name in ("mug", "style"):
        atomdiff.load_atoms(tiny_pipe, concept_files[name], name)
    if merged:
        atomdiff.set_active(tiny_pipe, ["mug", "style"])
    predicted, loaded = predict(tiny_pipe), snapshot(tiny_pipe)
    with pytest.warns(UserWarning, match="base only, not the concepts that are loaded .'mug', 'style'"):
        tiny_pipe.save_pretrained(tmp_path / "after")
    written = {path.relative_to(tmp_path / "before"): path for path in (tmp_path / "before").rglob("*.*")}
    assert [
        str(path) for path, file in written.items() if file.read_bytes() != (tmp_path / "after" / path).read_bytes()
    ] == []
    assert torch.equal(predict(tiny_pipe), predicted)
    assert_unchanged(tiny_pipe, loaded)
    atomdiff.unload_atoms(tiny_pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_pipe.save_pretrained(tmp_path / "again")


def test_fused_and_unloaded_concepts_are_saved_as_a_lora_is(tiny_pipe, concept_files, tmp_path):
    atomdiff.load_atoms(tiny_pipe, concept_files["mug"], "mug")
    tiny_pipe.fuse_lora(components=PARTS)
    tiny_pipe.unload_lora_weights()
    predicted = predict(tiny_pipe, "a mug")
    tiny_pipe.unet.save_pretrained(tmp_path)
    tiny_pipe.unet = type(tiny_pipe.unet).from_pretrained(tmp_path)
    assert torch.equal(predict(tiny_pipe, "a mug"), predicted)


def test_a_lora_that_diffusers_fused_comes_off_with_the_concept_below_it(tiny_pipe, pipe_template, concept_files):
    before, made = snapshot(tiny_pipe), copy.deepcopy(pipe_template)
    made.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    tensors = {f"unet.{key}": value for key, value in get_peft_model_state_dict(made.unet).items()}
    atomdiff.load_atoms(tiny_pipe, concept_files["mug"], "mug")
    tiny_pipe.load_lora_weights(tensors, adapter_name="lora")
    tiny_pipe.set_adapters(["mug", "lora"])
    predicted = predict(tiny_pipe)
    tiny_pipe.fuse_lora(components=PARTS)
    torch.testing.assert_close(predict(tiny_pipe), predicted, atol=1e-5, rtol=0)
    tiny_pipe.delete_adapters("mug")
    atomdiff.unload_atoms(tiny_pipe)
    assert_unchanged(tiny_pipe, before)


def test_adapters_that_are_added_beside_concepts_come_off_again(tiny_pipe, concept_files):
    before = snapshot(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, concept_files["mug"], "mug")
    with pytest.raises(UserError, match="bias='all' trains biases"):
        tiny_pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], bias="all"), "biased")
    add_adapter(tiny_pipe, "own", LoraConfig(r=2, target_modules=["to_q", "q_proj"], init_lora_weights=False), PARTS)
    tiny_pipe.fuse_lora(components=PARTS)
    atomdiff.unload_atoms(tiny_pipe)
    tiny_pipe.unload_lora_weights()
    assert_same_tensors(snapshot(tiny_pipe)[0], before[0])  # diffusers leaves attributes at the models
