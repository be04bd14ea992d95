import dataclasses

import pytest
import torch
from torch import nn

from atomdiff.concept import Concept, build_concept, encode, look_up, word_vector
from atomdiff.train_config import TrainConfig
from atomdiff.tuner import AtomConfig

PROMPTS = ("a photo of sks mug", "a photo of a mug")
CONFIG = TrainConfig(pretrained_model_name_or_path="base", instance_data_dir="photos", class_name="mug")


def ids_of(pipe, *prompts):
    return pipe.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def test_states_are_those_of_the_pipeline(tiny_pipe):
    expected, _ = tiny_pipe.encode_prompt("a photo of sks mug", "cpu", 1, False)
    torch.testing.assert_close(encode(tiny_pipe.text_encoder, ids_of(tiny_pipe, "a photo of sks mug")), expected)


def test_the_vector_stands_in_for_the_row_and_the_table_stays(tiny_pipe):
    encoder, ids = tiny_pipe.text_encoder, ids_of(tiny_pipe, "a photo of sks mug", "a photo of a mug")
    table = encoder.get_input_embeddings().weight
    token = ids_of(tiny_pipe, "sks")[0, 1].item()
    before, untouched = encode(encoder, ids), table.detach().clone()
    vector = nn.Parameter(torch.linspace(-1, 1, 32))
    handle = look_up(encoder, token, vector)
    after = encode(encoder, ids)
    assert not torch.allclose(after[0], before[0], atol=1e-3)
    assert torch.equal(after[1], before[1])
    after.sum().backward()
    assert vector.grad.norm() > 0
    handle.remove()
    assert torch.equal(encode(encoder, ids), before) and torch.equal(table, untouched)

    table.data[token] = vector.data  # what the loader does with the trained vector
    torch.testing.assert_close(encode(encoder, ids), after)


def test_known_prompts_are_not_encoded_and_others_once(tiny_pipe):
    ids = ids_of(tiny_pipe, "a photo of sks mug", "a photo of a mug", "a picture of sks")
    with torch.no_grad():
        expected = encode(tiny_pipe.text_encoder, ids)
    encoded = []
    tiny_pipe.text_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0]))
    concept = Concept(tiny_pipe.unet, {1: expected[1]}, tiny_pipe.text_encoder, ids)
    states = concept.text_states([2, 1, 0, 2])
    torch.testing.assert_close(states, expected[[2, 1, 0, 2]])
    assert [len(batch) for batch in encoded] == [2]
    concept.text_states([1, 1])
    assert len(encoded) == 1


def test_the_prediction_is_the_unets(tiny_pipe):
    states = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(0))
    concept = Concept(tiny_pipe.unet, dict(enumerate(states)))
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    with torch.no_grad():
        expected = tiny_pipe.unet(latents, timesteps, states[[1, 0]]).sample
        torch.testing.assert_close(concept(latents, timesteps, [1, 0]), expected)


def test_trained_parameters_by_name(tiny_pipe):
    tiny_pipe.unet.requires_grad_(False)
    tiny_pipe.unet.conv_in.bias.requires_grad_(True)
    vector = nn.Parameter(torch.zeros(32))
    trained = Concept(tiny_pipe.unet, {}, token_vector=vector).trained()
    assert set(trained) == {"token_vector", "unet.conv_in.bias"} and trained["token_vector"] is vector


def test_a_word_is_the_mean_of_its_tokens(tiny_pipe):
    table = tiny_pipe.text_encoder.get_input_embeddings().weight
    ids = [tiny_pipe.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("red", "mug")]
    torch.testing.assert_close(word_vector(tiny_pipe, "red mug"), table[ids].mean(dim=0))
    torch.testing.assert_close(word_vector(tiny_pipe, "mug"), table[ids[1]])


@pytest.mark.parametrize("word", ["sks", "quux"])
def test_only_prompts_with_the_word_are_encoded_in_the_steps(tiny_pipe, word):
    prompts = (f"a photo of {word} mug", "a photo of a mug")
    config = dataclasses.replace(CONFIG, trigger_word=word)
    concept = build_concept(config, tiny_pipe, AtomConfig(), prompts, torch.float32)
    assert set(concept.known_states) == {1} and "token_vector" in concept.trained()
    assert not any(name.startswith("text_encoder") for name in concept.trained())
    torch.testing.assert_close(concept.token_vector, word_vector(tiny_pipe, "mug"))
    concept.text_states([0, 1]).square().sum().backward()
    assert concept.token_vector.grad.abs().sum() > 0


def test_without_a_token_no_prompt_is_encoded_in_the_steps(tiny_pipe):
    config = dataclasses.replace(CONFIG, train_token=False)
    concept = build_concept(config, tiny_pipe, AtomConfig(), PROMPTS, torch.float32)
    assert set(concept.known_states) == {0, 1} and concept.text_encoder is None and tiny_pipe.text_encoder is None


def test_a_batch_without_the_word_still_gives_its_vector_a_gradient(tiny_pipe):
    concept = build_concept(CONFIG, tiny_pipe, AtomConfig(), PROMPTS, torch.float32)
    concept.text_states([1]).sum().backward()
    assert concept.token_vector.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_have_the_runs_precision_and_trained_ones_float32(tiny_pipe, dtype):
    concept = build_concept(CONFIG, tiny_pipe, AtomConfig(), PROMPTS, dtype)
    assert {parameter.dtype for parameter in concept.unet.parameters() if not parameter.requires_grad} == {dtype}
    assert {parameter.dtype for parameter in concept.trained().values()} == {torch.float32}


def test_the_config_chooses_the_attention(tiny_pipe):
    concept = build_concept(dataclasses.replace(CONFIG, plain_attention=True), tiny_pipe, None, PROMPTS, torch.float32)
    assert {type(processor).__name__ for processor in concept.unet.attn_processors.values()} == {"AttnProcessor"}
