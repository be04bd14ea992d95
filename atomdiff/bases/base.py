"""What the package asks of a base architecture: to add one, fulfill `Base` in a file of this folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class PromptEmbeds(NamedTuple):
    """Conditioning on prompts, under the names of the arguments of diffusers' pipelines."""

    prompt_embeds: Tensor
    """What the denoiser attends to (prompts, tokens, hidden)."""
    pooled_prompt_embeds: Tensor | None
    """One vector a prompt (prompts, projected), where the base has it."""


class Base(Protocol):
    """A base architecture. Methods with a body suit most of diffusers' pipelines from text to images."""

    name: str
    """For people to read."""
    pipeline_class: str
    """Class in diffusers of its pipelines from text to images."""
    pipeline_options: Mapping[str, Any]
    """Options of that class for training: no safety checker, no watermark."""
    checkpoint_types: tuple[str, ...]
    """What diffusers calls its checkpoint files."""
    architectures: Mapping[str, str]
    """Each `modelspec.architecture` of it -> `ss_base_model_version` of kohya's sd-scripts, empty if there is none."""
    denoiser: str
    """Component that denoises."""
    denoiser_class: str
    """Class of the denoiser in diffusers."""
    text_encoders: tuple[str, ...]
    """Components that encode prompts, in the order of their embeddings."""
    block_names: Mapping[str, str]
    """Short name of a group of the denoiser's blocks -> its path: "up" -> "up_blocks"."""
    cross_attention_keys: str
    """How the paths end of the layers by which the denoiser attends to prompts, those that make the keys."""
    layer_prefixes: Mapping[str, tuple[str, ...]]
    """Component -> what the names of its layers start with in LoRA files, in those of kohya's sd-scripts first."""
    embedding_names: Mapping[str, str]
    """Text encoder -> name of its vectors in files of token embeddings."""
    takes_flow_scheduler: bool
    """Whether its pipelines generate with a FlowMatchEulerDiscreteScheduler as it is."""

    def matches(self, components: Mapping[str, Any]) -> bool:
        """Return whether these components of a pipeline, by name, are of this architecture."""
        ...

    def architecture(self, pipe: Any) -> str:
        """Return which of `architectures` a pipeline is, or "other"."""
        ...

    def size_multiple(self, pipe: Any) -> int:
        """Return what the sides of training images must be multiples of, in pixels."""
        ...

    def encode_prompts(self, text_encoders: Sequence[Any], token_ids: Sequence[Tensor]) -> PromptEmbeds:
        """Encode prompts, given as token ids (prompts, tokens) for each text encoder, exactly as the pipeline does."""
        ...

    def denoise(
        self, denoiser: Any, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds, time_ids: Tensor | None
    ) -> Tensor:
        """Return the denoiser's prediction (batch, c, h, w).

        Args:
            denoiser: the model.
            latents: noisy latents (batch, c, h, w).
            timesteps: of each sample (batch,).
            embeds: conditioning on the prompt of each sample.
            time_ids: for bases that are conditioned on them, of each image in pixels (batch, 6): original height and
                width, crop top and left, target height and width.
        """
        ...

    def layer_path(self, component: str, module: str, model: Any) -> str:
        """Return the path by which kohya's sd-scripts name a layer, whose path in diffusers is `module`.

        Raises:
            UserError: they have no name for it.
        """
        if component == self.denoiser or module.startswith("text_"):
            return module
        return f"text_model.{module}"  # transformers 5 took this level out of CLIPTextModel

    def layer_paths(self, component: str, module: str, model: Any) -> list[str]:
        """Return the paths by which files of any program name a layer, whose path in diffusers is `module`."""
        if component == self.denoiser:
            return [module]
        short = module.removeprefix("text_model.")
        return [short, f"text_model.{short}"]

    def native_size(self, pipe: Any) -> tuple[int, int] | None:
        """Return height and width in pixels of the images that a base was trained on; None: it does not say."""
        config = getattr(pipe.components.get(self.denoiser), "config", None)
        side = getattr(config, "sample_size", None)
        if side is None:
            return None
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        factor = int(getattr(pipe, "vae_scale_factor", 8))
        return height * factor, width * factor

    def generates_from_text(self, pipeline: type) -> bool:
        """Return whether pipelines of a class generate images from text alone, with the denoiser of this base."""
        parts = inspect.signature(pipeline.__init__).parameters  # type: ignore[misc]
        if not {self.denoiser, "vae", "text_encoder", "tokenizer"} <= parts.keys():
            return False
        call: Any = pipeline.__call__
        takes_image = "image" in inspect.signature(call).parameters
        return self.denoiser_class in str(parts[self.denoiser].annotation) and not takes_image
