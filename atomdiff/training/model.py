"""What a run trains, as one module: the denoiser with its adapter, token embeddings of trigger words, text encoders."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from atomdiff.bases.base import Base, PromptEmbeds
from atomdiff.bases.find import find_base
from atomdiff.data.prompt_embeds import (
    init_token_embeddings,
    precompute_prompt_embeds,
    replace_token_embeddings,
    text_encoders,
    tokenize,
)
from atomdiff.pipelines.placeholder_tokens import add_placeholder_tokens, token_id
from atomdiff.pipelines.token_names import placeholder_tokens
from atomdiff.training.config import TrainConfig
from atomdiff.training.config.optimizer import ParameterGroup
from atomdiff.training.memory import save_memory
from atomdiff.training.method import ADAPTER_NAME, make_trainable
from atomdiff.tuner.adapters_off import adapters_off
from atomdiff.tuner.selection import LayerScore, frozen_scores, layer_scores
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_model, hash_values
from atomdiff.utils.seeds import derive_seed
from atomdiff.utils.tensor_cache import DiskCache


class TrainingModel(nn.Module):
    """A denoiser that takes the numbers of prompts: most are precomputed, the others are encoded in each step.

    Args:
        base: The base architecture.
        denoiser: With its adapter.
        prompt_embeds: Precomputed conditioning, (77, hidden) and (projected,), by the prompt's number.
        text_encoders: Encode the prompts whose embeddings change, by name; none if there are no such prompts.
        token_ids: Of all prompts (prompts, 77) for each of the text encoders.
        token_embeddings: Trained embeddings of the placeholder tokens (tokens, hidden) by text encoder, which already
            replace those of its table.
        placeholder_tokens: The tokens of the rows of `token_embeddings`.
        base_prompt_embeds: The base's own conditioning on the prompts that it predicts for, by the prompt's number.
        base_denoiser: The denoiser as it was, where there is no adapter that could be switched off.
    """

    def __init__(
        self,
        base: Base,
        denoiser: Any,
        prompt_embeds: Mapping[int, PromptEmbeds],
        text_encoders: Mapping[str, nn.Module] | None = None,
        token_ids: Mapping[str, Tensor] | None = None,
        token_embeddings: Mapping[str, nn.Parameter] | None = None,
        placeholder_tokens: Sequence[str] = (),
        base_prompt_embeds: Mapping[int, PromptEmbeds] | None = None,
        base_denoiser: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.denoiser = denoiser
        self.text_encoders = nn.ModuleDict(text_encoders or {})
        self.token_embeddings = nn.ParameterDict(token_embeddings or {})
        self.placeholder_tokens = tuple(placeholder_tokens)
        self.prompt_embeds = dict(prompt_embeds)
        self._constant = frozenset(prompt_embeds)
        self.base_prompt_embeds = dict(base_prompt_embeds or {})
        self.base_denoiser = base_denoiser
        self.token_ids = dict(token_ids or {})
        self.embeddings_frozen = False

    def forward(
        self, latents: Tensor, timesteps: Tensor, prompts: Sequence[int], time_ids: Tensor | None = None
    ) -> Tensor:
        """Return the denoiser's prediction (batch, c, h, w).

        Args:
            latents: Noisy latents (batch, c, h, w).
            timesteps: Their timesteps (batch,).
            prompts: The number of each sample's prompt.
            time_ids: Size and crop of each image (batch, 6), as `Base.denoise` takes them.
        """
        return self.base.denoise(self.denoiser, latents, timesteps, self.encode_prompts(prompts), time_ids)

    @torch.no_grad()
    def predict_base(
        self, latents: Tensor, timesteps: Tensor, prompts: Sequence[int], time_ids: Tensor | None = None
    ) -> Tensor:
        """Return what the base predicts, without anything that is trained; arguments and result are those of a call."""
        return self.denoise_with_base(latents, timesteps, self.encode_base_prompts(prompts), time_ids)

    def encode_base_prompts(self, prompts: Sequence[int]) -> PromptEmbeds:
        """Return the base's own conditioning on the prompts of these numbers, of those that it predicts for."""
        return self._stack([self.base_prompt_embeds[prompt] for prompt in prompts])

    @torch.no_grad()
    def denoise_with_base(
        self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds, time_ids: Tensor | None = None
    ) -> Tensor:
        """Return what the base's denoiser predicts for any conditioning; else as `predict_base`."""
        if self.base_denoiser is not None:
            return self.base.denoise(self.base_denoiser, latents, timesteps, embeds, time_ids)
        with adapters_off(self.denoiser):
            return self.base.denoise(self.denoiser, latents, timesteps, embeds, time_ids)

    # Else torch.compile would begin anew with every other choice of prompts.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def encode_prompts(self, prompts: Sequence[int]) -> PromptEmbeds:
        """Return the conditioning on the prompts of these numbers, in float32; each is encoded once at most."""
        embeds = dict(self.prompt_embeds)
        if changing := sorted(set(prompts) - embeds.keys()):
            ids = [self.token_ids[name][changing] for name in self.text_encoders]
            encoded, pooled = self.base.encode_prompts([*self.text_encoders.values()], ids)
            each_pooled: Iterable[Tensor | None] = [None] * len(changing) if pooled is None else pooled
            embeds.update(zip(changing, map(PromptEmbeds, encoded, each_pooled), strict=True))
        states, pooled = self._stack([embeds[prompt] for prompt in prompts])
        for parameter in [*self.text_encoders.parameters(), *self.token_embeddings.values()]:
            if parameter.requires_grad:  # several processes need every parameter to have a gradient
                states = states + 0 * parameter.sum()
        return PromptEmbeds(states, pooled)

    def _stack(self, embeds: Sequence[PromptEmbeds]) -> PromptEmbeds:
        device = self.denoiser.device
        states = torch.stack([each.prompt_embeds.to(device) for each in embeds]).float()
        pooled = [each.pooled_prompt_embeds.to(device) for each in embeds if each.pooled_prompt_embeds is not None]
        return PromptEmbeds(states, torch.stack(pooled).float() if pooled else None)

    @cached_property
    def layer_scores(self) -> list[LayerScore]:
        """The scores of all layers, where they are chosen by scores."""
        return layer_scores(self, ADAPTER_NAME)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def parameter_groups(self) -> dict[ParameterGroup, list[nn.Parameter]]:
        """Return the parameters that are trained, by what they have their own learning rate for; no group is empty."""
        parts: dict[ParameterGroup, nn.Module] = {
            "adapter": self.denoiser,
            "text_encoder": self.text_encoders,
            "token": self.token_embeddings,
        }
        groups = {name: [each for each in part.parameters() if each.requires_grad] for name, part in parts.items()}
        return {name: parameters for name, parameters in groups.items() if parameters}

    def learned_embeddings(self) -> dict[str, dict[str, Tensor]]:
        """Return the trained embeddings (hidden,): placeholder token -> text encoder -> embedding."""
        return {
            token: {encoder: vectors[row].detach() for encoder, vectors in self.token_embeddings.items()}
            for row, token in enumerate(self.placeholder_tokens)
        }

    def freeze_token_embeddings(self) -> None:
        """Stop training token embeddings; unless text encoders are trained, precompute all prompts.

        The embeddings go on to have gradients, which `clear_frozen_gradients` removes before an optimizer sees them.
        """
        if self.embeddings_frozen:
            return
        self.embeddings_frozen = True
        if "text_encoder" not in self.parameter_groups() and self.token_embeddings:
            count = len(next(iter(self.token_ids.values())))
            missing = [number for number in range(count) if number not in self.prompt_embeds]
            self.prompt_embeds |= precompute_prompt_embeds(
                self.base, dict(self.text_encoders.items()), self.token_ids, missing
            )

    @contextmanager
    def encoding_anew(self) -> Iterator[None]:
        """Encode prompts with trigger words for a while, frozen or not, with the token embeddings as they are then."""
        known = self.prompt_embeds
        self.prompt_embeds = {number: known[number] for number in self._constant}
        try:
            yield
        finally:
            self.prompt_embeds = known

    def clear_frozen_gradients(self) -> None:
        """Remove the gradients of frozen token embeddings and scores: no optimizer moves a parameter without one."""
        embeddings = self.token_embeddings.values() if self.embeddings_frozen else ()
        for parameter in (*embeddings, *frozen_scores(self.layer_scores)):
            parameter.grad = None


