"""Offload of base weights: the same weights from everywhere, no copy that was not asked for, every bit back."""

import copy
import gc
import itertools
import os
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import atomdiff
from atomdiff.pipelines.base_offload import FileWeight, HostCopy
from atomdiff.pipelines.models import pipeline_models
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter
from tests.pipelines.helpers import assert_same_bits, base_bits

OFFLOADS = ("device", "cpu", "file")
CONFIG = AtomConfig(channel_block=2, target_modules=["conv_in", "conv_out", "conv1", "to_q", "q_proj"])


@pytest.fixture(scope="module")
def concept(pipe_template, tmp_path_factory):
    """A concept of the UNet and the text encoder."""
    pipe = copy.deepcopy(pipe_template)
    add_adapter(pipe, "default", CONFIG, ("unet", "text_encoder"))
    return atomdiff.save_atoms(pipe, tmp_path_factory.mktemp("concept") / "a", dtype=torch.float32)


def load(folder, concept, dtype=torch.float32, **options):
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, **options)
    pipe.set_progress_bar_config(disable=True)
    before = base_bits(pipe)
    atomdiff.load_atoms(pipe, concept, "a")
    return pipe, before


def layers(pipe):
    return [layer for model in (pipe.unet, pipe.text_encoder) for layer in atom_layers(model).values()]


def bytes_in_memory():
    """Of plain tensors: weights are parameters, what is kept of them is not."""
    gc.collect()
    tensors = {t.data_ptr(): t for t in gc.get_objects() if type(t) is torch.Tensor}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


@pytest.mark.slow
def test_the_same_weights_come_from_everywhere_and_go(tiny_pipe_folder, concept):
    pipe, before = load(tiny_pipe_folder, concept)
    atomdiff.set_active(pipe, {"a": 0.5})
    expected = base_bits(pipe)
    assert any(not torch.equal(expected[key], value) for key, value in before.items())
    for first, second in itertools.product((*OFFLOADS, "restore"), (*OFFLOADS, None)):
        if first == "restore":
            atomdiff.restore(pipe)
        else:
            atomdiff.set_active(pipe, "a", offload_base=first)
        atomdiff.set_active(pipe, {"a": 0.5}, offload_base=second)
        assert_same_bits(base_bits(pipe), expected)
    atomdiff.set_active(pipe, {})
    assert_same_bits(base_bits(pipe), before)
    atomdiff.unload_atoms(pipe)
    assert_same_bits(base_bits(pipe), before)


@pytest.mark.slow
def test_only_the_offload_asked_for_takes_memory(tiny_pipe_folder, concept):
    pipe, _ = load(tiny_pipe_folder, concept)
    adapted = sum(layer.base_layer.weight.nbytes for layer in layers(pipe))
    largest = max(layer.base_layer.weight.nbytes for layer in layers(pipe))
    empty = bytes_in_memory()
    for offload_base, kind in (("cpu", HostCopy), ("device", type(None)), ("file", FileWeight)):
        for weight in (1.0, 0.5):  # None keeps it where it is
            atomdiff.set_active(pipe, {"a": weight}, offload_base=offload_base if weight == 1 else None)
            assert {type(layer.base_weight.offloaded) for layer in layers(pipe)} == {kind}
            assert all((layer.base_weight.copy is not None) == (offload_base == "device") for layer in layers(pipe))
        taken = bytes_in_memory() - empty
        assert taken < largest if offload_base == "file" else 0.95 * adapted < taken < 1.05 * adapted + largest
    atomdiff.restore(pipe)
    atomdiff.set_active(pipe, "a")
    assert all(layer.base_weight.copy is not None for layer in layers(pipe))  # restored, it starts anew


