import pytest
import torch
from torch import nn

from atomdiff.bases.find import find_base
from atomdiff.data.prompt_embeds import (
    init_token_embeddings,
    precompute_prompt_embeds,
    replace_token_embeddings,
    text_encoders,
    tokenize,
)
from atomdiff.pipelines.placeholder_tokens import add_placeholder_tokens, set_token_embedding, token_id
from atomdiff.utils.tensor_cache import DiskCache

PROMPTS = ("a photo of sks mug", "a photo of a mug", "")


def embeds_of(pipe, *prompts):
    encoders = text_encoders(pipe)
    with torch.no_grad():
        return find_base(pipe.components).encode_prompts(
            list(encoders.values()), [tokenize(pipe, name, prompts) for name in encoders]
        )


@pytest.fixture(params=["tiny_pipe", "tiny_sd2_pipe", "tiny_xl_pipe"])
def pipe(request):
    return request.getfixturevalue(request.param)


def check_embeds(pipe):
    states, pooled = embeds_of(pipe, *PROMPTS)
    once = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    expected, _, *of_all = pipe.encode_prompt(list(PROMPTS), **once)
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=0)
    assert (pooled is not None) == bool(of_all)
    if pooled is not None:
        torch.testing.assert_close(pooled, of_all[0], atol=1e-6, rtol=0)
    return states


def test_embeddings_are_those_of_the_pipeline(pipe):
    plain = check_embeds(pipe)
    add_placeholder_tokens(pipe, ["sks", "sks_1", "sks_2"])
    for word in ("sks", "sks_1", "sks_2"):
        set_token_embedding(pipe, word, {name: torch.randn(32) for name in text_encoders(pipe)})
    several = check_embeds(pipe)
    assert not torch.allclose(several[0], plain[0], atol=1e-3)
    torch.testing.assert_close(several[1:], plain[1:], atol=1e-6, rtol=0)


def test_embeddings_of_words_in_another_case_are_those_of_the_pipeline(pipe):
    prompts = ["a MU mug", "a mu mug", "a mug"]
    add_placeholder_tokens(pipe, ["mu", "mu_1"])
    for word in ("mu", "mu_1"):
        set_token_embedding(pipe, word, {name: torch.randn(32) for name in text_encoders(pipe)})
    states = embeds_of(pipe, *prompts).prompt_embeds
    expected = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=0)
    assert torch.equal(states[0], states[1]) and not torch.allclose(states[0], states[2], atol=1e-3)


def test_the_end_of_a_prompt_is_found_in_old_configs_too(tiny_xl_pipe):
    expected = embeds_of(tiny_xl_pipe, *PROMPTS).pooled_prompt_embeds
    add_placeholder_tokens(tiny_xl_pipe, ["sks", "sks_1"])  # which get higher ids than the end
    with_words = embeds_of(tiny_xl_pipe, *PROMPTS).pooled_prompt_embeds
    for module in (tiny_xl_pipe.text_encoder_2.config, *tiny_xl_pipe.text_encoder_2.modules()):
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2
    at_the_word = embeds_of(tiny_xl_pipe, *PROMPTS).pooled_prompt_embeds
    assert not torch.allclose(at_the_word[0], with_words[0], atol=1e-3)
    add_placeholder_tokens(tiny_xl_pipe, ["ohwx"])
    torch.testing.assert_close(embeds_of(tiny_xl_pipe, *PROMPTS).pooled_prompt_embeds, with_words)
    torch.testing.assert_close(with_words[1:], expected[1:])


def test_long_prompts_are_cut_off(tiny_pipe):
    long = "a photo of a mug " * 30
    expected, _ = tiny_pipe.encode_prompt(long, "cpu", 1, False)
    torch.testing.assert_close(embeds_of(tiny_pipe, long).prompt_embeds, expected)


def test_vectors_stand_in_for_rows_and_the_table_stays(tiny_pipe):
    encoder, base = tiny_pipe.text_encoder, find_base(tiny_pipe.components)
    table = encoder.get_input_embeddings().weight
    tokens = [token_id(tiny_pipe, word) for word in ("sks", "red")]
    ids = [tokenize(tiny_pipe, "text_encoder", ["a sks mug", "a red mug", "a mug"])]
    before, untouched = base.encode_prompts([encoder], ids).prompt_embeds, table.detach().clone()
    vectors = nn.Parameter(torch.stack([torch.linspace(-1, 1, 32), torch.linspace(1, 0, 32)]))
    handle = replace_token_embeddings(encoder, tokens, vectors)
    after = base.encode_prompts([encoder], ids).prompt_embeds
    assert not any(torch.allclose(after[row], before[row], atol=1e-3) for row in (0, 1))
    assert torch.equal(after[2], before[2])
    after.square().sum().backward()
    assert (vectors.grad.norm(dim=1) > 0).all()
    handle.remove()
    assert torch.equal(base.encode_prompts([encoder], ids).prompt_embeds, before) and torch.equal(table, untouched)

    table.data[tokens] = vectors.data  # what the loader does with the trained vectors
    torch.testing.assert_close(base.encode_prompts([encoder], ids).prompt_embeds, after)


def test_a_prompts_embeddings_depend_on_it_alone_and_are_kept(pipe, tmp_path):
    base, encoders = find_base(pipe.components), text_encoders(pipe)
    ids = {name: tokenize(pipe, name, PROMPTS) for name in encoders}
    known = precompute_prompt_embeds(base, encoders, ids, [0, 2], DiskCache(tmp_path), "base")
    assert list(known) == [0, 2]
    alone = precompute_prompt_embeds(base, encoders, {name: of[2:] for name, of in ids.items()}, [0])[0]
    assert torch.equal(known[2].prompt_embeds, alone.prompt_embeds)
    torch.testing.assert_close(known[0].prompt_embeds, embeds_of(pipe, *PROMPTS).prompt_embeds[0])

    for encoder in encoders.values():
        encoder.forward = None  # it must not be asked again
    again = precompute_prompt_embeds(base, encoders, ids, [0, 2], DiskCache(tmp_path), "base")
    for number in (0, 2):
        assert torch.equal(again[number].prompt_embeds, known[number].prompt_embeds)
        assert (again[number].pooled_prompt_embeds is None) == (known[number].pooled_prompt_embeds is None)
    with pytest.raises(TypeError):
        precompute_prompt_embeds(base, encoders, ids, [0], DiskCache(tmp_path), "another base")


def test_what_words_start_as(tiny_pipe):
    table = tiny_pipe.text_encoder.get_input_embeddings().weight.detach()
    red, mug = (tiny_pipe.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("red", "mug"))

    def start(words, count, seed=0):
        return init_token_embeddings(tiny_pipe, "text_encoder", words, count, seed)

    assert torch.equal(start("mug", 1), table[[mug]])
    assert torch.equal(start("red mug", 2), table[[red, mug]])
    mean = table[[red, mug]].mean(dim=0)
    torch.testing.assert_close(start("red mug", 1), mean[None])
    three = start("red mug", 3)
    assert torch.equal(three, start("red mug", 3)) and not torch.equal(three, start("red mug", 3, seed=1))
    noise = (three - mean) / table.std()
    assert len(noise.unique(dim=0)) == 3 and 0.05 < noise.std() < 0.2