def build_training_model(
    config: TrainConfig,
    pipe: Any,
    adapter: PeftConfig | None,
    prompts: Sequence[str],
    text_adapter: PeftConfig | None = None,
    cache: DiskCache | None = None,
    preserved: Iterable[int] = (),
) -> TrainingModel:
    """Add adapters to the models and placeholder tokens to the tokenizers; remove text encoders that are not needed.

    Args:
        config: The run.
        pipe: The base, its denoiser in the precision of the weights that are not trained; what is trained becomes part
            of it.
        adapter: The method, None for training the whole denoiser.
        prompts: All prompts.
        text_adapter: With `train_text_encoder` the method for the text encoders, None for training them whole.
        cache: Keeps the embeddings of prompts that do not change.
        preserved: The numbers of the prompts that the base predicts for; none has a trigger word. With full tuning it
            can do so before the first step only, unless there is output preservation.

    Raises:
        UserError: An adapter does not fit the base, or a trigger word is in no prompt.
    """
    base = find_base(pipe.components)
    denoiser = getattr(pipe, base.denoiser).train()
    dtype = denoiser.dtype
    make_trainable(denoiser, adapter, config.seed)
    save_memory(config, denoiser, dtype)
    preserved = sorted(set(preserved))
    copied = adapter is None and config.preservation != "none"
    base_denoiser = copy.deepcopy(denoiser).requires_grad_(False) if copied else None

    encoders = {name: encoder.requires_grad_(False) for name, encoder in text_encoders(pipe).items()}
    tokens, embeddings = init_placeholder_tokens(config, pipe) if config.train_token else ([], {})
    cache_key = ""
    if cache is not None and (preserved or not config.train_text_encoder):
        cache_key = hash_values(*map(hash_model, encoders.values()))  # before tokens make the tables longer
    add_placeholder_tokens(pipe, tokens)
    ids = {name: tokenize(pipe, name, prompts) for name in encoders}
    changing = torch.full((len(prompts),), config.train_text_encoder)
    for name in embeddings:
        rows = [token_id(pipe, token, name) for token in tokens]
        replace_token_embeddings(encoders[name], rows, embeddings[name])
        for token, row in zip(tokens, rows, strict=True):
            changing |= prompts_with(token, row, ids[name])
    constant = (~changing).nonzero().flatten().tolist()
    embeds = precompute_prompt_embeds(base, encoders, ids, sorted({*constant, *preserved}), cache, cache_key)
    prompt_embeds = {number: embeds[number] for number in constant}
    base_embeds = {number: embeds[number] for number in preserved}
    if config.train_text_encoder:
        _train_text_encoders(config, encoders, text_adapter)
    elif not embeddings:
        for name in encoders:
            setattr(pipe, name, None)
        encoders, ids = {}, {}
    return TrainingModel(base, denoiser, prompt_embeds, encoders, ids, embeddings, tokens, base_embeds, base_denoiser)


