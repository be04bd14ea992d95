"""Weights that are not where they seem: offloaded, cast for storage, fused into copies, quantized."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from diffusers.utils import convert_state_dict_to_diffusers
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import atomdiff
from atomdiff.activation_adapters import CoeffTuningConfig, ConvAdapterConfig, MonaConfig
from atomdiff.export.diff import export_diff
from atomdiff.export.extract import extract
from atomdiff.export.pipeline_folder import export_pipeline
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, remove_placeholder_tokens, set_token_embedding
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.base_weight import BaseWeight
from atomdiff.tuner.model import find_atom_layer
from atomdiff.utils.errors import UserError


def add(pipe, name, config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pipe.unet.add_adapter(copy.deepcopy(config), adapter_name=name)
    with torch.no_grad():
        for key, parameter in pipe.unet.named_parameters():
            if f".{name}" in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    pipe.unet.requires_grad_(False)


@pytest.fixture(scope="module")
def files(pipe_template, tmp_path_factory):
    """Concepts of all weights, and with sparse coefficients."""
    folder, pipe, paths = tmp_path_factory.mktemp("concepts"), copy.deepcopy(pipe_template), {}
    configs = {
        "all": AtomConfig(target_modules="all"),
        "sparse": AtomConfig(basis="sparse", channel_block=1, target_modules=["conv_in"]),
    }
    for name, config in configs.items():
        add(pipe, name, config)
        paths[name] = atomdiff.save_atoms(pipe, folder / f"{name}.atoms.safetensors", name, dtype=torch.float32)
        atomdiff.unload_atoms(pipe, name)
    return paths


@pytest.fixture
def pipe(pipe_template):
    pipe = copy.deepcopy(pipe_template)
    pipe.unet.requires_grad_(False)
    return pipe


def predict(pipe, rows=2):
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(rows, 4, 8, 8, generator=generator), torch.randn(rows, 7, 32, generator=generator)
    with torch.no_grad():
        return pipe.unet(latents, 500, encoder_hidden_states=text).sample.float()


def mixed(pipe):
    with atomdiff.mixed_batch(pipe, ["all", None]):
        return predict(pipe)


def bits(pipe):
    return {key: tensor.detach().clone() for key, tensor in pipe.unet.state_dict().items()}


def assert_same(now, before):
    assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)


def by_group(unet, folder, kind, **options):
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(unet, torch.device("cpu"), torch.device("cpu"), offload_type=kind, **blocks, **options)


IN_MEMORY = {
    "sequential": lambda unet, folder: cpu_offload(unet, execution_device=torch.device("cpu")),
    "groups of leaves": lambda unet, folder: by_group(unet, folder, "leaf_level"),
    "groups of blocks": lambda unet, folder: by_group(unet, folder, "block_level"),
}
ON_DISK = {
    "disk": lambda unet, folder: disk_offload(unet, folder, execution_device=torch.device("cpu")),
    "leaves on disk": lambda unet, folder: by_group(unet, folder, "leaf_level", offload_to_disk_path=str(folder)),
    "blocks on disk": lambda unet, folder: by_group(unet, folder, "block_level", offload_to_disk_path=str(folder)),
}
ORDERS = (
    "offload load set unload",
    "load offload set unload",
    "load set offload unload",
    "load set offload set unload",
)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", IN_MEMORY)
def test_offloaded_weights_are_merged_and_given_back_in_any_order(pipe, files, tmp_path, way, order):
    plain = copy.deepcopy(pipe)
    atomdiff.load_atoms(plain, files["all"])
    expected, batch = predict(plain), mixed(plain)
    atomdiff.set_active(plain, {"all": 0.5})
    merged, before, base = predict(plain), bits(pipe), predict(pipe)
    for call in order.split():
        if call == "offload":
            IN_MEMORY[way](pipe.unet, tmp_path)
        elif call == "load":
            atomdiff.load_atoms(pipe, files["all"])
            torch.testing.assert_close(predict(pipe), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(mixed(pipe), batch, atol=1e-5, rtol=0)
        elif call == "set":
            atomdiff.set_active(pipe, {"all": 0.5})
            torch.testing.assert_close(predict(pipe), merged, atol=1e-5, rtol=0)
            torch.testing.assert_close(mixed(pipe), batch, atol=1e-5, rtol=0)
        else:
            atomdiff.restore(pipe)
            torch.testing.assert_close(predict(pipe), merged, atol=1e-5, rtol=0)
            atomdiff.unload_atoms(pipe)
    assert torch.equal(predict(pipe), base)
    if way == "sequential":
        remove_hook_from_module(pipe.unet, recurse=True)
    assert_same(bits(pipe), before)


@pytest.mark.parametrize("order", ["offload load", "load offload"])
@pytest.mark.parametrize("way", [IN_MEMORY["sequential"], ON_DISK["disk"]], ids=["cpu", "disk"])
def test_words_reach_offloaded_token_embeddings_and_leave_them(pipe, tmp_path, way, order):
    def encode(text):
        return pipe.text_encoder(pipe.tokenizer(text, return_tensors="pt").input_ids)[0].detach()

    def load():
        for word, value in (("zwx", 1.0), ("sks", 2.0)):  # a new one, and one that the tokenizer knows
            add_placeholder_token(pipe, word)
            set_token_embedding(pipe, word, {"text_encoder": torch.full((32,), value)})

    table = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    load()
    expected = encode("a zwx sks mug")
    for word in ("zwx", "sks"):
        remove_placeholder_tokens(pipe, [word])
    base = encode("a mug")
    for call in order.split():
        load() if call == "load" else way(pipe.text_encoder, tmp_path)
    assert torch.equal(encode("a zwx sks mug"), expected)
    for word in ("zwx", "sks"):
        remove_placeholder_tokens(pipe, [word])
    assert pipe.text_encoder.get_input_embeddings().weight.is_meta and torch.equal(encode("a mug"), base)
    remove_hook_from_module(pipe.text_encoder, recurse=True)
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, table)


@pytest.mark.slow
@pytest.mark.parametrize("way", ON_DISK)
def test_weights_on_disk_serve_unmerged_concepts_and_are_not_changed(pipe, files, tmp_path, way):
    atomdiff.load_atoms(pipe, files["all"])
    expected, batch = predict(pipe), mixed(pipe)
    ON_DISK[way](pipe.unet, tmp_path)
    torch.testing.assert_close(predict(pipe), expected, atol=1e-5, rtol=0)
    if way == "blocks on disk":
        with pytest.raises(UserError, match="offloaded to disk in groups of blocks cannot be mixed: use offload_type="):
            mixed(pipe)
    else:
        torch.testing.assert_close(mixed(pipe), batch, atol=1e-5, rtol=0)
    for change in (lambda: atomdiff.set_active(pipe, "all"), lambda: atomdiff.merge(pipe)):
        with pytest.raises(
            UserError, match="cannot change the weight of .*: it is offloaded to disk; use concepts unm"
        ):
            change()
    torch.testing.assert_close(predict(pipe), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ON_DISK)
def test_what_was_merged_before_weights_went_to_disk_is_refused_to_come_off(pipe, files, tmp_path, way):
    atomdiff.load_atoms(pipe, files["all"])
    atomdiff.set_active(pipe, "all")
    expected = predict(pipe)
    ON_DISK[way](pipe.unet, tmp_path)
    for change in (atomdiff.restore, atomdiff.unload_atoms):
        with pytest.raises(UserError, match="it is offloaded to disk; load the pipeline again"):
            change(pipe)
    torch.testing.assert_close(predict(pipe), expected, atol=1e-5, rtol=0)


def test_coefficients_of_offloaded_weights_are_worked_out_once(pipe, files, monkeypatch):
    atomdiff.load_atoms(pipe, files["sparse"])
    expected = predict(pipe)
    by_group(pipe.unet, None, "leaf_level")
    monkeypatch.setattr("atomdiff.atoms.atom_basis.sparse_coefficients", lambda *_: pytest.fail("worked out again"))
    torch.testing.assert_close(predict(pipe), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["load", "cast"])
def test_weights_cast_for_storage_compute_in_full_and_are_not_merged(pipe, files, first):
    def cast():
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    def load():
        atomdiff.load_atoms(pipe, files["all"], allow_base_mismatch=True)

    plain = copy.deepcopy(pipe)
    atomdiff.load_atoms(plain, files["all"])
    expected, base = predict(plain), predict(pipe)
    (load(), cast()) if first == "load" else (cast(), load())
    close = (expected - base).abs().mean() / 3
    assert (predict(pipe) - expected).abs().mean() < close
    assert (mixed(pipe)[0] - expected[0]).abs().mean() < close
    for merge in (lambda: atomdiff.set_active(pipe, "all"), lambda: pipe.fuse_lora(components=["unet"])):
        before = bits(pipe)
        with pytest.raises(UserError, match="it is stored in torch.float8_e4m3fn, to which a merged weight would be"):
            merge()
        assert_same(bits(pipe), before)
    assert (predict(pipe) - expected).abs().mean() < close
    atomdiff.unload_atoms(pipe)
    assert (predict(pipe) - base).abs().mean() < close


@pytest.mark.slow
def test_one_of_two_merged_concepts_comes_off_where_weights_are_cast_for_storage(pipe, files):
    base = predict(pipe)
    for name in ("a", "b"):
        atomdiff.load_atoms(pipe, files["all"], name)
    atomdiff.set_active(pipe, {"b": 0.5})
    expected = predict(pipe)
    close = (expected - base).abs().mean() / 3
    atomdiff.set_active(pipe, {"a": -1.0, "b": 0.5})
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert (predict(pipe) - expected).abs().mean() > close
    pipe.unet.delete_adapters("a")
    assert (predict(pipe) - expected).abs().mean() < close
    atomdiff.unload_atoms(pipe)
    assert (predict(pipe) - base).abs().mean() < close


@pytest.mark.parametrize("first", ["load", "cast"])
def test_sparse_coefficients_are_those_of_weights_as_they_compute(pipe, files, first):
    atomdiff.load_atoms(pipe, files["sparse"])
    expected = predict(pipe)
    if first == "cast":
        atomdiff.unload_atoms(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if first == "cast":
        atomdiff.load_atoms(pipe, files["sparse"], allow_base_mismatch=True)
    torch.testing.assert_close(predict(pipe), expected, atol=0.2 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("kept", ["nothing", "a copy", "offloaded"])
def test_a_base_weight_cast_for_storage_is_read_as_it_computes(kept):
    module = nn.Conv2d(8, 8, 3)
    weight = module.weight.detach().clone()
    base = BaseWeight(module)
    if kept != "nothing":
        base.keep(weight.clone if kept == "offloaded" else None)
        module.weight.data.zero_()
    apply_layerwise_casting_hook(module, torch.float8_e4m3fn, torch.float32, non_blocking=False)
    assert module.weight.dtype == torch.float8_e4m3fn and base.read().dtype == torch.float32
    torch.testing.assert_close(base.read().detach(), weight, atol=2**-9, rtol=2**-3)


def test_fused_projections_are_refused_wherever_a_concept_would_not_reach_them(pipe, files):
    before = bits(pipe)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(UserError, match=r"are fused, into a copy .*: call unfuse_qkv_projections\(\) first"):
        atomdiff.load_atoms(pipe, files["all"])
    pipe.unet.unfuse_qkv_projections()
    atomdiff.load_atoms(pipe, files["all"])
    with pytest.raises(UserError, match="fuse_qkv_projections copies weights that concepts adapt"):
        pipe.unet.fuse_qkv_projections()
    atomdiff.set_active(pipe, "all")
    atomdiff.unload_atoms(pipe)
    now = bits(pipe)
    assert_same({key: now[key] for key in before}, before)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


class Packed(torch.Tensor):
    """A tensor that passes for a floating-point one, as quantized ones do."""

    __module__ = "torchao.dtypes"


def test_quantized_weights_are_refused(pipe, files):
    attention = next(module for module in pipe.unet.modules() if hasattr(module, "to_q"))
    weight = attention.to_q.weight.data
    attention.to_q._parameters["weight"] = weight.as_subclass(Packed)
    with pytest.raises(UserError, match=r"it is quantized \(torchao.dtypes.Packed\)"):
        atomdiff.load_atoms(pipe, files["all"])
    attention.to_q.weight = nn.Parameter(weight, requires_grad=False)
    atomdiff.load_atoms(pipe, files["all"])
    find_atom_layer(attention.to_q).base_layer._parameters["weight"] = weight.as_subclass(Packed)
    with pytest.raises(UserError, match=r"it is quantized \(torchao.dtypes.Packed\)"):
        atomdiff.set_active(pipe, "all")


@pytest.mark.parametrize("inside", [True, False])
def test_weights_made_in_inference_mode(pipe_template, files, inside):
    with torch.inference_mode():
        pipe = copy.deepcopy(pipe_template)
        for parameter in pipe.unet.parameters():
            parameter.data = parameter.data.clone()
    before, base = bits(pipe), predict(pipe)
    with torch.inference_mode(inside):
        atomdiff.load_atoms(pipe, files["all"])
        expected = predict(pipe)
    atomdiff.set_active(pipe, "all")
    with torch.inference_mode():
        torch.testing.assert_close(predict(pipe), expected, atol=1e-5, rtol=0)
        atomdiff.unload_atoms(pipe)
    assert torch.equal(predict(pipe), base)
    assert_same(bits(pipe), before)


@pytest.mark.parametrize("call", [lambda pipe: atomdiff.set_active(pipe, ["a", "lora"]), atomdiff.merge])
@pytest.mark.parametrize("atoms_first", [True, False])
def test_other_methods_are_not_merged_into_offloaded_weights(tiny_pipe, call, atoms_first):
    unet, configs = tiny_pipe.unet, [("a", AtomConfig(target_modules=["to_q"])), ("lora", LoraConfig(r=2))]
    configs[1][1].target_modules, configs[1][1].init_lora_weights = ["to_q"], False
    for name, config in configs if atoms_first else reversed(configs):
        unet.add_adapter(config, adapter_name=name)
    unet.set_adapters(["a", "lora"])
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, unet.config.cross_attention_dim)
    cpu_offload(unet, torch.device("cpu"))
    with torch.no_grad():
        before = unet(x, 5, text).sample
        with pytest.raises(
            UserError, match="^the weights of a layer are offloaded, where PEFT cannot merge a .*set_adapters"
        ):
            call(tiny_pipe)
        atomdiff.restore(tiny_pipe)
        assert torch.equal(unet(x, 5, text).sample, before)


@pytest.mark.slow
@pytest.mark.parametrize("way", IN_MEMORY | ON_DISK)
def test_concepts_are_saved_and_kept_in_part_where_they_were_offloaded(pipe, files, tmp_path, way):
    plain = copy.deepcopy(pipe)
    for each in (plain, pipe):
        atomdiff.load_atoms(each, files["all"])
    (IN_MEMORY | ON_DISK)[way](pipe.unet, tmp_path / "offloaded")
    if way in ("leaves on disk", "blocks on disk"):
        with pytest.raises(UserError, match="offloaded to disk; load the pipeline again, in memory"):
            atomdiff.save_atoms(pipe, tmp_path / "refused.safetensors", "all")
        return
    saved = [atomdiff.save_atoms(p, tmp_path / f"{name}.safetensors", "all") for name, p in (("a", plain), ("b", pipe))]
    one, other = map(load_file, saved)
    assert_same(one, other)
    if way in IN_MEMORY:
        for each in (plain, pipe):
            atomdiff.set_active(each, {"all": {"keep": 0.5}})
        torch.testing.assert_close(predict(pipe), predict(plain), atol=1e-5, rtol=0)


METHODS = {
    "mona": MonaConfig(hidden_size=4),
    "conv_adapter": ConvAdapterConfig(),
    "coeff_tuning": CoeffTuningConfig(),
    "lora": LoraConfig(r=2, target_modules=["to_q", "conv1"]),
    "dora": LoraConfig(r=2, target_modules=["to_q"], use_dora=True),
    "ia3": IA3Config(target_modules=["to_q"], feedforward_modules=[]),
    "ln_tuning": LNTuningConfig(target_modules=["norm1"]),
}


def offloaded_pair(pipe, name, way, folder):
    """A pipeline with an adapter of these settings, and one of the same that is offloaded afterwards."""
    add(pipe, name, METHODS[name])
    pipe.unet.set_adapter(name)
    offloaded = copy.deepcopy(pipe)
    (IN_MEMORY | ON_DISK)[way](offloaded.unet, folder)
    return pipe, offloaded


@pytest.mark.slow
@pytest.mark.parametrize("way", IN_MEMORY | ON_DISK)
@pytest.mark.parametrize("name", METHODS)
def test_adapters_of_any_method_are_saved_where_they_were_offloaded(pipe, tmp_path, way, name):
    plain, offloaded = offloaded_pair(pipe, name, way, tmp_path / "offloaded")
    if way in ("leaves on disk", "blocks on disk"):
        with pytest.raises(UserError, match="cannot read the weights of .*: they are offloaded to disk; load the pipe"):
            atomdiff.save_atoms(offloaded, tmp_path / "refused", name)
        assert not (tmp_path / "refused").exists()
        return
    saved = [atomdiff.save_atoms(each, tmp_path / str(i), name) for i, each in enumerate((plain, offloaded))]
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in saved)
    assert any(tensor.any() for tensor in one.values())
    assert_same(other, one)


@pytest.mark.slow
@pytest.mark.parametrize("way", IN_MEMORY | ON_DISK)
@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_offloaded_adapters_are_exported(pipe, tmp_path, way, name):
    plain, offloaded = offloaded_pair(pipe, name, way, tmp_path / "offloaded")

    def exported(pipe, name):
        diff = export_diff(pipe, tmp_path / f"{name}.safetensors", dtype=torch.float32).path
        folder = export_pipeline(pipe, tmp_path / name).path if way in IN_MEMORY else None
        whole = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") if folder else {}
        return {f"diff.{key}": value for key, value in load_file(diff).items()} | whole

    expected = exported(plain, "plain")
    if way in ("leaves on disk", "blocks on disk"):
        with pytest.raises(UserError, match="cannot read the weights of .*: they are offloaded to disk"):
            exported(offloaded, "refused")
        return
    assert_same(exported(offloaded, "offloaded"), expected)
    if way == "sequential":
        assert all(parameter.is_meta for parameter in offloaded.unet.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("way", IN_MEMORY | ON_DISK)
def test_what_full_tuning_changed_is_found_in_offloaded_pipelines(pipe, tmp_path, way):
    tuned = copy.deepcopy(pipe)
    with torch.no_grad():
        tuned.unet.conv_in.weight.add_(torch.randn(tuned.unet.conv_in.weight.shape) / 10)
        tuned.text_encoder.get_input_embeddings().weight.mul_(2)
    config = AtomConfig(channel_block=1)
    expected = extract(pipe, tuned, config)
    for number, each in enumerate((pipe, tuned)):
        (IN_MEMORY | ON_DISK)[way](each.unet, tmp_path / str(number))
    cpu_offload(tuned.text_encoder, torch.device("cpu"))
    if way in ("leaves on disk", "blocks on disk"):
        with pytest.raises(UserError, match="cannot read the weights of .*: they are offloaded to disk"):
            extract(pipe, tuned, config)
        return
    found = extract(pipe, tuned, config)
    assert found.explained == expected.explained and found.other_models == expected.other_models != {}
    for module, tensors in expected.concept.layers.items():
        assert_same(found.concept.layers[module], tensors)
    assert found.concept.fingerprint == expected.concept.fingerprint


def test_weights_without_values_are_named(pipe, tmp_path):
    add(pipe, "lora", METHODS["lora"])
    pipe.unet.mid_block.attentions[0].to("meta")
    with pytest.raises(UserError, match=r"the weights of mid_block.attentions.0\S+: they are on the meta device, with"):
        atomdiff.save_atoms(pipe, tmp_path / "refused", "lora")


@pytest.mark.parametrize("way", ["sequential", "leaves on disk", "blocks on disk"])
def test_offloaded_bases_with_concepts_are_not_saved_by_diffusers(pipe, files, tmp_path, way):
    atomdiff.load_atoms(pipe, files["all"])
    (IN_MEMORY | ON_DISK)[way](pipe.unet, tmp_path / "offloaded")
    with (
        pytest.warns(UserWarning, match="the folder has the base only"),
        pytest.raises(UserError, match="weights of this UNet2DConditionModel are offloaded, and cannot be saved with"),
    ):
        pipe.unet.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("way", ["sequential", "groups of leaves"])
def test_lora_files_are_refused_where_their_weights_would_be_lost(pipe, tmp_path, way):
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False), "lora")
    file = tmp_path / "lora.safetensors"
    save_file(convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="lora")), file)
    pipe.unet.delete_adapters("lora")
    IN_MEMORY[way](pipe.unet, tmp_path)
    with pytest.raises(UserError, match=r"to_q is offloaded, .* load others before the pipeline is offloaded"):
        atomdiff.load_atoms(pipe, file)
    assert not getattr(pipe.unet, "peft_config", {})


def test_groups_with_streams_get_no_new_tensors(pipe, files, tmp_path):
    base = predict(pipe)
    atomdiff.load_atoms(pipe, files["all"], "one")
    atomdiff.set_active(pipe, "one")
    expected = predict(pipe)
    atomdiff.restore(pipe)
    by_group(pipe.unet, tmp_path, "leaf_level")
    registries = [registry for module in pipe.unet.modules() if (registry := vars(module).get("_diffusers_hook"))]
    groups = [hook.group for registry in registries if (hook := registry.get_hook("group_offloading"))]
    for group in groups:
        group.stream = object()  # which a CPU has none of
    before = {name for name, _ in pipe.unet.named_buffers()}
    for change in (
        lambda: atomdiff.load_atoms(pipe, files["all"], "two"),
        lambda: atomdiff.unload_atoms(pipe),
        lambda: atomdiff.merge(pipe),
    ):
        with pytest.raises(UserError, match=r"load concepts before enable_group_offload\(use_stream=True\)"):
            change()
    atomdiff.set_active(pipe, "one")
    assert {name for name, _ in pipe.unet.named_buffers()} == before
    for group in groups:
        group.stream = None
    torch.testing.assert_close(predict(pipe), expected, atol=1e-5, rtol=0)
    atomdiff.unload_atoms(pipe)
    assert torch.equal(predict(pipe), base)
