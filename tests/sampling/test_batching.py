"""Which concepts a prompt wears, and in what batches prompts are drawn."""

import json
import warnings
from pathlib import Path

import pytest
import torch

import atomdiff
from atomdiff.concepts.concept_file import DeltaFile, write_delta_file
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.sampling.batching import (
    Concept,
    Line,
    given_concept,
    in_order,
    pack,
    read_lines,
    share_of,
    warn_of_prompts,
)
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file


def write(folder, name, phrase="", word="sks", layer="unet.conv_in"):
    path = folder / f"{name}.atoms.safetensors"
    layers = {layer: {"atom_delta": torch.ones(9, 9), "atom_basis": torch.eye(9)}}
    tokens = {word: {"text_encoder": torch.ones(32)}} if word else {}
    config = atomdiff.AtomConfig(channel_block=1)
    write_delta_file(path, DeltaFile(config, layers, {layer: [1.0] * 9}, tokens, trigger_phrase=phrase))
    return str(path)


@pytest.fixture
def library(tmp_path):
    for name, phrase in (("ant", "sks ant"), ("bee", "sks bee"), ("pets/bee", "sks bee")):
        write(tmp_path, name, phrase)
    write(tmp_path, "style", "", word="")
    return ConceptLibrary(tmp_path)


def worn(line):
    return [(concept.name, strength.weight) for concept, strength in line.concepts]


def plain(kind, number, mixes=True):
    """An item of a kind such as "ab": it wears the concepts a and b."""
    return f"{kind}{number}", Line("", "", tuple((CONCEPTS[name, mixes], AdapterWeight()) for name in kind))


CONCEPTS = {
    (name, mixes): Concept(name, name, Path(__file__), (), read=(lambda: None) if mixes else None)
    for name in "abc"
    for mixes in (True, False)
}


def line_of(item):
    return item[1]


def names(batches):
    return [[name for name, _ in batch] for batch in batches]


# lines


def test_lines_wear_what_their_tags_name_and_what_all_wear(library, tmp_path):
    (tmp_path / "own").mkdir()
    own = [(given_concept(write(tmp_path / "own", "cat", "zwx cat", "zwx")), AdapterWeight(0.5))]
    prompts = ["a cat", "sks ant <atoms:ant:0.7>", "<atoms:style> sks bee <lora:pets/bee> <atoms:cat:0>"]
    lines = read_lines(prompts, own, library)
    assert [line.prompt for line in lines] == prompts and [line.text for line in lines] == [
        "a cat",
        "sks ant",
        "sks bee",
    ]
    assert worn(lines[0]) == [("cat", 0.5)]
    assert worn(lines[1]) == [("cat", 0.5), ("ant", 0.7)]
    assert worn(lines[2]) == [("cat", 0), ("style", 1), ("pets/bee", 1)]
    assert json.loads(lines[2].facts)[2] == {
        "file": "pets/bee.atoms.safetensors",
        "sha256": hash_file(tmp_path / "pets" / "bee.atoms.safetensors"),
        "weight": 1.0,
        "trigger_word": None,
    }
    assert read_lines(["a"])[0].facts == "[]"


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
        ("sks ant and sks cat <atoms:ant> <atoms:bee>", r"by its own phrase \('sks ant', 'sks bee'\)"),
    ],
)
def test_lines_that_cannot_be_drawn_are_refused(library, prompt, message):
    with pytest.raises(UserError, match=message):
        read_lines([prompt], library=library)


def test_tags_without_a_library_and_of_two_names_are_refused(tmp_path):
    own = [(given_concept(write(tmp_path, "cat")), AdapterWeight())]
    with pytest.raises(UserError, match="no library and the concepts given are: 'cat'; give --library"):
        read_lines(["a <atoms:mug>"], own)
    with pytest.raises(UserError, match="no library and no concepts are given"):
        read_lines(["a <atoms:mug>"])
    with pytest.raises(UserError, match="2 concepts given are called so"):
        read_lines(["a <atoms:cat>"], own * 2)


def test_two_concepts_of_one_word_are_told_apart_by_their_phrases(library):
    (line,) = read_lines(["Sks ant on a sks bee <atoms:ant> <atoms:bee>"], library=library)
    ant, bee = (concept for concept, _ in line.concepts)
    assert line.spell(line.text, {ant: {"sks": "X"}, bee: {"sks": "Y"}}) == "X ant on a Y bee"
    (line,) = read_lines(["sks ant in sks <atoms:ant> <atoms:style>"], library=library)
    ant, style = (concept for concept, _ in line.concepts)
    assert line.spell(line.text, {ant: {"sks": "X"}, style: {}}) == "X ant in X"
    read_lines(["an ant <atoms:bee> <atoms:pets/bee>"], library=library)  # says neither


