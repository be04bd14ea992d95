"""Conditioning on prompts: token ids, precomputed embeddings, and token embeddings that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atomdiff.bases.base import Base, PromptEmbeds
from atomdiff.bases.find import find_base
from atomdiff.utils.hashing import hash_values
from atomdiff.utils.tensor_cache import DiskCache

_NOISE = 0.1  # of the standard deviation of an embedding table


def text_encoders(pipe: Any) -> dict[str, Any]:
    """Return a pipeline's text encoders by name, in the order of their embeddings."""
    parts = {name: getattr(pipe, name, None) for name in find_base(pipe.components).text_encoders}
    return {name: part for name, part in parts.items() if part is not None}


def tokenize(pipe: Any, encoder: str, prompts: Iterable[str]) -> Tensor:
    """Return the token ids (prompts, 77) for a text encoder.

    As in the pipelines, a trigger word of several tokens becomes all of them, and prompts too long are cut off.
    """
    tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
    texts = pipe.maybe_convert_prompt(list(prompts), tokenizer)
    length = tokenizer.model_max_length
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def precompute_prompt_embeds(
    base: Base,
    encoders: Mapping[str, Any],
    ids: Mapping[str, Tensor],
    numbers: Iterable[int],
    cache: DiskCache | None = None,
    key: str = "",
) -> dict[int, PromptEmbeds]:
    """Encode prompts that will not change, each by itself, so that its embeddings do not depend on the others.

    Args:
        base: the base architecture.
        encoders: the text encoders by name.
        ids: token ids (prompts, 77) by text encoder.
        numbers: which of the prompts.
        cache: keeps the embeddings for further runs.
        key: names the text encoders there.

    Returns:
        The embeddings on the CPU, (77, hidden) and (projected,) by the prompt's number.
    """
    known = {}
    for number in numbers:
        of_prompt = [ids[name][[number]] for name in encoders]

        def make(of_prompt: list[Tensor] = of_prompt) -> dict[str, Tensor]:
            with torch.no_grad():
                found = base.encode_prompts(list(encoders.values()), of_prompt)
            return {name: tensor[0].cpu() for name, tensor in found._asdict().items() if tensor is not None}

        own_key = hash_values("prompt_embeds", key, torch.cat(of_prompt).numpy().tobytes())
        tensors = make() if cache is None else cache.get(own_key, make)
        known[number] = PromptEmbeds(tensors["prompt_embeds"], tensors.get("pooled_prompt_embeds"))
    return known


def replace_token_embeddings(text_encoder: Any, tokens: Sequence[int], vectors: Tensor) -> RemovableHandle:
    """Make the embedding table give `vectors` (tokens, hidden) for these ids; the table itself does not change.

    Returns:
        A handle whose `remove()` undoes this.
    """

    def replace(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        for token, vector in zip(tokens, vectors.to(output.dtype), strict=True):
            named = (inputs[0] == token)[..., None]  # (batch, 77, 1)
            output = torch.where(named, vector, output)
        return output

    table: nn.Module = text_encoder.get_input_embeddings()
    return table.register_forward_hook(replace)


def init_token_embeddings(pipe: Any, encoder: str, initializer: str, count: int, seed: int) -> Tensor:
    """Return the first embeddings (count, hidden) of the placeholder tokens of a trigger word, in float32.

    They are the embeddings of the tokens of `initializer` one by one, if there are as many; else all are their mean,
    and if there are several, each with noise of its own, a tenth of the table's standard deviation, so that they can
    learn different things.

    Args:
        pipe: the base.
        encoder: name of the text encoder.
        initializer: text that the trigger word starts as.
        count: how many placeholder tokens it has.
        seed: of the noise.
    """
    tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
    ids = tokenizer(initializer, add_special_tokens=False).input_ids
    table: Tensor = getattr(pipe, encoder).get_input_embeddings().weight.detach().float()
    if len(ids) == count:
        return table[ids]
    mean = table[ids].mean(dim=0).expand(count, -1)
    if count == 1:
        return mean.clone()
    generator = torch.Generator().manual_seed(seed)
    return mean + _NOISE * table.std() * torch.randn(mean.shape, generator=generator).to(table.device)