def _train_text_encoders(
    config: TrainConfig, encoders: Mapping[str, nn.Module], text_adapter: PeftConfig | None
) -> None:
    """Add what is trained to the text encoders."""
    for name, encoder in encoders.items():
        make_trainable(encoder.train(), text_adapter, derive_seed(config.seed, name))
        if config.gradient_checkpointing:
            # The name of the call changes within transformers 5.
            enable: Any = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
            enable({"use_reentrant": False})


def init_placeholder_tokens(config: TrainConfig, pipe: Any) -> tuple[list[str], dict[str, nn.Parameter]]:
    """Return the placeholder tokens of all trigger words, and their first embeddings (tokens, hidden) by encoder."""
    tokens: list[str] = []
    starts: dict[str, list[Tensor]] = {name: [] for name in text_encoders(pipe)}
    for subject in config.subjects:
        tokens += placeholder_tokens(subject.trigger_word, config.num_vectors)
        like = subject.initializer_token or subject.class_name or ""
        for name, embeddings in starts.items():
            seed = derive_seed(config.seed, "vectors", subject.trigger_word, name)
            embeddings.append(init_token_embeddings(pipe, name, like, config.num_vectors, seed))
    return tokens, {name: nn.Parameter(torch.cat(embeddings)) for name, embeddings in starts.items()}


def prompts_with(token: str, row: int, ids: Tensor) -> Tensor:
    """Return which of the prompts, ids (prompts, 77), have a token, whose embedding is that of a row: (prompts,).

    Raises:
        UserError: None of them.
    """
    has_token = (ids == row).any(dim=1)
    if not has_token.any():
        expected = f"expected it in a prompt, in this spelling and within the {ids.shape[1] - 2} tokens that are read"
        raise UserError(f"no prompt contains {token!r}, so its embedding cannot be trained; {expected}")
    return has_token
