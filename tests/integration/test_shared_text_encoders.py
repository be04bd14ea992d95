"""Pipelines that share a text encoder or a tokenizer, or exchange it, and the trigger words in them."""

import copy

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import atomdiff
from atomdiff.pipelines.placeholder_tokens import (
    add_placeholder_token,
    add_placeholder_tokens,
    remove_placeholder_tokens,
    set_token_embedding,
)
from atomdiff.pipelines.token_names import placeholder_tokens
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.helpers import assert_unchanged, embed, predict, sharing_pipeline, snapshot

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("own", [(), ("unet",), ("tokenizer",), ("tokenizer", "unet")], ids="-".join)
@pytest.mark.parametrize("first_out", ["mug", "cat"])
def test_pipelines_that_share_a_text_encoder_know_each_others_words(tiny_pipe, concept_files, own, first_out):
    one, two = tiny_pipe, sharing_pipeline(tiny_pipe, *own)
    before = [snapshot(pipe) for pipe in (one, two)]
    atomdiff.load_atoms(one, concept_files["mug"], "mug")
    atomdiff.load_atoms(two, concept_files["cat"], "cat")
    ids = [[pipe.tokenizer.encode(word, add_special_tokens=False) for word in ("ohwx", "zwx")] for pipe in (one, two)]
    assert ids[0] == ids[1] and all(len(each) == 1 for each in ids[0]) and ids[0][0] != ids[0][1]
    table = one.text_encoder.get_input_embeddings().weight
    assert (table[ids[0][0][0]] == 1).all() and (table[ids[0][1][0]] == 2).all()
    with pytest.raises(UserError, match="'ohwx' is taken by 'mug'"):
        atomdiff.load_atoms(two, concept_files["mug"], "another")
    for name in (first_out, {"mug": "cat", "cat": "mug"}[first_out]):
        atomdiff.unload_atoms(one if name == "mug" else two, name)
    for pipe, its_own in zip((one, two), before, strict=True):
        assert_unchanged(pipe, its_own)


def test_unloading_all_leaves_the_words_of_other_pipelines(tiny_pipe, pipe_template, tmp_path):
    source, path = copy.deepcopy(pipe_template), {}
    for seed, word in enumerate(("ohwx", "zwx")):
        source.unet.add_adapter(AtomConfig(target_modules="attention"), word)
        add_placeholder_token(source, word)
        set_token_embedding(source, word, {"text_encoder": torch.full((32,), float(seed + 1))})
        path[word] = atomdiff.save_atoms(source, tmp_path / word, word)
        atomdiff.unload_atoms(source)
    one, two = tiny_pipe, sharing_pipeline(tiny_pipe, "unet")
    before = snapshot(one)
    for pipe, word in ((one, "ohwx"), (two, "zwx")):
        atomdiff.load_atoms(pipe, path[word], word)
    predicted = predict(two, "a zwx mug")
    atomdiff.unload_atoms(one)
    assert torch.equal(predict(two, "a zwx mug"), predicted)
    assert "ohwx" not in two.tokenizer.get_vocab()
    atomdiff.unload_atoms(two)
    assert_unchanged(one, before)


def test_a_concept_that_came_before_a_component_was_exchanged(tiny_pipe, concept_files):
    before = snapshot(tiny_pipe)
    old = {part: getattr(tiny_pipe, part) for part in ("text_encoder", "tokenizer")}
    new = copy.deepcopy(old)
    atomdiff.load_atoms(tiny_pipe, concept_files["mug"], "mug")
    for part, model in new.items():
        setattr(tiny_pipe, part, model)
        atomdiff.list_atoms(tiny_pipe)
    assert tiny_pipe.tokenizer.tokenize("ohwx") == ["ohwx"]
    assert (tiny_pipe.text_encoder.get_input_embeddings().weight[-1] == 1).all()
    atomdiff.unload_atoms(tiny_pipe)
    assert_unchanged(tiny_pipe, before)
    for part, model in old.items():
        setattr(tiny_pipe, part, model)
    atomdiff.unload_atoms(tiny_pipe)
    assert_unchanged(tiny_pipe, before)


