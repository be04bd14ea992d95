"""Which concepts a prompt uses."""

import json
import warnings
from pathlib import Path

import pytest
import torch

import atomdiff
from atomdiff.concepts.concept_file import ConceptFile, write_concept_file
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.sampling.concept_source import open_source
from atomdiff.sampling.prompt_requests import read_requests, warn_about_prompts
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file


def write(folder, name, phrase="", word="sks", layer="unet.conv_in"):
    path = folder / f"{name}.atoms.safetensors"
    layers = {layer: {"atom_delta": torch.ones(9, 9), "atom_basis": torch.eye(9)}}
    tokens = {word: {"text_encoder": torch.ones(32)}} if word else {}
    config = atomdiff.AtomConfig(channel_block=1)
    write_concept_file(path, ConceptFile(config, layers, {layer: [1.0] * 9}, tokens, trigger_phrase=phrase))
    return str(path)


@pytest.fixture
def library(tmp_path):
    for name, phrase in (("ant", "sks ant"), ("bee", "sks bee"), ("pets/bee", "sks bee")):
        write(tmp_path, name, phrase)
    write(tmp_path, "style", "", word="")
    return ConceptLibrary(tmp_path)


def used(line):
    return [(concept.name, weight.weight) for concept, weight in line.concepts]


def test_lines_use_what_their_tags_name_and_what_all_use(library, tmp_path):
    (tmp_path / "own").mkdir()
    own = [(open_source(write(tmp_path / "own", "cat", "zwx cat", "zwx")), AdapterWeight(0.5))]
    prompts = ["a cat", "sks ant <atoms:ant:0.7>", "<atoms:style> sks bee <lora:pets/bee> <atoms:cat:0>"]
    lines = read_requests(prompts, own, library)
    assert [line.prompt for line in lines] == prompts and [line.text for line in lines] == [
        "a cat",
        "sks ant",
        "sks bee",
    ]
    assert used(lines[0]) == [("cat", 0.5)]
    assert used(lines[1]) == [("cat", 0.5), ("ant", 0.7)]
    assert used(lines[2]) == [("cat", 0), ("style", 1), ("pets/bee", 1)]
    assert json.loads(lines[2].concepts_json)[2] == {
        "file": "pets/bee.atoms.safetensors",
        "sha256": hash_file(tmp_path / "pets" / "bee.atoms.safetensors"),
        "weight": 1.0,
        "trigger_word": None,
    }
    assert read_requests(["a"])[0].concepts_json == "[]"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <atoms:ants>", r"no concept 'ants' among the 4 in .*; near: ant"),
        ("a <atoms:pets/be>", "near: pets/bee"),
        ("a <atoms:ant:much>", "much"),
        (
            'a <atoms:ant:{"blocks": {"down": 0}}>',
            "'ant' has no layer in 'down_blocks'; it has layers in: unet.conv_in",
        ),
        ("sks and sks <atoms:bee> <atoms:pets/bee>", r"'sks', the trigger word of 'bee' and 'pets/bee'.*\('sks bee'\)"),
        ("sks ant and sks cat <atoms:ant> <atoms:bee>", r"the phrase of each \('sks ant', 'sks bee'\)"),
    ],
)
def test_lines_that_cannot_be_generated_are_refused(library, prompt, message):
    with pytest.raises(UserError, match=message):
        read_requests([prompt], library=library)


def test_tags_without_a_library_and_of_two_names_are_refused(tmp_path):
    own = [(open_source(write(tmp_path, "cat")), AdapterWeight())]
    with pytest.raises(UserError, match="--concepts has 'cat' and no library; give --library"):
        read_requests(["a <atoms:mug>"], own)
    with pytest.raises(UserError, match="there are no --concepts and no library"):
        read_requests(["a <atoms:mug>"])
    with pytest.raises(UserError, match="2 of --concepts have that name"):
        read_requests(["a <atoms:cat>"], own * 2)


def test_two_concepts_of_one_word_are_told_apart_by_their_phrases(library):
    (line,) = read_requests(["Sks ant on a sks bee <atoms:ant> <atoms:bee>"], library=library)
    ant, bee = (concept for concept, _ in line.concepts)
    assert line.replace_trigger_words(line.text, {ant: {"sks": "X"}, bee: {"sks": "Y"}}) == "X ant on a Y bee"
    (line,) = read_requests(["sks ant in sks <atoms:ant> <atoms:style>"], library=library)
    ant, style = (concept for concept, _ in line.concepts)
    assert line.replace_trigger_words(line.text, {ant: {"sks": "X"}, style: {}}) == "X ant in X"
    read_requests(["an ant <atoms:bee> <atoms:pets/bee>"], library=library)  # says neither


def test_a_given_concept_may_be_called_otherwise(tmp_path):
    path = write(tmp_path, "cat", "sks cat")
    concept = open_source(path, "zwx")
    assert (concept.name, concept.file, concept.trigger_words, concept.trigger_phrase) == (
        "cat",
        "cat.atoms.safetensors",
        ("zwx",),
        "zwx cat",
    )
    assert list(concept.read().tokens) == ["zwx"]
    own = [
        (open_source(path), AdapterWeight()),
        (open_source(write(tmp_path, "dog", "sks dog"), "zwx"), AdapterWeight()),
    ]
    (line,) = read_requests(["sks and zwx"], own)
    assert line.replace_trigger_words("sks, zwx", {own[0][0]: {"sks": "X"}, own[1][0]: {"zwx": "Y"}}) == "X , Y"
    with pytest.raises(UserError, match="renames one word, but the concept has 0"):
        open_source(write(tmp_path, "style", word=""), "zwx")


def test_a_given_concept_may_be_on_the_hub(tmp_path, monkeypatch):
    from atomdiff.concepts import hub

    path = write(tmp_path, "best", "sks cat")
    monkeypatch.setattr(hub, "locate", lambda source, **_: (Path(path), "best.atoms.safetensors"))
    concept = open_source("someone/cat")
    assert (concept.name, concept.file, concept.path) == ("best", "cat", Path(path))


# warnings


def test_a_concept_that_no_word_calls_is_reported_once(tiny_pipe, library, user_warnings):
    prompts = ["a bee <atoms:bee>", "bees <atoms:bee>", "a <atoms:ant:0>", "sks ant <atoms:ant>", "b <atoms:style>"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_about_prompts(tiny_pipe, read_requests(prompts, library=library))
    (warning,) = user_warnings(caught)
    assert "'a bee <atoms:bee>' uses 'bee' without its trigger phrase 'sks bee'" in str(warning.message)


def test_concepts_that_all_lines_use_need_no_word(tiny_pipe, tmp_path, recwarn, user_warnings):
    own = [(open_source(write(tmp_path, "cat")), AdapterWeight())]
    warn_about_prompts(tiny_pipe, read_requests(["a cat"], own))
    assert not user_warnings(recwarn)


def test_a_word_counts_as_one_token_and_tags_as_none(tiny_pipe, tmp_path, recwarn, user_warnings):
    write(tmp_path, "cat", word="qwertyuiop")
    text = "qwertyuiop " * 75  # and the two around them
    lines = read_requests([text + "<atoms:cat>", text + "mug <atoms:cat>"], library=ConceptLibrary(tmp_path))
    warn_about_prompts(tiny_pipe, lines[:1])
    assert not user_warnings(recwarn)
    with pytest.warns(UserWarning, match="77 of the 78 tokens"):
        warn_about_prompts(tiny_pipe, lines)
