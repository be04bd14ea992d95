"""Tags in prompts and words in texts."""

import re

import pytest

from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.prompt_syntax import has_word, replace_words, set_tag, split_tags, weight_as_json
from atomdiff.utils.errors import UserError


@pytest.mark.parametrize(
    ("prompt", "text", "concepts"),
    [
        ("a  photo of sks mug", "a  photo of sks mug", {}),  # as it was written
        ("a photo of sks mug <atoms:mug>", "a photo of sks mug", {"mug": 1}),
        ("<lora:pets/cat 2:0.8> a <ATOMS:mug:-.5>, red", "a , red", {"pets/cat 2": 0.8, "mug": -0.5}),
        ("a<atoms: mug : 1e-1 >", "a", {"mug": 0.1}),
        ("a < b <b> <hypernet:x:1>", "a < b <b> <hypernet:x:1>", {}),
    ],
)
def test_tags_are_taken_out_of_the_text(prompt, text, concepts):
    left, found = split_tags(prompt)
    assert left == text
    assert list(found) == list(concepts) and {name: s.weight for name, s in found.items()} == concepts


def test_a_tag_has_a_weight_as_json():
    text, found = split_tags('a <atoms:mug:{"weight": 2, "blocks": {"down": 0.5}, "steps": {"0": 1, "1": 0.2}}> b')
    assert text == "a b"
    assert found == {"mug": AdapterWeight(2, {"down": 0.5}, {0: 1, 1: 0.2})}
    assert split_tags('a <atoms:mug:{"keep": 0.5}>') == ("a", {"mug": AdapterWeight(keep=0.5)})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <atoms:mug:x>", "'<atoms:mug:x>' in the prompt 'a <atoms:mug:x>'.*<atoms:NAME:0.8>"),
        ("a <atoms:mug:>", "<atoms:NAME:0.8>"),
        ("a <lora:mug:0.5:0.7>", "0.5:0.7.*<atoms:NAME:0.8>"),
        ("a <atoms:mug:nan>", "finite"),
        ('a <atoms:mug:{"blocks": 1}>', "blocks"),
        ('a <atoms:mug:{"blocks": }>', "<atoms:NAME:0.8>"),
        ("a <atoms:>", "names no concept"),
        ("a <atoms: :1>", "names no concept"),
        ("a <atoms:mug> <lora:mug:2>", "two tags for 'mug'"),
        ("a <atoms:mug", "does not end"),
        ("a <atoms:mug <atoms:cat>", "does not end"),
        ("a mug \ud83d", "the prompt 'a mug .*: found .*, which is no character; expected text"),
    ],
)
def test_bad_tags_are_refused(prompt, message):
    with pytest.raises(UserError, match=message):
        split_tags(prompt)


def test_names_are_the_same_in_every_form_of_unicode():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert split_tags(f"a <atoms:{decomposed}:0.5>")[1] == {composed: AdapterWeight(0.5)}
    assert set_tag(f"a <atoms:{decomposed}:0.5>", composed, None) == "a"


def test_equal_weights_are_described_alike():
    assert weight_as_json(AdapterWeight.read({"weight": 0.8})) == weight_as_json(AdapterWeight(0.8)) == 0.8
    assert repr(weight_as_json(AdapterWeight(1))) == "1.0"
    assert weight_as_json(AdapterWeight(keep=0.5)) == {"weight": 1.0, "keep": 0.5}
    one = {"blocks": {"up.1": 0, "down": 1}, "steps": {"1": 0, "0": 1}}
    other = {"weight": 1.0, "steps": {0: 1.0, 1.0: 0}, "blocks": {"down": 1.0, "up_blocks.1": 0.0}}
    assert repr(weight_as_json(AdapterWeight.read(one))) == repr(weight_as_json(AdapterWeight.read(other)))
    assert weight_as_json(AdapterWeight.read(one)) == {
        "weight": 1.0,
        "blocks": {"down_blocks": 1.0, "up_blocks.1": 0.0},
        "steps": {"0.0": 1.0, "1.0": 0.0},
    }


@pytest.mark.parametrize(
    ("text", "replaced"),
    [
        ("a sks  mug", "a Y"),
        ("a sks cat", "a X cat"),
        ("SKS, sks's sks2 (sks)", "X , X 's X 2 ( X )"),
        ("a  task in sksland", "a  task in sksland"),
        ("sks Mug and sks\tmug, sks mugs", "Y and Y , X mugs"),
        ("<s1> s1 s12", "Z W s12"),
    ],
)
def test_words_are_replaced_where_clip_sees_them(text, replaced):
    assert replace_words(text, {"sks": "X", "sks mug": "Y", "<s1>": "Z", "s1": "W"}) == replaced
    assert replace_words(text, {}) == text


def test_the_tokens_are_those_of_the_word_alone(tiny_pipe):
    """What `replace_words` takes for the word is what the tokenizer takes for it."""
    word = tiny_pipe.tokenizer.encode("sks", add_special_tokens=False)[0]
    for text in ("a sks mug", "sks's", "SKS,sks", "sks2 2sks", "sks-mug sks_mug"):
        tokens = tiny_pipe.tokenizer.encode(text, add_special_tokens=False)
        assert tokens.count(word) == len(re.findall("X", replace_words(text, {"sks": "X"}))), text


def test_words_are_found_as_they_are_replaced():
    assert has_word("one SKS, two", "sks") and not has_word("asks", "sks")
    assert has_word("a sks  mug", "sks mug") and not has_word("a sks mugs", "sks mug") and not has_word("", "sks")


def test_a_tag_is_set_added_and_removed_where_it_stands():
    prompt = "a < lora: mug :0.3> on <atoms:cat>, red"
    assert set_tag(prompt, "mug", 0.5) == "a <atoms:mug:0.5> on <atoms:cat>, red"
    assert set_tag(prompt, "cat", {"keep": 0.5}) == 'a < lora: mug :0.3> on <atoms:cat:{"keep": 0.5}>, red'
    assert set_tag(prompt, "dog", 1) == f"{prompt} <atoms:dog:1>"
    assert set_tag(prompt, "mug", None) == "a on <atoms:cat>, red"
    assert set_tag(prompt, "dog", None) == prompt and set_tag("", "mug", 1) == "<atoms:mug:1>"
