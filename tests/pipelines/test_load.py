"""Concepts in a pipeline: what is loaded is unloaded again, exactly."""

import warnings

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PsoftConfig

import atomdiff
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter, predict
from tests.pipelines.helpers import METHODS, assert_same_bits, assert_same_state, bits, pipeline_state, train


def test_saved_is_loaded_is_merged(tiny_pipe, tmp_path):
    train(tiny_pipe, word="ohwx", parts=("unet", "text_encoder"))
    trained = predict(tiny_pipe, "a photo of ohwx mug")
    path = tmp_path / "my mug.v2.atoms.safetensors"
    assert atomdiff.save_atoms(tiny_pipe, path, dtype=torch.float32) == path
    atomdiff.unload_atoms(tiny_pipe)
    base = predict(tiny_pipe, "a photo of ohwx mug")
    assert atomdiff.load_atoms(tiny_pipe, path) == "my_mug"
    assert torch.equal(predict(tiny_pipe, "a photo of ohwx mug"), trained)
    atomdiff.merge(tiny_pipe)
    assert torch.equal(predict(tiny_pipe, "a photo of ohwx mug"), trained)
    assert (trained - base).abs().max() > 1e-3


def test_dropout_of_an_adapter_ends_with_its_training(tiny_pipe, tmp_path):
    add_adapter(tiny_pipe, "default", LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q", "to_v"]))
    atomdiff.save_atoms(tiny_pipe, tmp_path / "lora")
    atomdiff.unload_atoms(tiny_pipe)
    base = predict(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "lora")
    assert torch.equal(predict(tiny_pipe), predict(tiny_pipe)) and not torch.equal(predict(tiny_pipe), base)
    assert not any(module.training for module in tiny_pipe.unet.modules())


def test_tuned_norms_act_beside_adapters_of_other_layers(tiny_pipe, tmp_path):
    norms = LNTuningConfig(target_modules=r".*transformer_blocks\.\d+\.norm1")
    expected = {}
    for name, config in (("norms", norms), ("lora", LoraConfig(r=2, target_modules=["to_q", "to_v"]))):
        add_adapter(tiny_pipe, "default", config)
        atomdiff.save_atoms(tiny_pipe, tmp_path / name)
        expected[name] = predict(tiny_pipe)
        atomdiff.unload_atoms(tiny_pipe)
    for name in expected:
        atomdiff.load_atoms(tiny_pipe, tmp_path / name)
        torch.testing.assert_close(predict(tiny_pipe), expected[name], atol=1e-6, rtol=0)
    for name in expected:
        atomdiff.set_active(tiny_pipe, name)
        torch.testing.assert_close(predict(tiny_pipe), expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("offload", ["device", "cpu"])
def test_what_a_method_computes_from_weights_is_of_the_base(tiny_pipe, tmp_path, offload):
    add_adapter(tiny_pipe, "default", PsoftConfig(r=4, psoft_alpha=4, target_modules=["to_q", "to_v"]))
    atomdiff.save_atoms(tiny_pipe, tmp_path / "psoft")
    expected = predict(tiny_pipe)
    atomdiff.unload_atoms(tiny_pipe)
    before = bits(tiny_pipe)
    add_adapter(tiny_pipe, "atoms", AtomConfig(target_modules="attention"), scale=0.5)
    atomdiff.set_active(tiny_pipe, "atoms", offload_base=offload)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "psoft")
    torch.testing.assert_close(predict(tiny_pipe), expected, atol=1e-6, rtol=0)
    atomdiff.unload_atoms(tiny_pipe)
    assert_same_bits(bits(tiny_pipe), before)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_saved_and_loaded_with_its_word(tiny_pipe, tmp_path, method):
    parts = ("unet",) if method == "recursive atoms" else ("unet", "text_encoder")  # recursion takes kernels
    train(tiny_pipe, method, name="made", word="ohwx", parts=parts)
    trained = predict(tiny_pipe, "a photo of ohwx mug")
    atomdiff.save_atoms(tiny_pipe, tmp_path / "concept", "made", dtype=torch.float32)
    atomdiff.unload_atoms(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "concept", "again")
    torch.testing.assert_close(predict(tiny_pipe, "a photo of ohwx mug"), trained, atol=1e-6, rtol=0)
    listed = atomdiff.list_atoms(tiny_pipe)
    assert [(c.name, c.active, c.merged, c.trigger_words) for c in listed] == [("again", True, False, ("ohwx",))]
    assert set(listed[0].layers) == set(parts) and listed[0].method == METHODS[method]().peft_type


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_loading_and_unloading_are_exact_inverses(tiny_pipe, concepts, method):
    before, predicted = pipeline_state(tiny_pipe), predict(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, concepts[method], "x")
    assert (predict(tiny_pipe) - predicted).abs().max() > 1e-4
    atomdiff.unload_atoms(tiny_pipe, "x")
    assert_same_state(tiny_pipe, before)
    assert torch.equal(predict(tiny_pipe), predicted)


def test_diffusers_own_calls_work(tiny_pipe, concepts):
    base = predict(tiny_pipe)
    one, two = (
        atomdiff.load_atoms(tiny_pipe, concepts[method], trigger_word=word)
        for method, word in (("atoms", "sks"), ("dct atoms", "zwx"))
    )
    second = predict(tiny_pipe)
    tiny_pipe.set_adapters([one, two], [0.0, 1.0])
    assert torch.equal(predict(tiny_pipe), second)
    tiny_pipe.set_adapters([one, two], [1.0, 0.5])
    both = predict(tiny_pipe)
    assert (both - second).abs().max() > 1e-3
    assert [(c.name, c.active) for c in atomdiff.list_atoms(tiny_pipe)] == [(one, True), (two, True)]
    tiny_pipe.fuse_lora(components=["unet", "text_encoder"])
    torch.testing.assert_close(predict(tiny_pipe), both, atol=1e-5, rtol=0)
    tiny_pipe.unfuse_lora(components=["unet", "text_encoder"])
    tiny_pipe.disable_lora()
    table = tiny_pipe.text_encoder.get_input_embeddings().weight
    assert not torch.equal(predict(tiny_pipe), both) and not any(c.active for c in atomdiff.list_atoms(tiny_pipe))
    tiny_pipe.enable_lora()
    assert torch.equal(predict(tiny_pipe), both)
    tiny_pipe.delete_adapters(one)
    atomdiff.unload_atoms(tiny_pipe)
    assert torch.equal(predict(tiny_pipe), base) and table is tiny_pipe.text_encoder.get_input_embeddings().weight


def test_names_and_words_that_are_taken(tiny_pipe, concepts):
    atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
    with pytest.raises(UserError, match="'atoms' is loaded already: choose another adapter_name"):
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"], "atoms")
    with pytest.raises(UserError, match="'sks' is taken by 'atoms'.*trigger_word="):
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"], "second")
    for name in ("a.b", "keys", " ", "conv1", "0"):
        with pytest.raises(UserError, match="cannot be an adapter name"):
            atomdiff.load_atoms(tiny_pipe, concepts["atoms"], name)
    atomdiff.load_atoms(tiny_pipe, concepts["atoms"], "second", trigger_word="other")
    assert [c.trigger_words for c in atomdiff.list_atoms(tiny_pipe)] == [("sks",), ("other",)]
    with pytest.raises(UserError, match="renames one word, but the concept has 0"):
        atomdiff.load_atoms(tiny_pipe, concepts["oft"], trigger_word="third")
    with pytest.raises(UserError, match="no concept 'cat' to unload; there are: 'atoms', 'second'"):
        atomdiff.unload_atoms(tiny_pipe, "cat")
    with pytest.raises(UserError, match="no concept 'cat' to save"):
        atomdiff.save_atoms(tiny_pipe, "x", "cat")


def test_the_base_is_recognized(tiny_pipe, concepts, user_warnings):
    def move(amount):
        generator = torch.Generator().manual_seed(0)
        for parameter in tiny_pipe.unet.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += amount * parameter.data.std() * noise

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.nn.Module.to(tiny_pipe.unet, torch.bfloat16)
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
        atomdiff.unload_atoms(tiny_pipe)
        torch.nn.Module.to(tiny_pipe.unet, torch.float32)
    move(0.2)
    with pytest.warns(UserWarning, match=r"distance 0.0\d+ from .*may look different") as caught:
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
    (warning,) = user_warnings(caught)
    assert warning.filename == __file__
    atomdiff.unload_atoms(tiny_pipe)
    move(3)
    with pytest.raises(UserError, match=r"distance 0.\d+ from .*allow_base_mismatch=True"):
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
    assert not atomdiff.list_atoms(tiny_pipe)
    with pytest.warns(UserWarning, match="may look different"):
        atomdiff.load_atoms(tiny_pipe, concepts["atoms"], allow_base_mismatch=True)


def test_a_concept_may_be_a_word_only(tiny_pipe, tmp_path):
    before = bits(tiny_pipe)
    add_placeholder_token(tiny_pipe, "ohwx")
    set_token_embedding(tiny_pipe, "ohwx", {"text_encoder": torch.ones(32)})
    atomdiff.save_atoms(tiny_pipe, tmp_path / "word.safetensors")
    atomdiff.unload_atoms(tiny_pipe)
    assert_same_bits(bits(tiny_pipe), before)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "word.safetensors")
    assert [(c.name, c.method, c.trigger_words) for c in atomdiff.list_atoms(tiny_pipe)] == [("word", "", ("ohwx",))]
    assert (tiny_pipe.text_encoder.get_input_embeddings().weight[-1] == 1).all()
    atomdiff.unload_atoms(tiny_pipe, "word")
    assert_same_bits(bits(tiny_pipe), before)
