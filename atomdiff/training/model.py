"""What a training run optimises, as one module: the adapted UNet, the trigger words' vectors, the text encoders."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from peft import PeftConfig
from torch import Tensor, nn

from atomdiff.data.images import derive_seed
from atomdiff.data.prompt_embeds import (
    TextStates,
    encode,
    encode_known,
    look_up,
    start_vectors,
    text_encoders,
    tokenize,
)
from atomdiff.pipelines.token_names import words_of
from atomdiff.pipelines.tokens import add_trigger_words, token_id
from atomdiff.training.config import TrainConfig
from atomdiff.training.memory import save_memory
from atomdiff.training.method import make_trainable
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_model, hash_values
from atomdiff.utils.tensor_cache import DiskCache

ParameterGroup = Literal["adapter", "text_encoder", "token"]


class Concept(nn.Module):
    """A UNet that gets its prompts as numbers: the states of most are known, only the others are encoded in each step.

    Args:
        unet: The denoiser, with its adapter.
        known: What the UNet is told of a prompt, (77, hidden) and (projected,), by the prompt's number.
        encoders: Encode the prompts whose states change, by name; none if there are no such prompts.
        ids: The token ids (prompts, 77) of all prompts for each of the encoders.
        vectors: What trigger words are trained: the word, then its vector (hidden,) for each of the encoders, looked up
            there already: (words, hidden) by encoder.
        words: The words of the rows of `vectors`.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        known: Mapping[int, TextStates],
        encoders: Mapping[str, nn.Module] | None = None,
        ids: Mapping[str, Tensor] | None = None,
        vectors: Mapping[str, nn.Parameter] | None = None,
        words: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.unet = unet
        self.encoders = nn.ModuleDict(encoders or {})
        self.vectors = nn.ParameterDict(vectors or {})
        self.words = tuple(words)
        self.known = dict(known)
        self.ids = dict(ids or {})
        self.words_stopped = False

    def forward(
        self, latents: Tensor, timesteps: Tensor, prompts: Sequence[int], time_ids: Tensor | None = None
    ) -> Tensor:
        """Return the UNet's prediction (batch, c, h, w).

        Args:
            latents: Noised latents (batch, c, h, w).
            timesteps: Their timesteps (batch,).
            prompts: The number of each sample's prompt.
            time_ids: What SDXL is told of each picture (batch, 6): original height and width, crop top and left, target
                height and width, in pixels. Other UNets do not look at it.
        """
        text = self.text_states(prompts)
        added = None if text.pooled is None else {"text_embeds": text.pooled, "time_ids": time_ids}
        prediction: Tensor = self.unet(latents, timesteps, text.states, added_cond_kwargs=added, return_dict=False)[0]
        return prediction

    # Else torch.compile would begin anew with every other choice of prompts.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def text_states(self, prompts: Sequence[int]) -> TextStates:
        """Return what the UNet is told of the prompts of these numbers, in float32; each is encoded once at most."""
        found = dict(self.known)
        changing = sorted(set(prompts) - found.keys())
        if changing:
            encoded = encode([*self.encoders.values()], [self.ids[name][changing] for name in self.encoders])
            pooled: Iterable[Tensor | None] = [None] * len(changing) if encoded.pooled is None else encoded.pooled
            found.update(zip(changing, map(TextStates, encoded.states, pooled), strict=True))
        device = self.unet.device
        states = torch.stack([found[prompt].states.to(device) for prompt in prompts]).float()
        for parameter in [*self.encoders.parameters(), *self.vectors.values()]:
            if parameter.requires_grad:  # several processes need every parameter to have a gradient
                states = states + 0 * parameter.sum()
        parts = [part.to(device) for prompt in prompts if (part := found[prompt].pooled) is not None]
        return TextStates(states, torch.stack(parts).float() if parts else None)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def parameter_groups(self) -> dict[ParameterGroup, list[nn.Parameter]]:
        """Return the parameters that are trained, by what they have their own learning rate for; no group is empty."""
        parts: dict[ParameterGroup, nn.Module] = {
            "adapter": self.unet,
            "text_encoder": self.encoders,
            "token": self.vectors,
        }
        groups = {name: [each for each in part.parameters() if each.requires_grad] for name, part in parts.items()}
        return {name: parameters for name, parameters in groups.items() if parameters}

    def word_vectors(self) -> dict[str, dict[str, Tensor]]:
        """Return the trained words' vectors (hidden,): word -> text encoder -> vector."""
        return {
            word: {encoder: vectors[row].detach() for encoder, vectors in self.vectors.items()}
            for row, word in enumerate(self.words)
        }

    def stop_words(self) -> None:
        """Leave the trigger words' vectors as they are from now on; unless the encoders train, all prompts are known.

        The vectors go on to have gradients, which `drop_gradients` takes away before an optimizer sees them.
        """
        if self.words_stopped:
            return
        self.words_stopped = True
        if "text_encoder" not in self.parameter_groups() and self.vectors:
            count = len(next(iter(self.ids.values())))
            missing = [number for number in range(count) if number not in self.known]
            self.known |= encode_known(dict(self.encoders.items()), self.ids, missing)

    def drop_gradients(self) -> None:
        """Take away the gradients of what does not learn any more: no optimizer moves a parameter without one."""
        if self.words_stopped:
            for parameter in self.vectors.values():
                parameter.grad = None