def several_vectors(pipe, word="mu"):
    add_placeholder_tokens(pipe, placeholder_tokens(word, 2))
    for number, each in enumerate(placeholder_tokens(word, 2)):
        set_token_embedding(pipe, each, {"text_encoder": torch.full((32,), number + 1.0)})


WORD_PROMPTS = ["a mu mug", "a MU cat", "mu mug_mu xmu, mu", "a mug"]


@pytest.mark.parametrize("first", [True, False], ids=["made before", "made after"])
@pytest.mark.parametrize("own", [(), ("unet",), ("text_encoder",)], ids="-".join)
def test_a_pipeline_that_no_call_touched_knows_the_words_of_its_parts(tiny_pipe, own, first):
    early = sharing_pipeline(tiny_pipe, *own)
    plain, before = embed(early, "a mug"), [snapshot(pipe) for pipe in (tiny_pipe, early)]
    if own == ("text_encoder",):
        new = copy.deepcopy(tiny_pipe.text_encoder)
    several_vectors(tiny_pipe)
    expected = [embed(tiny_pipe, prompt) for prompt in WORD_PROMPTS]
    if first:
        other = early
    elif own == ("text_encoder",):
        other = type(tiny_pipe)(**tiny_pipe.components | {"text_encoder": new}, requires_safety_checker=False)
    else:
        other = StableDiffusionImg2ImgPipeline.from_pipe(tiny_pipe)
    for prompt, embedded in zip(WORD_PROMPTS, expected, strict=True):
        assert torch.equal(embed(other, prompt), embedded), prompt
    remove_placeholder_tokens(tiny_pipe, placeholder_tokens("mu", 2))
    assert torch.equal(embed(other, "a mug"), plain)
    for pipe, its_own in zip((tiny_pipe, early), before, strict=True):
        assert_unchanged(pipe, its_own)


def test_a_tokenizer_that_takes_a_word_of_its_text_encoder_apart_is_refused_once(tiny_pipe):
    other = sharing_pipeline(tiny_pipe, "tokenizer")
    before = snapshot(other)
    several_vectors(tiny_pipe)
    assert torch.equal(embed(other, "a red cat"), embed(tiny_pipe, "a red cat"))
    remove_placeholder_tokens(tiny_pipe, placeholder_tokens("mu", 2))
    several_vectors(tiny_pipe)
    with pytest.raises(UserError, match="did not know the trigger word 'mu' of its text encoder.*call again"):
        embed(other, ["a cat", "a mu cat"])
    for prompt in WORD_PROMPTS:
        assert torch.equal(embed(other, prompt), embed(tiny_pipe, prompt)), prompt
    remove_placeholder_tokens(other, placeholder_tokens("mu", 2))
    assert_unchanged(other, before)


def test_a_text_encoder_that_was_exchanged_learns_the_words_as_it_is_called(tiny_pipe):
    new = copy.deepcopy(tiny_pipe.text_encoder)
    before = copy.deepcopy(new.state_dict())
    several_vectors(tiny_pipe)
    expected = embed(tiny_pipe, "a mu mug")
    tiny_pipe.text_encoder = new
    assert torch.equal(embed(tiny_pipe, "a mu mug"), expected)
    remove_placeholder_tokens(tiny_pipe, placeholder_tokens("mu", 2))
    assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items())
    assert not new._forward_pre_hooks


def test_parts_of_pipelines_with_different_words_are_refused_together(tiny_pipe, pipe_template, concept_files):
    other = copy.deepcopy(pipe_template)
    atomdiff.load_atoms(tiny_pipe, concept_files["mug"], "mug")
    atomdiff.load_atoms(other, concept_files["cat"], "cat")
    mixed = type(other)(**{**other.components, "tokenizer": tiny_pipe.tokenizer}, requires_safety_checker=False)
    with pytest.raises(UserError, match="know different trigger words, 'zwx' and 'ohwx'"):
        atomdiff.load_atoms(mixed, concept_files["style"], "style")
