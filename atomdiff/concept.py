"""What a training run optimises, as one module: the adapted UNet and the trigger word's vector."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import CLIPTextModel, CLIPTokenizer

from atomdiff.method import make_trainable
from atomdiff.train_config import TrainConfig
from atomdiff.trigger_words import add_trigger_word


class Concept(nn.Module):
    """A UNet that gets its prompts as numbers: the states of most are known, only the others are encoded in each step.

    Args:
        unet: The denoiser, with its adapter.
        known_states: The text encoder's states (77, hidden) by prompt number.
        text_encoder: Encodes the prompts whose states change, looking up `token_vector`; None if there are none.
        prompt_ids: The token ids (prompts, 77) of all prompts.
        token_vector: The trigger word's vector (hidden,), or None.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        known_states: Mapping[int, Tensor],
        text_encoder: CLIPTextModel | None = None,
        prompt_ids: Tensor | None = None,
        token_vector: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.token_vector = token_vector
        self.known_states = known_states
        self.prompt_ids = prompt_ids

    def forward(self, latents: Tensor, timesteps: Tensor, prompts: Sequence[int]) -> Tensor:
        """Return the UNet's prediction (batch, c, h, w) for the prompts of these numbers, one a sample."""
        prediction: Tensor = self.unet(latents, timesteps, self.text_states(prompts), return_dict=False)[0]
        return prediction

    def text_states(self, prompts: Sequence[int]) -> Tensor:
        """Return the states (batch, 77, hidden) of the prompts of these numbers; each is encoded once at most."""
        states = dict(self.known_states)
        changing = sorted(set(prompts) - states.keys())
        if changing:
            assert self.text_encoder is not None and self.prompt_ids is not None
            states.update(zip(changing, encode(self.text_encoder, self.prompt_ids[changing]), strict=True))
        stacked = torch.stack([states[prompt] for prompt in prompts])
        if self.token_vector is not None and not changing:
            stacked = stacked + 0 * self.token_vector.sum()  # several processes need every parameter to have a gradient
        return stacked

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def build_concept(
    config: TrainConfig,
    pipe: StableDiffusionPipeline,
    adapter: PeftConfig | None,
    prompts: Sequence[str],
    dtype: torch.dtype,
) -> Concept:
    """Add the adapter to the UNet and the trigger word to the tokenizer; the text encoder goes unless it is needed.

    Args:
        config: The run.
        pipe: The base; what is trained becomes part of it.
        adapter: The method, None for training the whole UNet.
        prompts: All prompts.
        dtype: Of the UNet's weights that are not trained.

    Raises:
        UserError: The adapter does not fit the base.
    """
    pipe.unet.to(dtype=dtype).train()
    make_trainable(pipe.unet, adapter, config.seed)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if config.plain_attention:
        pipe.unet.set_attn_processor(AttnProcessor())
    if config.enable_xformers_memory_efficient_attention:
        pipe.unet.enable_xformers_memory_efficient_attention()

    pipe.text_encoder.requires_grad_(False)
    vector, changes = None, torch.zeros(len(prompts), dtype=torch.bool)
    if config.train_token:
        (subject,) = config.subjects
        vector = nn.Parameter(word_vector(pipe, subject.initializer_token or subject.class_name or ""))
        token = add_trigger_word(pipe, subject.trigger_word)
        look_up(pipe.text_encoder, token, vector)
        changes = (tokenize(pipe.tokenizer, prompts) == token).any(dim=1)
    ids = tokenize(pipe.tokenizer, prompts)
    with torch.no_grad():
        known = {n: encode(pipe.text_encoder, ids[[n]])[0] for n in range(len(prompts)) if not changes[n]}
    if vector is None:
        pipe.text_encoder = None
    return Concept(pipe.unet, known, pipe.text_encoder, ids, vector)


def encode(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Return the states (batch, 77, hidden) that a UNet attends to, in float32, for token ids (batch, 77)."""
    states: Tensor = text_encoder(ids.to(text_encoder.device))[0]
    return states.float()


def look_up(text_encoder: CLIPTextModel, token: int, vector: Tensor) -> RemovableHandle:
    """Make `vector` (hidden,) what the embedding table answers for the id `token`; the table itself does not change.

    Returns:
        A handle whose `remove()` undoes this.
    """

    def replace(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        named = (inputs[0] == token)[..., None]  # (batch, 77, 1)
        return torch.where(named, vector.to(output.dtype), output)

    return text_encoder.get_input_embeddings().register_forward_hook(replace)


def word_vector(pipe: StableDiffusionPipeline, words: str) -> Tensor:
    """Return the mean embedding (hidden,) of the tokens of `words`, in float32."""
    ids = pipe.tokenizer(words, add_special_tokens=False).input_ids
    table: Tensor = pipe.text_encoder.get_input_embeddings().weight
    return table[ids].detach().float().mean(dim=0)


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Return the token ids (prompts, 77), prompts that are too long cut off as the pipelines do."""
    ids: Tensor = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids
