import dataclasses

import pytest
import torch
from peft import LoraConfig
from torch import nn

from atomdiff.bases.base import PromptEmbeds
from atomdiff.bases.stable_diffusion import StableDiffusion
from atomdiff.data.prompt_embeds import init_token_embeddings, text_encoders, tokenize
from atomdiff.pipelines.placeholder_tokens import token_id
from atomdiff.training.config import TrainConfig
from atomdiff.training.model import TrainingModel, build_training_model
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError

SD = StableDiffusion()
PROMPTS = ("a photo of sks mug", "a photo of a mug")
CONFIG = TrainConfig(pretrained_model_name_or_path="base", instance_data_dir="photos", class_name="mug")
ON_TEXT = AtomConfig(target_modules="attention")


def build(pipe, prompts=PROMPTS, dtype=torch.float32, text_adapter=None, **fields):
    pipe.unet.to(dtype)
    return build_training_model(dataclasses.replace(CONFIG, **fields), pipe, AtomConfig(), prompts, text_adapter)


def sum_of_squares(embeds):
    return sum(tensor.square().sum() for tensor in embeds if tensor is not None)


@pytest.fixture(params=["tiny_pipe", "tiny_xl_pipe"])
def pipe(request):
    return request.getfixturevalue(request.param)


def test_known_prompts_are_not_encoded_and_others_once(tiny_pipe):
    ids = tokenize(tiny_pipe, "text_encoder", ["a photo of sks mug", "a photo of a mug", "a picture of sks"])
    with torch.no_grad():
        expected = SD.encode_prompts([tiny_pipe.text_encoder], [ids]).prompt_embeds
    encoded = []
    tiny_pipe.text_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0]))
    known = {1: PromptEmbeds(expected[1], None)}
    concept = TrainingModel(SD, tiny_pipe.unet, known, {"text_encoder": tiny_pipe.text_encoder}, {"text_encoder": ids})
    states = concept.encode_prompts([2, 1, 0, 2]).prompt_embeds
    torch.testing.assert_close(states, expected[[2, 1, 0, 2]])
    assert [len(batch) for batch in encoded] == [2]
    concept.encode_prompts([1, 1])
    assert len(encoded) == 1


def test_the_prediction_is_the_unets(tiny_pipe):
    states = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(0))
    concept = TrainingModel(
        SD, tiny_pipe.unet, {number: PromptEmbeds(of_prompt, None) for number, of_prompt in enumerate(states)}
    )
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    with torch.no_grad():
        expected = tiny_pipe.unet(latents, timesteps, states[[1, 0]]).sample
        torch.testing.assert_close(concept(latents, timesteps, [1, 0]), expected)


@pytest.mark.parametrize("words", [True, False])
def test_sdxl_is_told_of_the_prompt_and_the_picture(tiny_xl_pipe, words):
    states, _, pooled, _ = tiny_xl_pipe.encode_prompt(list(PROMPTS), device="cpu", do_classifier_free_guidance=False)
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32], [40, 32, 8, 0, 32, 32]])
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    concept = build(tiny_xl_pipe, train_token=words, class_name="sks")
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": sizes}
        expected = concept.denoiser(latents, timesteps, states, added_cond_kwargs=added).sample
        torch.testing.assert_close(concept(latents, timesteps, [0, 1], sizes), expected)
        other = concept(latents, timesteps, [0, 1], sizes.flip(0))
    assert not torch.allclose(other, expected, atol=1e-3)


def test_trained_parameters_by_name_and_group(tiny_pipe):
    tiny_pipe.unet.requires_grad_(False)
    tiny_pipe.unet.conv_in.bias.requires_grad_(True)
    vectors = nn.Parameter(torch.zeros(1, 32))
    concept = TrainingModel(
        SD, tiny_pipe.unet, {}, token_embeddings={"text_encoder": vectors}, placeholder_tokens=["sks"]
    )
    trained = concept.trained_parameters()
    assert (
        set(trained) == {"token_embeddings.text_encoder", "denoiser.conv_in.bias"}
        and trained["token_embeddings.text_encoder"] is vectors
    )
    groups = concept.parameter_groups()
    assert list(groups) == ["adapter", "token"]
    assert groups["adapter"][0] is tiny_pipe.unet.conv_in.bias and groups["token"][0] is vectors