def build_concept(
    config: TrainConfig,
    pipe: Any,
    adapter: PeftConfig | None,
    prompts: Sequence[str],
    dtype: torch.dtype,
    text_adapter: PeftConfig | None = None,
    cache: DiskCache | None = None,
) -> Concept:
    """Add adapters to the models and trigger words to the tokenizers; text encoders go unless they are needed.

    Args:
        config: The run.
        pipe: The base; what is trained becomes part of it.
        adapter: The method, None for training the whole UNet.
        prompts: All prompts.
        dtype: Of the UNet's weights that are not trained; text encoders stay in float32.
        text_adapter: With `train_text_encoder` the method for the text encoders, None for training them whole.
        cache: Keeps the states of prompts that do not change.

    Raises:
        UserError: An adapter does not fit the base, or a trigger word is in no prompt.
    """
    pipe.unet.to(dtype=torch.float32 if adapter is None else dtype).train()
    make_trainable(pipe.unet, adapter, config.seed)
    save_memory(config, pipe.unet, dtype)

    encoders = text_encoders(pipe)
    words, vectors = start_words(config, pipe) if config.train_token else ([], {})
    for encoder in encoders.values():
        encoder.requires_grad_(False)
    key = ""
    if cache is not None and not config.train_text_encoder:
        key = hash_values(*map(hash_model, encoders.values()))  # before words make the tables longer
    add_trigger_words(pipe, words)
    ids = {name: tokenize(pipe, name, prompts) for name in encoders}
    changes = torch.full((len(prompts),), config.train_text_encoder)
    for name in vectors:
        tokens = [token_id(pipe, word, name) for word in words]
        look_up(encoders[name], tokens, vectors[name])
        for word, token in zip(words, tokens, strict=True):
            changes |= prompts_with(word, token, ids[name])
    known = encode_known(encoders, ids, (~changes).nonzero().flatten().tolist(), cache, key)
    if config.train_text_encoder:
        for name, encoder in encoders.items():
            make_trainable(encoder.train(), text_adapter, derive_seed(config.seed, name))
            if config.gradient_checkpointing:
                # The name of the call changes within transformers 5.
                enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
    elif not vectors:
        for name in encoders:
            setattr(pipe, name, None)
        encoders, ids = {}, {}
    return Concept(pipe.unet, known, encoders, ids, vectors, words)


def start_words(config: TrainConfig, pipe: Any) -> tuple[list[str], dict[str, nn.Parameter]]:
    """Return the words for the vectors of all trigger words, and what these start as: (words, hidden) by encoder."""
    words: list[str] = []
    starts: dict[str, list[Tensor]] = {name: [] for name in text_encoders(pipe)}
    for subject in config.subjects:
        words += words_of(subject.trigger_word, config.num_vectors)
        like = subject.initializer_token or subject.class_name or ""
        for name, vectors in starts.items():
            seed = derive_seed(config.seed, "vectors", subject.trigger_word, name)
            vectors.append(start_vectors(pipe, name, like, config.num_vectors, seed))
    return words, {name: nn.Parameter(torch.cat(vectors)) for name, vectors in starts.items()}


def prompts_with(word: str, token: int, ids: Tensor) -> Tensor:
    """Return which of the prompts, ids (prompts, 77), have a word's token: (prompts,).

    Raises:
        UserError: None of them.
    """
    found = (ids == token).any(dim=1)
    if not found.any():
        expected = f"expected it in a prompt, written just so and among the {ids.shape[1] - 2} tokens that are read"
        raise UserError(f"no prompt says {word!r}, so its vector cannot be trained; {expected}")
    return found
