"""Trigger words come into a pipeline and leave it without a trace."""

import copy

import pytest
import torch

from atomdiff.errors import UserError
from atomdiff.trigger_words import (
    add_trigger_word,
    remove_trigger_word,
    set_trigger_embedding,
    token_id,
    trigger_words,
)


class TwoEncoders:
    """As much of a pipeline with two text encoders as trigger words see."""

    def __init__(self, pipe):
        self.text_encoder, self.tokenizer = pipe.text_encoder, pipe.tokenizer
        self.text_encoder_2, self.tokenizer_2 = copy.deepcopy(pipe.text_encoder), copy.deepcopy(pipe.tokenizer)
        self.unet = pipe.unet

    @property
    def components(self):
        return vars(self) | {"vae": None}


def state(pipe):
    table = pipe.text_encoder.get_input_embeddings()
    return {
        "tokenizer": pipe.tokenizer,
        "ids": pipe.tokenizer("a photo of sks ohwx mug").input_ids,
        "size": (len(pipe.tokenizer), table.num_embeddings, pipe.text_encoder.config.vocab_size),
        "parameter": id(table.weight),
        "table": table.weight.detach().clone(),
        "keys": list(pipe.text_encoder.state_dict()),
    }


def assert_same(now, before):
    assert now["tokenizer"] is before["tokenizer"] and torch.equal(now["table"], before["table"])
    assert {k: now[k] for k in ("ids", "size", "parameter", "keys")} == {
        k: before[k] for k in ("ids", "size", "parameter", "keys")
    }


def encoded(pipe, prompt):
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def test_a_known_word_keeps_its_id_and_gets_its_row_back(tiny_pipe):
    before, known = state(tiny_pipe), tiny_pipe.tokenizer.encode("sks", add_special_tokens=False)
    assert [add_trigger_word(tiny_pipe, "sks")] == known
    assert_same(state(tiny_pipe), before)
    set_trigger_embedding(tiny_pipe, "sks", {"text_encoder": torch.ones(32)})
    set_trigger_embedding(tiny_pipe, "sks", {"text_encoder": torch.full((32,), 2.0)})
    now = state(tiny_pipe)["table"]
    assert (now[known[0]] == 2).all() and (now != before["table"]).any(1).sum() == 1
    remove_trigger_word(tiny_pipe, "sks")
    assert_same(state(tiny_pipe), before)


def test_an_unknown_word_becomes_one_token_and_goes_again(tiny_pipe):
    before, plain = state(tiny_pipe), encoded(tiny_pipe, "a photo of a red mug")
    new = add_trigger_word(tiny_pipe, "ohwx")
    assert new == before["size"][0] == token_id(tiny_pipe, "ohwx")
    for prompt, count in (("a photo of ohwx mug", 1), ("ohwx, (ohwx)", 2), ("ohwxy mug", 0), ("a photo", 0)):
        assert tiny_pipe.tokenizer(prompt).input_ids.count(new) == count
    vector = torch.randn(32)
    set_trigger_embedding(tiny_pipe, "ohwx", {"text_encoder": vector})
    now = state(tiny_pipe)
    assert torch.equal(now["table"][new], vector) and torch.equal(now["table"][:new], before["table"])
    assert now["parameter"] == before["parameter"] and now["size"] == (new + 1,) * 3
    assert torch.equal(encoded(tiny_pipe, "a photo of a red mug"), plain)
    remove_trigger_word(tiny_pipe, "ohwx")
    assert_same(state(tiny_pipe), before)


def test_words_leave_in_any_order(tiny_pipe):
    before = state(tiny_pipe)
    vectors = {word: {"text_encoder": torch.randn(32)} for word in ("ohwx", "sks", "zwx", "<new-one>")}
    for word, vector in vectors.items():
        add_trigger_word(tiny_pipe, word)
        set_trigger_embedding(tiny_pipe, word, vector)
    for gone in ("ohwx", "<new-one>", "sks", "zwx"):
        remove_trigger_word(tiny_pipe, gone)
        for word in trigger_words(tiny_pipe):
            row = tiny_pipe.text_encoder.get_input_embeddings().weight[token_id(tiny_pipe, word)]
            assert torch.equal(row, vectors[word]["text_encoder"])
    assert_same(state(tiny_pipe), before)


def test_the_table_follows_the_dtype_and_comes_back_in_it(tiny_pipe):
    expected = state(tiny_pipe)["table"].half()
    for word in ("sks", "ohwx"):
        add_trigger_word(tiny_pipe, word)
        set_trigger_embedding(tiny_pipe, word, {"text_encoder": torch.randn(32)})
    tiny_pipe.text_encoder.half()
    for word in ("sks", "ohwx"):
        remove_trigger_word(tiny_pipe, word)
    assert torch.equal(state(tiny_pipe)["table"], expected)


def test_every_text_encoder_learns_the_word(tiny_pipe):
    pipe = TwoEncoders(tiny_pipe)
    pipe.tokenizer_2.add_tokens(["another"])
    pipe.text_encoder_2.resize_token_embeddings(len(pipe.tokenizer_2))
    first = add_trigger_word(pipe, "ohwx")
    assert token_id(pipe, "ohwx", "text_encoder_2") == first + 1
    set_trigger_embedding(pipe, "ohwx", {"text_encoder_2": torch.ones(32)})
    assert (pipe.text_encoder_2.get_input_embeddings().weight[first + 1] == 1).all()
    remove_trigger_word(pipe, "ohwx")
    assert len(pipe.text_encoder_2.get_input_embeddings().weight) == first + 1


def test_mistakes_are_named_and_change_nothing(tiny_pipe):
    before = state(tiny_pipe)
    for word in ("", "two words", " sks"):
        with pytest.raises(UserError, match="one word without blanks"):
            add_trigger_word(tiny_pipe, word)
    with pytest.raises(UserError, match="'sks' is not a trigger word yet"):
        set_trigger_embedding(tiny_pipe, "sks", {"text_encoder": torch.ones(32)})
    with pytest.raises(UserError, match="'sks' is not a trigger word; there are: none"):
        remove_trigger_word(tiny_pipe, "sks")
    with pytest.raises(UserError, match="'ohwx' is not one token of text_encoder"):
        token_id(tiny_pipe, "ohwx")
    add_trigger_word(tiny_pipe, "sks", owner="mug")
    with pytest.raises(UserError, match="'sks' is taken by 'mug'.*trigger_word="):
        add_trigger_word(tiny_pipe, "sks")
    with pytest.raises(UserError, match=r"shape \(31,\), but text_encoder takes \(32,\)"):
        set_trigger_embedding(tiny_pipe, "sks", {"text_encoder": torch.ones(31)})
    with pytest.raises(UserError, match="text_encoder_2, which this pipeline does not have"):
        set_trigger_embedding(tiny_pipe, "sks", {"text_encoder": torch.ones(32), "text_encoder_2": torch.ones(32)})
    assert_same(state(tiny_pipe), before)
