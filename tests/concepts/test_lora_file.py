"""LoRA files of other programs load beside concepts, by all their names, and come off again to the bit."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import atomdiff
from atomdiff.bases.stable_diffusion import original_path
from atomdiff.cli.summary import describe
from atomdiff.export.diff import export_diff
from atomdiff.export.export import ExportConfig, export_concepts
from atomdiff.export.kohya import layer_name
from atomdiff.export.lora import export_lora
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.sampling.adapter_cache import AdapterCache
from atomdiff.sampling.concept_source import open_source
from atomdiff.sampling.prompt_requests import read_requests
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.concepts.lora_files import assert_loads, lora, rand, write_lora
from tests.helpers import assert_unchanged, snapshot


def diffusers_path(pipe, component, module):
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}_{'text_model_' if component == 'text_encoder' else ''}{module}".replace(".", "_")


def dotted_path(pipe, component, module):
    return f"{component}.{module}"


def bare_path(pipe, component, module):
    return module if component == "unet" else f"{component}.{module.removeprefix('text_model.')}"


def comfy_path(pipe, component, module):
    if component == "unet":
        return f"diffusion_model.{original_path(module, pipe.unet)}"
    encoder = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[component]
    return f"text_encoders.{encoder}.transformer.text_model.{module.removeprefix('text_model.')}"


def simpletuner_path(pipe, component, module):
    return f"lycoris_{module.replace('.', '_')}" if component == "unet" else layer_name(pipe, component, module)


NAMES = [layer_name, diffusers_path, dotted_path, bare_path, comfy_path, simpletuner_path]


@pytest.mark.parametrize("name_of", NAMES)
def test_all_names_of_sdxl_layers_are_known(tiny_xl_pipe, tmp_path, name_of):
    expected = write_lora(tiny_xl_pipe, tmp_path / "mug.safetensors", lora, name_of)
    assert len(expected) == 9
    assert_loads(tiny_xl_pipe, tmp_path / "mug.safetensors", expected)


@pytest.mark.slow
def test_files_of_diffusers_keep_their_scales(tiny_pipe, tmp_path):
    """What `save_lora_weights` writes, with the settings in its metadata and without, loads as diffusers loads it."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False, use_rslora=True)
    config.alpha_pattern = {"mid_block.resnets.0.conv1": 3}
    tuned = copy.deepcopy(tiny_pipe)
    tuned.unet.add_adapter(config)
    x, e = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    for metadata in (config.to_dict(), None):
        folder = tmp_path / f"{metadata is None}"
        layers = get_peft_model_state_dict(tuned.unet)
        tiny_pipe.save_lora_weights(folder, layers, unet_lora_adapter_metadata=metadata)
        atomdiff.load_atoms(tiny_pipe, folder, "mug")
        with torch.no_grad():
            found = tiny_pipe.unet(x, 5, e).sample
        atomdiff.unload_atoms(tiny_pipe)
        tiny_pipe.load_lora_weights(folder)
        with torch.no_grad():
            expected = tiny_pipe.unet(x, 5, e).sample
        tiny_pipe.unload_lora_weights()
        assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("export", [export_lora, export_diff])
def test_our_own_exports_load(tiny_xl_pipe, tmp_path, export):
    module = "mid_block.resnets.0.conv1"
    config = AtomConfig(target_modules=[module], channel_block=1)
    tiny_xl_pipe.unet.add_adapter(config)
    layer = tiny_xl_pipe.unet.get_submodule(module)
    with torch.no_grad():
        layer.atom_delta["default"].add_(rand(9, 9))
    expected = {("unet", module): layer.adapted_weight(["default"]).detach()}
    options = {"rank": 64} if export is export_lora else {}
    path = export(tiny_xl_pipe, tmp_path / "mug", dtype=torch.float32, **options).path
    atomdiff.unload_atoms(tiny_xl_pipe)
    assert_loads(tiny_xl_pipe, path, expected)


