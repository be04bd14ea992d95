"""Trigger words come into a pipeline and leave it without a trace."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import atomdiff
from atomdiff.pipelines import embedding_tables
from atomdiff.pipelines.placeholder_tokens import (
    add_placeholder_token,
    add_placeholder_tokens,
    remove_placeholder_tokens,
    set_token_embedding,
    token_id,
    tokens_in,
)
from atomdiff.pipelines.prompt_syntax import replace_words
from atomdiff.pipelines.token_names import placeholder_tokens
from atomdiff.utils.errors import UserError


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


def pieces(pipe, prompt):
    """A prompt as the text encoder gets it."""
    ids = pipe.tokenizer(pipe.maybe_convert_prompt(prompt, pipe.tokenizer)).input_ids[1:-1]
    return " ".join(pipe.tokenizer.convert_ids_to_tokens(ids)).replace("</w>", "")


def test_a_known_word_keeps_its_id_and_gets_its_row_back(tiny_pipe):
    before, known = state(tiny_pipe), tiny_pipe.tokenizer.encode("sks", add_special_tokens=False)
    assert [add_placeholder_token(tiny_pipe, "sks")] == known
    assert_same(state(tiny_pipe), before)
    set_token_embedding(tiny_pipe, "sks", {"text_encoder": torch.ones(32)})
    set_token_embedding(tiny_pipe, "sks", {"text_encoder": torch.full((32,), 2.0)})
    now = state(tiny_pipe)["table"]
    assert (now[known[0]] == 2).all() and (now != before["table"]).any(1).sum() == 1
    remove_placeholder_tokens(tiny_pipe, ["sks"])
    assert_same(state(tiny_pipe), before)


def test_an_unknown_word_becomes_one_token_and_goes_again(tiny_pipe):
    before, plain = state(tiny_pipe), encoded(tiny_pipe, "a photo of a red mug")
    new = add_placeholder_token(tiny_pipe, "ohwx")
    assert new == before["size"][0] == token_id(tiny_pipe, "ohwx")
    for prompt, count in (("a photo of ohwx mug", 1), ("ohwx, (ohwx)", 2), ("ohwxy mug", 0), ("a photo", 0)):
        assert tiny_pipe.tokenizer(prompt).input_ids.count(new) == count
    vector = torch.randn(32)
    set_token_embedding(tiny_pipe, "ohwx", {"text_encoder": vector})
    now = state(tiny_pipe)
    assert torch.equal(now["table"][new], vector) and torch.equal(now["table"][:new], before["table"])
    assert now["parameter"] == before["parameter"] and now["size"] == (new + 1,) * 3
    assert torch.equal(encoded(tiny_pipe, "a photo of a red mug"), plain)
    remove_placeholder_tokens(tiny_pipe, ["ohwx"])
    assert_same(state(tiny_pipe), before)


def test_words_leave_in_any_order(tiny_pipe):
    before = state(tiny_pipe)
    vectors = {word: {"text_encoder": torch.randn(32)} for word in ("ohwx", "sks", "zwx", "<new-one>")}
    for word, vector in vectors.items():
        add_placeholder_token(tiny_pipe, word)
        set_token_embedding(tiny_pipe, word, vector)
    for gone in ("ohwx", "<new-one>", "sks", "zwx"):
        remove_placeholder_tokens(tiny_pipe, [gone])
        for word in tokens_in(tiny_pipe):
            row = tiny_pipe.text_encoder.get_input_embeddings().weight[token_id(tiny_pipe, word)]
            assert torch.equal(row, vectors[word]["text_encoder"])
    assert_same(state(tiny_pipe), before)


def test_the_table_follows_the_dtype_and_comes_back_in_it(tiny_pipe):
    expected = state(tiny_pipe)["table"].half()
    for word in ("sks", "ohwx"):
        add_placeholder_token(tiny_pipe, word)
        set_token_embedding(tiny_pipe, word, {"text_encoder": torch.randn(32)})
    tiny_pipe.text_encoder.half()
    for word in ("sks", "ohwx"):
        remove_placeholder_tokens(tiny_pipe, [word])
    assert torch.equal(state(tiny_pipe)["table"], expected)


def test_every_text_encoder_learns_the_word(tiny_pipe):
    pipe = TwoEncoders(tiny_pipe)
    pipe.tokenizer_2.add_tokens(["another"])
    pipe.text_encoder_2.resize_token_embeddings(len(pipe.tokenizer_2))
    first = add_placeholder_token(pipe, "ohwx")
    assert token_id(pipe, "ohwx", "text_encoder_2") == first + 1
    set_token_embedding(pipe, "ohwx", {"text_encoder_2": torch.ones(32)})
    assert (pipe.text_encoder_2.get_input_embeddings().weight[first + 1] == 1).all()
    remove_placeholder_tokens(pipe, ["ohwx"])
    assert len(pipe.text_encoder_2.get_input_embeddings().weight) == first + 1


@pytest.mark.slow
def test_many_words_come_and_go_with_one_copy_of_the_table(tiny_pipe, tmp_path, monkeypatch):
    before = state(tiny_pipe)
    words = {f"<new-{number}>": {"text_encoder": torch.full((32,), float(number))} for number in range(30)}
    sizes = []
    monkeypatch.setattr(
        "atomdiff.pipelines.embedding_tables.resize_table",
        lambda model, size, real=embedding_tables.resize_table: (sizes.append(size), real(model, size)),
    )
    add_placeholder_tokens(tiny_pipe, words)
    for word, vectors in words.items():
        set_token_embedding(tiny_pipe, word, vectors)
    old = before["size"][0]
    assert sizes == [old + 30] and [token_id(tiny_pipe, word) for word in words] == list(range(old, old + 30))
    saved = atomdiff.save_atoms(tiny_pipe, tmp_path / "words.atoms.safetensors")
    sizes.clear()
    remove_placeholder_tokens(tiny_pipe, [word for word in words if word != "<new-7>"])
    assert sizes == [old, old + 1]
    assert (tiny_pipe.text_encoder.get_input_embeddings().weight[token_id(tiny_pipe, "<new-7>")] == 7).all()
    atomdiff.unload_atoms(tiny_pipe)
    assert_same(state(tiny_pipe), before)
    sizes.clear()
    atomdiff.load_atoms(tiny_pipe, saved)
    atomdiff.unload_atoms(tiny_pipe, "words")
    assert sizes == [old + 30, old]
    assert_same(state(tiny_pipe), before)


def test_nothing_changes_if_one_of_several_words_is_wrong(tiny_pipe):
    before = state(tiny_pipe)
    with pytest.raises(UserError, match="'two words' cannot be a trigger word"):
        add_placeholder_tokens(tiny_pipe, ["ohwx", "two words"])
    assert_same(state(tiny_pipe), before)
    add_placeholder_tokens(tiny_pipe, ["ohwx", "zwx"])
    now = state(tiny_pipe)
    with pytest.raises(UserError, match="'sks' is not a trigger word; there are: ohwx, zwx"):
        remove_placeholder_tokens(tiny_pipe, ["ohwx", "sks"])
    assert_same(state(tiny_pipe), now)
    remove_placeholder_tokens(tiny_pipe, [])
    assert_same(state(tiny_pipe), now)


def test_special_tokens_are_no_trigger_words(tiny_pipe, tmp_path):
    before = state(tiny_pipe)
    for word in ("<|endoftext|>", "<|startoftext|>"):
        with pytest.raises(UserError, match="special token of text_encoder, in every prompt; load with trigger_word="):
            add_placeholder_token(tiny_pipe, word)
    add_placeholder_token(tiny_pipe, "ohwx")
    set_token_embedding(tiny_pipe, "ohwx", {"text_encoder": torch.ones(32)})
    saved = atomdiff.save_atoms(tiny_pipe, tmp_path / "word.atoms.safetensors")
    atomdiff.unload_atoms(tiny_pipe)
    save_file({"token.<|endoftext|>": torch.ones(32)}, saved, safe_open(saved, "pt").metadata())
    with pytest.raises(UserError, match="special token of text_encoder"):
        atomdiff.load_atoms(tiny_pipe, saved)
    assert_same(state(tiny_pipe), before)
    atomdiff.load_atoms(tiny_pipe, saved, trigger_word="sks")


def test_the_special_tokens_of_every_tokenizer_count(tiny_pipe):
    pipe = TwoEncoders(tiny_pipe)
    pipe.tokenizer_2.pad_token = "!"  # as OpenCLIP pads
    with pytest.raises(UserError, match="'!' cannot be a trigger word: it is a special token of text_encoder_2"):
        add_placeholder_token(pipe, "!")
    add_placeholder_token(tiny_pipe, "!")


@pytest.mark.parametrize("word", ["sks", "ohwx", "cat"])
def test_a_word_of_several_vectors_comes_and_goes(tiny_pipe, word):
    before, plain = state(tiny_pipe), encoded(tiny_pipe, f"a {word} cat")
    words = placeholder_tokens(word, 3)
    add_placeholder_tokens(tiny_pipe, [*words, "zwx"], owner="mug")
    for number, each in enumerate(words):
        set_token_embedding(tiny_pipe, each, {"text_encoder": torch.full((32,), number + 1.0)})
    prompt = tiny_pipe.maybe_convert_prompt(f"a {word}, sks", tiny_pipe.tokenizer)
    ids = tiny_pipe.tokenizer(prompt).input_ids
    expected = [token_id(tiny_pipe, each) for each in words]
    assert len(set(expected)) == 3 and any(ids[start : start + 3] == expected for start in range(len(ids)))
    shown = encoded(tiny_pipe, f"a {word} cat")
    assert not torch.allclose(shown, plain, atol=1e-3)

    remove_placeholder_tokens(tiny_pipe, ["zwx"])
    assert torch.equal(encoded(tiny_pipe, f"a {word} cat"), shown)
    remove_placeholder_tokens(tiny_pipe, words)
    assert_same(state(tiny_pipe), before)
    assert torch.equal(encoded(tiny_pipe, f"a {word} cat"), plain)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("word", ["mu", "Ohwx", "<mu>"])
def test_added_words_count_in_any_case_but_not_within_others(tiny_pipe, word, count):
    within = f"x{word} {word}x" if word.isalpha() else f"x{word} {word}x {word}5 {word}_x"
    plain = {prompt: encoded(tiny_pipe, prompt) for prompt in ("a mug", within)}
    words = placeholder_tokens(word, count)
    add_placeholder_tokens(tiny_pipe, words)
    for number, each in enumerate(words):
        set_token_embedding(tiny_pipe, each, {"text_encoder": torch.full((32,), number + 1.0)})
    expected = [token_id(tiny_pipe, each) for each in words]

    def tokens(prompt):
        return tiny_pipe.tokenizer(tiny_pipe.maybe_convert_prompt(prompt, tiny_pipe.tokenizer)).input_ids[1:-1]

    a, mug, comma = (tiny_pipe.tokenizer(each).input_ids[1] for each in ("a", "mug", ","))
    for spelt in (word, word.upper(), word.lower()):
        assert tokens(f"a {spelt} mug, {spelt}, mug") == [a, *expected, mug, comma, *expected, comma, mug]
        assert torch.equal(encoded(tiny_pipe, f"a {spelt} mug"), encoded(tiny_pipe, f"a {word} mug"))
    assert tiny_pipe.maybe_convert_prompt([f"a {word}", "", "a mug"], tiny_pipe.tokenizer)[1:] == ["", "a mug"]
    assert all(torch.equal(encoded(tiny_pipe, prompt), before) for prompt, before in plain.items())
    remove_placeholder_tokens(tiny_pipe, words)
    assert not {"_encode_plus", "tokenize"} & vars(tiny_pipe.tokenizer).keys()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("word", ["sks", "ohwx", "Ohwx", "s1", "<s1>"])
def test_words_are_where_sampling_replaces_them(tiny_pipe, word, count):
    words, tokenizer = placeholder_tokens(word, count), tiny_pipe.tokenizer
    add_placeholder_tokens(tiny_pipe, words)
    for text in ("X, x's mug", "X2 2X", "X_mug mug_X", "(X)-X", "Xx", "a\tX X"):
        text = text.replace("X", word)
        written = tiny_pipe.maybe_convert_prompt(text, tokenizer)
        replaced = replace_words(text, {word: " ".join(words)})
        assert tiny_pipe.tokenizer(written).input_ids == tiny_pipe.tokenizer(replaced).input_ids, text
        ids, found = tiny_pipe.tokenizer(written).input_ids, replace_words(text, {word: "!"}).count("!")
        assert [ids.count(token_id(tiny_pipe, each)) for each in words] == [found] * count, text


@pytest.mark.parametrize("words", [["mug"], ["mug", "mug_1"], ["style"], ["style", "style_1"]])
def test_words_do_not_count_within_textual_inversions(tiny_pipe, words):
    tiny_pipe.load_textual_inversion(torch.randn(2, 32), token="<mug-style>")
    expected = encoded(tiny_pipe, "a cat <mug-style>"), encoded(tiny_pipe, "a <MUG-STYLE> cat")
    add_placeholder_tokens(tiny_pipe, words)
    for each in words:
        set_token_embedding(tiny_pipe, each, {"text_encoder": torch.randn(32)})
    assert torch.equal(encoded(tiny_pipe, "a cat <mug-style>"), expected[0])
    assert torch.equal(encoded(tiny_pipe, "a <MUG-STYLE> cat"), expected[1])
    assert pieces(tiny_pipe, f"a {words[0]}, <mug-style>") == f"a {' '.join(words)} , <mug-style> <mug-style>_1"


def test_textual_inversions_that_came_after_words_stay(tiny_pipe):
    before = state(tiny_pipe)
    for word, inversion in (("ohwx", "<first>"), ("zwx", "<second>")):
        add_placeholder_token(tiny_pipe, word)
        set_token_embedding(tiny_pipe, word, {"text_encoder": torch.randn(32)})
        tiny_pipe.load_textual_inversion(torch.randn(2, 32), token=inversion)
    prompts = {each: encoded(tiny_pipe, f"a {each} cat") for each in ("zwx", "<first>", "<second>", "sks")}
    remove_placeholder_tokens(tiny_pipe, ["ohwx"])
    assert all(torch.equal(encoded(tiny_pipe, f"a {each} cat"), shown) for each, shown in prompts.items())
    remove_placeholder_tokens(tiny_pipe, ["zwx"])
    del prompts["zwx"]
    assert all(torch.equal(encoded(tiny_pipe, f"a {each} cat"), shown) for each, shown in prompts.items())
    now = state(tiny_pipe)
    assert now["size"] == tuple(size + 4 for size in before["size"]) and now["tokenizer"] is before["tokenizer"]
    assert torch.equal(now["table"][:-4], before["table"])


def test_words_stand_for_the_vectors_that_came_with_them(tiny_pipe):
    def written(prompt):
        return pieces(tiny_pipe, prompt)

    add_placeholder_tokens(tiny_pipe, ["sks", "sks_1", "sks_2"], owner="first")
    add_placeholder_tokens(tiny_pipe, ["sks_3"], owner="second")
    assert written("a sks mug") == "a sks sks_1 sks_2 mug" and written("a sks_3 mug") == "a sks_3 mug"
    assert written("a sks sks_1 sks_2 mug") == "a sks sks_1 sks_2 mug"  # as diffusers or a user wrote it out
    remove_placeholder_tokens(tiny_pipe, ["sks_3"])
    assert written("a sks mug") == "a sks sks_1 sks_2 mug"
    remove_placeholder_tokens(tiny_pipe, ["sks_2"])
    add_placeholder_tokens(tiny_pipe, ["sks_2"], owner="second")
    assert written("a sks mug") == "a sks sks_1 mug"


def test_diffusers_own_words_of_several_vectors_stay(tiny_pipe):
    tiny_pipe.load_textual_inversion(torch.randn(2, 32), token="<cat>")
    add_placeholder_tokens(tiny_pipe, ["mu", "mu_1"])
    now = pieces(tiny_pipe, "a <cat> and mu mug, <cat> mug")
    assert now == "a <cat> <cat>_1 a n d mu mu_1 mug , <cat> <cat>_1 mug".replace("a n d", pieces(tiny_pipe, "and"))


def test_pieces_of_other_words_are_not_added(tiny_pipe, tmp_path, monkeypatch):
    before = state(tiny_pipe)
    for word, words in (("tea", ["ohwx", "tea"]), ("m", ["m", "m_1"])):  # a piece of teapot, and of any word with an m
        with pytest.raises(UserError, match=f"'{word}' cannot be a trigger word.*builds other words from it"):
            add_placeholder_tokens(tiny_pipe, words)
        assert_same(state(tiny_pipe), before)
    add_placeholder_tokens(tiny_pipe, ["ohwx"])
    set_token_embedding(tiny_pipe, "ohwx", {"text_encoder": torch.ones(32)})
    saved = atomdiff.save_atoms(tiny_pipe, tmp_path / "word.atoms.safetensors")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="^'tea' cannot be a trigger word"):
        patch.setattr(
            "atomdiff.pipelines.load.attach.rollback_on_error", None
        )  # it is refused before layers are attached
        atomdiff.load_atoms(tiny_pipe, saved, trigger_word="tea")
    add_placeholder_tokens(tiny_pipe, ["m"])  # a word of its own that CLIP knows
    assert token_id(tiny_pipe, "m") != tiny_pipe.tokenizer.convert_tokens_to_ids("m")


@pytest.mark.parametrize(("first", "second"), [("sks", "SKS"), ("Ohwx", "ohwx")])
def test_words_that_differ_in_case_only_are_refused(tiny_pipe, first, second):
    before = state(tiny_pipe)
    with pytest.raises(UserError, match=f"'{first}' and '{second}' differ in case only.*give each a word of its own"):
        add_placeholder_tokens(tiny_pipe, [first, second])
    assert_same(state(tiny_pipe), before)
    add_placeholder_token(tiny_pipe, first, owner="mug")
    with pytest.raises(UserError, match=f"'{second}' is taken by 'mug' as '{first}', and CLIP sees no case: load with"):
        add_placeholder_token(tiny_pipe, second)
    remove_placeholder_tokens(tiny_pipe, [first])
    assert_same(state(tiny_pipe), before)


def test_files_of_several_vectors_load_under_another_word_and_leave(tiny_pipe, tmp_path):
    before, words = state(tiny_pipe), placeholder_tokens("sks", 11)
    add_placeholder_tokens(tiny_pipe, words)
    for each in words:
        set_token_embedding(tiny_pipe, each, {"text_encoder": torch.randn(32)})
    expected = encoded(tiny_pipe, "a photo of sks mug")
    saved = atomdiff.save_atoms(tiny_pipe, tmp_path / "words.atoms.safetensors", dtype=torch.float32)
    with safe_open(saved, "pt") as file:
        assert set(file.keys()) == {f"token.{each}" for each in words}
        assert file.get_slice("token.sks_10").get_shape() == [32]
    atomdiff.unload_atoms(tiny_pipe)
    assert_same(state(tiny_pipe), before)
    atomdiff.load_atoms(tiny_pipe, saved, "first")
    assert torch.equal(encoded(tiny_pipe, "a photo of sks mug"), expected)
    with pytest.raises(UserError, match="the trigger word 'sks' is taken by 'first'"):
        atomdiff.load_atoms(tiny_pipe, saved, "second")
    atomdiff.load_atoms(tiny_pipe, saved, "second", trigger_word="red")
    assert torch.equal(encoded(tiny_pipe, "a photo of red mug"), expected)
    atomdiff.unload_atoms(tiny_pipe, "first")
    assert torch.equal(encoded(tiny_pipe, "a photo of red mug"), expected)
    atomdiff.unload_atoms(tiny_pipe)
    assert_same(state(tiny_pipe), before)


def test_old_configs_look_for_the_end_of_prompts_as_before_once_words_have_left(tiny_xl_pipe):
    encoder = tiny_xl_pipe.text_encoder_2
    for module in (encoder.config, *encoder.modules()):
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2
    before = {module: module.eos_token_id for module in encoder.modules() if hasattr(module, "eos_token_id")}
    assert before
    add_placeholder_token(tiny_xl_pipe, "sks")  # a known token
    assert encoder.config.eos_token_id == 2
    add_placeholder_token(tiny_xl_pipe, "ohwx")
    end = tiny_xl_pipe.tokenizer_2.eos_token_id
    assert encoder.config.eos_token_id == end and all(module.eos_token_id == end for module in before)
    remove_placeholder_tokens(tiny_xl_pipe, ["ohwx"])
    assert encoder.config.eos_token_id == 2 and all(module.eos_token_id == 2 for module in before)


def test_mistakes_are_named_and_change_nothing(tiny_pipe):
    before = state(tiny_pipe)
    for word in ("", "two words", " sks"):
        with pytest.raises(UserError, match="one word without spaces"):
            add_placeholder_token(tiny_pipe, word)
    with pytest.raises(UserError, match="'sks' is not a trigger word yet"):
        set_token_embedding(tiny_pipe, "sks", {"text_encoder": torch.ones(32)})
    with pytest.raises(UserError, match="'sks' is not a trigger word; there are: none"):
        remove_placeholder_tokens(tiny_pipe, ["sks"])
    with pytest.raises(UserError, match="'ohwx' is not one token of text_encoder"):
        token_id(tiny_pipe, "ohwx")
    add_placeholder_token(tiny_pipe, "sks", owner="mug")
    with pytest.raises(UserError, match="'sks' is taken by 'mug'.*trigger_word="):
        add_placeholder_token(tiny_pipe, "sks")
    with pytest.raises(UserError, match=r"shape \(31,\), but text_encoder takes \(32,\)"):
        set_token_embedding(tiny_pipe, "sks", {"text_encoder": torch.ones(31)})
    with pytest.raises(UserError, match="text_encoder_2, which this pipeline does not have"):
        set_token_embedding(tiny_pipe, "sks", {"text_encoder": torch.ones(32), "text_encoder_2": torch.ones(32)})
    assert_same(state(tiny_pipe), before)