def test_a_given_concept_may_be_called_otherwise(tmp_path):
    path = write(tmp_path, "cat", "sks cat")
    concept = given_concept(path, "zwx")
    assert (concept.name, concept.file, concept.words, concept.phrase) == (
        "cat",
        "cat.atoms.safetensors",
        ("zwx",),
        "zwx cat",
    )
    assert list(concept.read().tokens) == ["zwx"]
    own = [
        (given_concept(path), AdapterWeight()),
        (given_concept(write(tmp_path, "dog", "sks dog"), "zwx"), AdapterWeight()),
    ]
    (line,) = read_lines(["sks and zwx"], own)
    assert line.spell("sks, zwx", {own[0][0]: {"sks": "X"}, own[1][0]: {"zwx": "Y"}}) == "X , Y"
    with pytest.raises(UserError, match="renames one word, but the concept has 0"):
        given_concept(write(tmp_path, "style", word=""), "zwx")


def test_a_given_concept_may_be_on_the_hub(tmp_path, monkeypatch):
    from atomdiff.concepts import hub

    path = write(tmp_path, "best", "sks cat")
    monkeypatch.setattr(hub, "locate", lambda source: (Path(path), "best.atoms.safetensors"))
    concept = given_concept("someone/cat")
    assert (concept.name, concept.file, concept.path) == ("best", "cat", Path(path))


# warnings


def test_a_concept_that_no_word_calls_is_told_once(tiny_pipe, library):
    prompts = ["a bee <atoms:bee>", "bees <atoms:bee>", "a <atoms:ant:0>", "sks ant <atoms:ant>", "b <atoms:style>"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_prompts(tiny_pipe, read_lines(prompts, library=library))
    (warning,) = told
    assert "'a bee <atoms:bee>' wears 'bee', but does not say 'sks bee'" in str(warning.message)


def test_concepts_that_all_lines_wear_need_no_word(tiny_pipe, tmp_path, recwarn):
    own = [(given_concept(write(tmp_path, "cat")), AdapterWeight())]
    warn_of_prompts(tiny_pipe, read_lines(["a cat"], own))
    assert not recwarn


def test_a_word_counts_as_one_token_and_tags_as_none(tiny_pipe, tmp_path, recwarn):
    write(tmp_path, "cat", word="qwertyuiop")
    text = "qwertyuiop " * 75  # and the two around them
    lines = read_lines([text + "<atoms:cat>", text + "mug <atoms:cat>"], library=ConceptLibrary(tmp_path))
    warn_of_prompts(tiny_pipe, lines[:1])
    assert not recwarn
    with pytest.warns(UserWarning, match="77 of the 78 tokens"):
        warn_of_prompts(tiny_pipe, lines)


# batches


def test_items_alike_share_batches_and_what_is_left_is_mixed():
    kinds = ["a", "b", "", "a", "ab", "a", "", "a", "c", "", "a"]
    items = in_order([plain(kind, number) for number, kind in enumerate(kinds)], line_of)
    assert [name for name, _ in items] == ["2", "6", "9", "a0", "a3", "a5", "a7", "a10", "ab4", "b1", "c8"]
    assert names(pack(items, line_of, 3)) == [
        ["2", "6", "9"],
        ["a0", "a3", "a5"],
        ["a7", "a10", "ab4"],
        ["b1", "c8"],
    ]
    assert names(pack(items, line_of, 2)) == [
        ["2", "6"],
        ["a0", "a3"],
        ["a5", "a7"],
        ["9", "a10"],
        ["ab4", "b1"],
        ["c8"],
    ]
    assert pack([], line_of, 2) == []


def test_other_weights_are_another_kind():
    lines = [Line("", "", ((CONCEPTS["a", True], AdapterWeight(weight)),)) for weight in (1.0, 0.5, 1.0, 0.5)]
    items = in_order(list(zip("abcd", lines, strict=True)), line_of)
    assert names(pack(items, line_of, 2)) == [["a", "c"], ["b", "d"]]


def test_a_job_of_one_kind_stays_in_its_order():
    items = [plain("a", number) for number in (3, 1, 2, 0, 4)]
    assert in_order(items, line_of) == items
    assert names(pack(items, line_of, 2)) == [["a3", "a1"], ["a2", "a0"], ["a4"]]


def test_other_methods_are_never_mixed():
    items = [plain("a", 0, False), plain("a", 1, False), plain("a", 2, False), plain("b", 3, False), plain("c", 4)]
    assert names(pack(items, line_of, 2)) == [["a0", "a1"], ["a2"], ["b3"], ["c4"]]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_all_items_evenly(processes):
    shares = [share_of(list(range(5)), process, processes) for process in range(processes)]
    assert [item for share in shares for item in share] == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