@pytest.mark.slow
def test_loras_are_used_beside_concepts(tiny_pipe, tiny_pipe_folder, tmp_path):
    """In Python, in `atomdiff sample` and in `atomdiff export`."""
    tiny_pipe.unet.add_adapter(AtomConfig(target_modules=["conv_in"]), "made")
    with torch.no_grad():
        tiny_pipe.unet.conv_in.atom_delta["made"].add_(rand(9, 9))
    concept = atomdiff.save_atoms(tiny_pipe, tmp_path / "cat.atoms.safetensors", "made")
    atomdiff.unload_atoms(tiny_pipe)
    path = tmp_path / "old mug.safetensors"
    module = "down_blocks.0.resnets.0.conv1"
    base = tiny_pipe.unet.get_submodule(module).weight.detach().clone()
    expected = write_lora(tiny_pipe, path, lora)["unet", module]

    assert (atomdiff.load_atoms(tiny_pipe, concept), atomdiff.load_atoms(tiny_pipe, path)) == ("cat", "old_mug")
    atomdiff.set_active(tiny_pipe, {"cat": 1, "old_mug": 0.5})
    found = tiny_pipe.unet.get_submodule(module).get_base_layer().weight
    assert (found - base - 0.5 * (expected - base)).abs().max() < 2e-6
    with pytest.raises(UserError, match="'old_mug' is a LORA adapter: only concepts of atoms, and adapters of"):
        with atomdiff.mixed_batch(tiny_pipe, ["cat", "old_mug"]):
            pass
    atomdiff.unload_atoms(tiny_pipe)

    given = [(open_source(str(source)), AdapterWeight(1.0)) for source in (concept, path)]
    assert [each.name for each, _ in given] == ["cat", "old mug"]
    with AdapterCache(tiny_pipe).use(read_requests(["a mug"], given)):
        found = tiny_pipe.unet.get_submodule(module).get_base_layer().weight
        assert (found - expected).abs().max() < 2e-6
    with pytest.raises(UserError, match="is a LoRA file and has no trigger word to rename"):
        open_source(str(path), "sks")

    out = tmp_path / "out.safetensors"
    export_concepts(ExportConfig(str(tiny_pipe_folder), (str(path),), "diff", str(out), dtype="float32"))
    found = load_file(out)["lora_unet_down_blocks_0_resnets_0_conv1.diff"]
    assert (found - (expected - base)).abs().max() < 2e-6


KEY = "lora_unet_conv_out.lora_down.weight"


WIDE = {"w1": (1, 1), "w2_a": (300_000, 1), "w2_b": (1, 300_000)}


OTHERS = {
    "flux": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (2, 8)}, "for a transformer"),
    "kohya's flux": ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 8)}, "for a transformer"),
    "a checkpoint": ({"model.diffusion_model.out.2.weight": (4, 4)}, "a whole checkpoint, to be opened as the base"),
    "an embedding": ({"emb_params": (1, 32)}, "a textual inversion; load it with pipe.load_textual_inversion"),
    "anything": ({"x": (1,)}, "its format is null, and it holds x"),
    "a half": ({"lora_unet_mid_block_resnets_0_conv1.lora_down.weight": (2, 64, 3, 3)}, "found down, expected all"),
    "scalars": (
        {f"lora_unet_conv_out.lora_{side}.weight": () for side in ("up", "down")},
        "does not fit this pipeline",
    ),
    "vectors": ({f"lora_unet_conv_out.hada_w{side}": (5,) for side in ("1_a", "1_b", "2_a", "2_b")}, "does not fit"),
    "half a LoKr": ({"lora_unet_conv_out.lokr_w1": (2, 2), "lora_unet_conv_out.lokr_w2_a": (2, 2)}, "does not fit"),
    "a PEFT adapter": ({"base_model.model.conv_out.lora_A.weight": (2, 32, 3, 3)}, "adapter_config.json is missing"),
    "a difference on its side": ({"lora_unet_conv_out.diff": (32, 4, 3, 3)}, r"found \(32, 4, 3, 3\) for \(4, 32"),
    "a parameter named alpha": ({"decoder.act.alpha": (3,)}, "it holds decoder.act.alpha"),
    "too large factors": (
        {f"lora_unet_conv_out.lokr_{name}": shape for name, shape in WIDE.items()},
        r"found \(300000, 1\) x \(1, 300000\) for",
    ),
    "no change": ({KEY: (2, 32, 3, 3), "lora_unet_conv_out.lora_up.weight": (4, 2, 1, 1)}, "it changes nothing"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_cannot_be_loaded_is_told_by_what_it_is(tiny_pipe, tmp_path, case):
    shapes, message = OTHERS[case]
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    before = snapshot(tiny_pipe)
    with pytest.raises(UserError, match=message):
        atomdiff.load_atoms(tiny_pipe, tmp_path / "x.safetensors")
    assert_unchanged(tiny_pipe, before)


def test_the_weights_of_a_peft_folder_stand_for_the_folder(tiny_pipe, tmp_path):
    """Whose settings say by how much they count."""
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False)
    tiny_pipe.unet.add_adapter(config)
    atomdiff.save_atoms(tiny_pipe, tmp_path / "mug")
    atomdiff.unload_atoms(tiny_pipe)
    assert atomdiff.load_atoms(tiny_pipe, tmp_path / "mug" / "adapter_model.safetensors") == "mug"
    layer = tiny_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling == {"mug": 4.0}


@pytest.mark.parametrize("name", ["mug.pt", "mug.ckpt", "pytorch_lora_weights.bin"])
def test_files_that_may_run_code_are_not_opened(tiny_pipe, tmp_path, name):
    torch.save({}, tmp_path / name)
    with pytest.raises(UserError, match="may run code when it is opened, so it is not: convert it to safetensors"):
        atomdiff.load_atoms(tiny_pipe, tmp_path / name)