@pytest.mark.parametrize("word", ["sks", "quux"])
def test_only_prompts_with_the_word_are_encoded_in_the_steps(pipe, word):
    prompts = (f"a photo of {word} mug", "a photo of a mug")
    starts = {name: init_token_embeddings(pipe, name, "mug", 1, 0) for name in text_encoders(pipe)}
    concept = build(pipe, prompts, trigger_word=word)
    assert set(concept.prompt_embeds) == {1} and concept.placeholder_tokens == (word,)
    assert set(concept.parameter_groups()) == {"adapter", "token"}
    for name, start in starts.items():
        torch.testing.assert_close(concept.token_embeddings[name].data, start)
    sum_of_squares(concept.encode_prompts([0, 1])).backward()
    assert all(vectors.grad.abs().sum() > 0 for vectors in concept.token_embeddings.values()) and len(
        concept.token_embeddings
    ) == len(starts)


def test_several_words_of_several_vectors(pipe, tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text(
        "[{instance_data_dir: one, class_name: red mug}, {instance_data_dir: two, class_name: cat, trigger_word: ohwx}]"
    )
    prompts = ("a sks mug", "a ohwx cat", "a cat", "sks and ohwx")
    tables = {name: part.get_input_embeddings().weight.clone() for name, part in text_encoders(pipe).items()}
    red_mug = pipe.tokenizer("red mug", add_special_tokens=False).input_ids
    config = dataclasses.replace(CONFIG, instance_data_dir=None, concepts_list=str(file), one_file=True, num_vectors=2)
    concept = build_training_model(config, pipe, AtomConfig(), prompts)
    assert concept.placeholder_tokens == ("sks", "sks_1", "ohwx", "ohwx_1") and set(concept.prompt_embeds) == {2}
    assert all(torch.equal(concept.token_embeddings[name][:2], table[red_mug]) for name, table in tables.items())
    for name, ids in concept.token_ids.items():
        tokens = [token_id(pipe, word, name) for word in concept.placeholder_tokens]
        expected = [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
        assert [[int((row == token).sum()) for token in tokens] for row in ids] == expected

    def moved(numbers):
        concept.zero_grad()
        sum_of_squares(concept.encode_prompts(numbers)).backward()
        return [(vectors.grad.abs().sum(dim=1) > 0).tolist() for vectors in concept.token_embeddings.values()]

    assert moved([0]) == [[True, True, False, False]] * len(tables)
    assert moved([2, 1]) == [[False, False, True, True]] * len(tables)
    kept = concept.learned_embeddings()
    assert list(kept) == list(concept.placeholder_tokens) and torch.equal(
        kept["sks"]["text_encoder"], concept.token_embeddings["text_encoder"][0]
    )


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_say_a_word_in_any_case_but_not_within_another(pipe, count):
    concept = build(pipe, ("a MU mug", "a mug", "Mu, mug", "xmu mux"), trigger_word="mu", num_vectors=count)
    assert set(concept.prompt_embeds) == {1, 3}
    for name, ids in concept.token_ids.items():
        tokens = [token_id(pipe, word, name) for word in concept.placeholder_tokens]
        assert len(tokens) == count
        assert [[int((row == token).sum()) for token in tokens] for row in ids] == [[n] * count for n in (1, 0, 1, 0)]


@pytest.mark.parametrize("prompts", [("a photo of asks mug",), ("a " * 80 + "sks",)])
def test_a_word_that_no_prompt_says_is_named(tiny_pipe, prompts):
    with pytest.raises(UserError, match="no prompt contains 'sks.*expected it in a prompt"):
        build(tiny_pipe, prompts, num_vectors=2)


def test_without_a_token_no_prompt_is_encoded_in_the_steps(pipe):
    concept = build(pipe, train_token=False)
    assert set(concept.prompt_embeds) == {0, 1} and not concept.text_encoders and not text_encoders(pipe)


def test_a_batch_without_the_word_still_gives_every_parameter_a_gradient(pipe):
    concept = build(pipe)
    concept.encode_prompts([1]).prompt_embeds.sum().backward()
    assert all((vectors.grad == 0).all() for vectors in concept.token_embeddings.values())


@pytest.mark.parametrize("text_adapter", [ON_TEXT, LoraConfig(target_modules=["q_proj", "v_proj"]), None])
def test_text_encoders_train_with_any_method(pipe, text_adapter):
    encoders = text_encoders(pipe)
    concept = build(pipe, train_text_encoder=True, text_adapter=text_adapter)
    assert not concept.prompt_embeds and list(concept.parameter_groups()) == ["adapter", "text_encoder", "token"]
    of_text = concept.parameter_groups()["text_encoder"]
    whole = sum(1 for encoder in encoders.values() for _ in encoder.parameters())
    assert (len(of_text) == whole) == (text_adapter is None)
    sum_of_squares(concept.encode_prompts([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in (*of_text, *concept.token_embeddings.parameters()))
    assert all(
        any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
        for encoder in encoders.values()
    )


def test_adapters_of_two_text_encoders_start_differently(tiny_xl_pipe):
    lora = LoraConfig(target_modules=["q_proj"])
    first, second = build(tiny_xl_pipe, train_text_encoder=True, text_adapter=lora).text_encoders.values()
    starts = [next(p for p in encoder.parameters() if p.requires_grad) for encoder in (first, second)]
    assert starts[0].shape == starts[1].shape and not torch.equal(*starts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text_adapter", [None, ON_TEXT])
def test_frozen_weights_have_the_runs_precision_and_trained_ones_float32(pipe, dtype, text_adapter):
    concept = build(pipe, dtype=dtype, train_text_encoder=text_adapter is not None, text_adapter=text_adapter)
    assert {parameter.dtype for parameter in concept.denoiser.parameters() if not parameter.requires_grad} == {dtype}
    assert {parameter.dtype for parameter in concept.text_encoders.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in concept.trained_parameters().values()} == {torch.float32}


def test_stopped_words_stay_and_their_prompts_are_known(pipe):
    concept = build(pipe)
    with torch.no_grad():
        before = concept.encode_prompts([0, 1])
    concept.freeze_token_embeddings()
    assert set(concept.prompt_embeds) == {0, 1}
    after = concept.encode_prompts([0, 1])
    torch.testing.assert_close(after.prompt_embeds.detach(), before.prompt_embeds)
    if after.pooled_prompt_embeds is not None:
        torch.testing.assert_close(after.pooled_prompt_embeds, before.pooled_prompt_embeds)
    after.prompt_embeds.sum().backward()
    assert all((vectors.grad == 0).all() for vectors in concept.token_embeddings.values())
    concept.clear_frozen_gradients()
    assert all(vectors.grad is None for vectors in concept.token_embeddings.values())


def test_prompts_of_stopped_words_can_be_encoded_with_other_embeddings(pipe):
    concept = build(pipe)
    concept.freeze_token_embeddings()
    known = [concept.encode_prompts([number]).prompt_embeds.detach() for number in (0, 1)]
    with torch.no_grad():
        for vectors in concept.token_embeddings.values():
            vectors.neg_()
        with concept.encoding_anew():
            anew = [concept.encode_prompts([number]).prompt_embeds for number in (0, 1)]
        after = [concept.encode_prompts([number]).prompt_embeds for number in (0, 1)]
    assert (
        sum((one - other).abs().max() > 1e-3 for one, other in zip(known, anew, strict=True)) == 1
    )  # the other has none
    assert all(map(torch.equal, known, after))


def test_words_stop_while_text_encoders_go_on(pipe):
    concept = build(pipe, train_text_encoder=True, text_adapter=ON_TEXT)
    concept.freeze_token_embeddings()
    assert not concept.prompt_embeds
    concept.encode_prompts([0]).prompt_embeds.square().sum().backward()
    concept.clear_frozen_gradients()
    assert all(vectors.grad is None for vectors in concept.token_embeddings.values())
    assert any(parameter.grad.abs().sum() > 0 for parameter in concept.parameter_groups()["text_encoder"])


def test_the_config_chooses_the_attention(tiny_pipe):
    concept = build(tiny_pipe, plain_attention=True)
    assert {type(processor).__name__ for processor in concept.denoiser.attn_processors.values()} == {"AttnProcessor"}