def sharded(pipe, folder):
    pipe.save_pretrained(folder, max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2


def half(pipe, folder):
    pipe = copy.deepcopy(pipe)
    for model in pipeline_models(pipe).values():
        torch.nn.Module.to(model, torch.float16)
    pipe.save_pretrained(folder)


def two_variants(pipe, folder):
    half(pipe, folder)
    other = copy.deepcopy(pipe)
    for parameter in other.unet.parameters():
        parameter.data *= 0.99
    other.save_pretrained(folder)
    pipe.save_pretrained(folder, variant="mine")


CHECKPOINTS = {
    "float32": (lambda pipe, folder: pipe.save_pretrained(folder), {}),
    "sharded": (sharded, {}),
    "float32 as bfloat16": (lambda pipe, folder: pipe.save_pretrained(folder), {"dtype": torch.bfloat16}),
    "sharded as float16": (sharded, {"dtype": torch.float16}),
    "float16": (half, {"dtype": torch.float16}),
    "float16 as float32": (half, {}),
    "two variants": (two_variants, {"variant": "mine"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_files_are_read_again(pipe_template, concept, tmp_path, case):
    save, options = CHECKPOINTS[case]
    save(copy.deepcopy(pipe_template), tmp_path / "pipe")
    pipe, before = load(tmp_path / "pipe", concept, **options)
    atomdiff.set_active(pipe, "a")
    expected = base_bits(pipe)
    for offload_base in ("file", "cpu", "file"):
        atomdiff.set_active(pipe, {"a": {"steps": {0: 1, 1: 0}}}, offload_base=offload_base)
        pipe("a mug", num_inference_steps=2, output_type="latent")
        assert not torch.equal(base_bits(pipe)["unet.conv_in.weight"], expected["unet.conv_in.weight"])
        atomdiff.set_active(pipe, "a")
        assert_same_bits(base_bits(pipe), expected)
    atomdiff.restore(pipe)
    assert_same_bits(base_bits(pipe), before)


@pytest.mark.slow
@pytest.mark.parametrize("offload_base", OFFLOADS)
@pytest.mark.parametrize(("first", "second"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_a_pipeline_changes_its_dtype_meanwhile(tiny_pipe_folder, concept, offload_base, first, second):
    pipe, _ = load(tiny_pipe_folder, concept, first)
    atomdiff.restore(pipe)
    plain = StableDiffusionPipeline.from_pretrained(tiny_pipe_folder, dtype=first).to(second)
    atomdiff.set_active(pipe, "a", offload_base=offload_base)
    pipe.to(second)
    atomdiff.set_active(pipe, {"a": 0.5})
    changed = base_bits(pipe)
    atomdiff.restore(pipe)
    assert_same_bits(base_bits(pipe), base_bits(plain))
    atomdiff.set_active(pipe, {"a": 0.5})
    assert_same_bits(base_bits(pipe), changed)


@pytest.mark.parametrize("offload_base", ["cpu", "file"])
def test_layouts_stay(tiny_pipe_folder, concept, offload_base):
    pipe, before = load(tiny_pipe_folder, concept)
    pipe.unet.to(memory_format=torch.channels_last)
    strides = [parameter.stride() for parameter in pipe.unet.parameters()]
    atomdiff.set_active(pipe, {"a": 0.5})
    expected = base_bits(pipe)
    atomdiff.set_active(pipe, {"a": 0.5}, offload_base=offload_base)
    now = base_bits(pipe)
    for key, value in expected.items():
        torch.testing.assert_close(now[key], value, rtol=0, atol=1e-6)
    atomdiff.restore(pipe)
    assert_same_bits(base_bits(pipe), before)
    assert [parameter.stride() for parameter in pipe.unet.parameters()] == strides


@pytest.mark.slow
def test_saving_and_adding_read_the_kept_base(tiny_pipe_folder, concept, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    pipe, _ = load(tiny_pipe_folder, concept)
    expected = atomdiff.save_atoms(pipe, tmp_path / "1" / "a", "a").read_bytes()
    pipe.unet.add_adapter(AtomConfig(channel_block=1), "fresh")
    basis = atom_layers(pipe.unet)["conv_in"].atom_basis["fresh"].clone()
    for number, offload_base in enumerate(OFFLOADS):
        atomdiff.set_active(pipe, "a", offload_base=offload_base)
        assert atomdiff.save_atoms(pipe, tmp_path / f"{number + 2}" / "a", "a").read_bytes() == expected
        pipe.unet.delete_adapters("fresh")
        pipe.unet.add_adapter(AtomConfig(channel_block=1), "fresh")
        assert torch.equal(atom_layers(pipe.unet)["conv_in"].atom_basis["fresh"], basis)


@pytest.mark.slow
def test_weights_that_are_in_no_file_are_refused(tiny_pipe, tiny_pipe_folder, concept, tmp_path):
    def refused(pipe, message):
        before = base_bits(pipe)
        kept = [(layer.base_weight.offloaded, layer.base_weight.copy) for layer in layers(pipe)]
        with pytest.raises(UserError, match=message):
            atomdiff.set_active(pipe, {"a": 0.1}, offload_base="file")
        assert_same_bits(base_bits(pipe), before)
        assert [(layer.base_weight.offloaded, layer.base_weight.copy) for layer in layers(pipe)] == kept

    atomdiff.load_atoms(tiny_pipe, concept, "a")
    refused(
        tiny_pipe,
        "offload_base='file': .* is not in a checkpoint .*load the pipeline from a folder.*offload_base='cpu'",
    )
    pipe, _ = load(tiny_pipe_folder, concept)
    conv = atom_layers(pipe.unet)["conv_out"].base_layer
    conv.weight.data[0, 0, 0, 0] += 1e-4
    refused(pipe, r"the weight of conv_out as it is now is not in the 1 safetensors file\(s\) of .*unet")
    atomdiff.set_active(pipe, {"a": 0.5}, offload_base="cpu")
    refused(pipe, "the weight of conv_out as it is now")
    shutil.copytree(tiny_pipe_folder, tmp_path / "pickled", ignore=shutil.ignore_patterns("diffusion_*.safetensors"))
    for part in ("unet", "vae"):
        file = tiny_pipe_folder / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), tmp_path / "pickled" / part / "diffusion_pytorch_model.bin")
    pipe, _ = load(tmp_path / "pickled", concept)
    refused(pipe, "the weight of .* is not in a checkpoint")


def test_a_file_that_is_gone_or_damaged_is_named_and_can_be_put_back(tiny_pipe_folder, concept, tmp_path):
    shutil.copytree(tiny_pipe_folder, tmp_path / "pipe")
    pipe, before = load(tmp_path / "pipe", concept)
    atomdiff.set_active(pipe, "a", offload_base="file")
    expected = base_bits(pipe)
    file = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    contents = file.read_bytes()
    file.unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=r"offloaded to .*diffusion_pytorch_model.safetensors, put it back"):
            atomdiff.set_active(pipe, {})
        save_file({"other": torch.zeros(1)}, file)
    file.unlink()
    file.write_bytes(contents)
    atomdiff.set_active(pipe, "a")
    assert_same_bits(base_bits(pipe), expected)
    atomdiff.restore(pipe)
    assert_same_bits(base_bits(pipe), before)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in place", "same time", "moved there"])
def test_another_base_in_the_file_is_never_given_back(tiny_pipe_folder, concept, tmp_path, how):
    shutil.copytree(tiny_pipe_folder, tmp_path / "pipe")
    pipe, before = load(tmp_path / "pipe", concept)
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.data.clone()  # diffusers' are windows onto the file
    atomdiff.set_active(pipe, "a", offload_base="file")
    merged = base_bits(pipe)
    file = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    contents, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    tensors = load_file(file)
    save_file({**tensors, "conv_out.weight": tensors["conv_out.weight"] + 1}, tmp_path / "other")
    if how == "moved there":
        (tmp_path / "other").replace(file)
    else:
        file.write_bytes((tmp_path / "other").read_bytes())
    if how == "same time":
        os.utime(file, ns=times)
    for call in (atomdiff.restore, atomdiff.unload_atoms, atomdiff.merge, lambda pipe: atomdiff.set_active(pipe, {})):
        with pytest.raises(UserError, match=r"put it back as it was: conv_out.weight in it has changed"):
            call(pipe)
        assert_same_bits(base_bits(pipe), merged)
    file.write_bytes(contents)
    atomdiff.restore(pipe)
    assert_same_bits(base_bits(pipe), before)


def test_what_is_kept_on_the_device_is_no_window_into_a_file(tiny_pipe_folder, concept, tmp_path):
    shutil.copytree(tiny_pipe_folder, tmp_path / "pipe")
    pipe, _ = load(tmp_path / "pipe", concept)
    before = [layer.base_layer.weight.detach().clone() for layer in layers(pipe)]
    for offload_base in ("file", "device"):
        atomdiff.set_active(pipe, "a", offload_base=offload_base)
    for file in (tmp_path / "pipe").rglob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    atomdiff.restore(pipe)
    assert all(torch.equal(layer.base_layer.weight, weight) for layer, weight in zip(layers(pipe), before, strict=True))


def test_unknown_offloads_are_refused(tiny_pipe):
    with pytest.raises(UserError, match="offload_base='disk': expected one of 'device', 'cpu', 'file'"):
        atomdiff.set_active(tiny_pipe, {}, offload_base="disk")


def test_merging_more_by_other_means_keeps_the_offload(tiny_pipe_folder, concept):
    pipe, before = load(tiny_pipe_folder, concept)
    atomdiff.load_atoms(pipe, concept, "b")
    atomdiff.set_active(pipe, "a", offload_base="file")
    for layer in layers(pipe):
        layer.set_adapter(["a", "b"])
    pipe.fuse_lora(components=["unet", "text_encoder"])
    assert all(layer.base_weight.copy is None for layer in layers(pipe))
    together = base_bits(pipe)
    atomdiff.set_active(pipe, ["a", "b"])
    assert_same_bits(base_bits(pipe), together)
    atomdiff.restore(pipe)
    assert_same_bits(base_bits(pipe), before)