def test_what_peft_cannot_merge_is_refused_and_the_pipeline_restored(tiny_pipe, tmp_path):
    """A LoRA with biases of its own on layers that have none."""
    before = snapshot(tiny_pipe)
    tiny_pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_out.0", "to_q"], lora_bias=True), "mug")
    atomdiff.save_atoms(tiny_pipe, tmp_path / "mug", "mug")
    atomdiff.unload_atoms(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "mug")
    with pytest.raises(UserError, match="these concepts cannot be merged: .*lora_bias"):
        atomdiff.set_active(tiny_pipe, "mug")
    assert not atomdiff.list_atoms(tiny_pipe)[0].merged
    atomdiff.unload_atoms(tiny_pipe)
    assert_unchanged(tiny_pipe, before)


def test_inspect_tells_what_a_lora_is(tiny_pipe, tmp_path):
    write_lora(tiny_pipe, tmp_path / "mug.safetensors", lora)
    with pytest.raises(UserError, match="is a LoRA file of another program"):
        describe(tmp_path / "mug.safetensors")


def test_a_lora_for_another_base_is_refused_or_loads_what_fits(tiny_pipe, tiny_xl_pipe, tmp_path):
    path = tmp_path / "mug.safetensors"
    write_lora(tiny_xl_pipe, path, lora)
    tensors = load_file(path)
    save_file(tensors, path, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    with pytest.raises(UserError, match=r"made for stable-diffusion-xl-v1-base/lora\) does not fit this pipeline"):
        atomdiff.load_atoms(tiny_pipe, path)
    with pytest.warns(UserWarning, match="loaded 'mug' without the layers of text_encoder_2, .*attn2_to_k"):
        atomdiff.load_atoms(tiny_pipe, path, allow_base_mismatch=True)


def test_parts_that_have_no_place_are_named(tiny_pipe, tmp_path, user_warnings):
    path = tmp_path / "mug.safetensors"
    expected = write_lora(tiny_pipe, path, lora)
    extra = {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 9),
        "lora_unet_mid_block_resnets_0_conv1.diff_b": torch.ones(64),
        "bundle_emb.sks.emb_params": torch.ones(1, 32),
    }
    save_file(load_file(path) | extra, path)
    named = r"bundle_emb.sks.emb_params.*mid_block_resnets_0_conv1.diff_b.*the layers of text_encoder_2"
    with pytest.warns(UserWarning, match=named) as caught:
        assert_loads(tiny_pipe, path, expected)
    assert len(user_warnings(caught)) == 1


DAMAGED_SCALES = [
    {"unet.r": "x", "unet.lora_alpha": [1]},
    {"unet.alpha_pattern": ["conv"]},
    {"unet.alpha_pattern": {"(?i)conv": 2}},
    {"unet.rank_pattern": {"conv": True}},
]


@pytest.mark.parametrize("scales", ["{", *map(json.dumps, DAMAGED_SCALES)])
def test_metadata_of_diffusers_that_is_damaged_is_a_user_error(tiny_pipe, tmp_path, scales):
    path = tmp_path / "mug.safetensors"
    write_lora(tiny_pipe, path, lora)
    save_file(load_file(path), path, {"lora_adapter_metadata": scales})
    with pytest.raises(UserError, match="damaged: lora_adapter_metadata"):
        atomdiff.load_atoms(tiny_pipe, path, allow_base_mismatch=True)


ODD = {
    "numbers that are too large": lambda up, down: {
        "lora_up.weight": up * 1e30,
        "lora_down.weight": down,
        "alpha": BIG,
    },
    "complex numbers": lambda up, down: {"lora_up.weight": up.to(torch.complex64), "lora_down.weight": down},
    "whole numbers": lambda up, down: {"lora_up.weight": up.long(), "lora_down.weight": down},
}


BIG = torch.tensor(3e38)


@pytest.mark.parametrize("case", ODD)
def test_odd_numbers_are_refused_or_left_out(tiny_pipe, tmp_path, case):
    path, module = tmp_path / "mug.safetensors", "lora_unet_mid_block_resnets_0_conv1"
    expected = write_lora(tiny_pipe, path, lora)
    odd = ODD[case](rand(64, 2), rand(2, 64, 3, 3))
    save_file(load_file(path) | {f"{module}.{kind}": tensor for kind, tensor in odd.items()}, path)
    with pytest.raises(UserError, match=f"does not fit this pipeline: {module}"):
        atomdiff.load_atoms(tiny_pipe, path)
    with pytest.warns(UserWarning, match=module):
        assert_loads(tiny_pipe, path, expected, allow_base_mismatch=True)


def test_a_layer_that_stands_in_a_file_twice_is_refused(tiny_pipe, tmp_path):
    path = tmp_path / "mug.safetensors"
    write_lora(tiny_pipe, path, lora)
    shapes = {"up": (64, 2), "down": (2, 32)}
    name = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    twice = {f"{name}.lora_{side}.weight": rand(*shape) for side, shape in shapes.items()}
    save_file(load_file(path) | twice, path)
    with pytest.raises(UserError, match="attn2.to_k .it appears twice, under different names"):
        atomdiff.load_atoms(tiny_pipe, path)
