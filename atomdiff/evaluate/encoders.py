"""Image encoders: the models that metrics see images with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import list_some

TOYBOX = "toybox"
_EXPECTED = 'expected a vision model of transformers, a folder or a Hub id such as "facebook/dino-vits16"'
_TEXTS = ["a photo of a dog", "a photo of a cat"]  # as long, so that unknown words are the same


class ImageEncoder(Protocol):
    """A model that embeds images."""

    def embed(self, images: list[Image.Image]) -> Tensor:
        """Return embeddings (n, e); the larger the cosine of two, the more alike are the images' subjects."""


@runtime_checkable
class TextEncoder(Protocol):
    """An image encoder that embeds texts too, close to the images that show what they say."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings (n, e), as long as those of images."""


@runtime_checkable
class Recognizer(Protocol):
    """An image encoder that names what an image shows."""

    def recognize(self, images: list[Image.Image], labels: Sequence[str]) -> list[str]:
        """Return a label for each image: the one, of these or of others that the encoder knows, that fits it best."""


class VisionEncoder:
    """A vision model of transformers, such as DINO, DINOv2, CLIP or SigLIP.

    The embedding is what the literature compares: of a model with a text encoder, or of its vision part with the
    projection, the projected image features (CLIP-I; Radford et al., arXiv 2103.00020), of one with a class token that
    token behind the last normalization (DINO; Caron et al., arXiv 2104.14294), of others their pooled output.

    Args:
        name: a local folder or an id on the Hub, such as "facebook/dino-vits16".
        device: where to compute, in float32.
        revision: on the Hub.
        batch_size: images or texts at once.

    Raises:
        UserError: it cannot be loaded, its files lack weights or a tokenizer, or it does not embed images the same way
            each time.
    """

    def __init__(
        self, name: str, device: str | torch.device = "cpu", *, revision: str | None = None, batch_size: int = 32
    ) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer  # only when asked for

        self.name, self.device, self.batch_size = name, torch.device(device), batch_size
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(name, revision=revision)
            self.model, lacking = _load_model(name, revision)
            has_text = hasattr(self.model, "get_text_features")
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision) if has_text else None
        except Exception as error:  # transformers raises many kinds of damaged files
            raise _cannot_load(name, error) from error
        self.model.to(self.device).eval()
        if has_text:
            self.embed_texts = self._embed_texts  # makes it a TextEncoder
        self._check(lacking)

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit embeddings (n, e) on the CPU."""
        batches = (images[first : first + self.batch_size] for first in range(0, len(images), self.batch_size))
        return torch.cat([self._embed_batch(batch) for batch in batches])

    @torch.no_grad()
    def _embed_batch(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device)
        if self.tokenizer is not None:
            return _unit(_pooled(self.model.get_image_features(pixel_values=pixels)))
        output = self.model(pixel_values=pixels)
        if hasattr(getattr(self.model, "embeddings", None), "cls_token"):
            return _unit(output.last_hidden_state[:, 0])
        return _unit(_pooled(output))

    @torch.no_grad()
    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit embeddings (n, e) on the CPU; texts that are too long lose their ends."""
        length = self.model.config.text_config.max_position_embeddings
        embedded = []
        for first in range(0, len(texts), self.batch_size):
            batch = list(texts[first : first + self.batch_size])
            padded = {"padding": "max_length", "max_length": length, "truncation": True}  # as SigLIP was trained
            inputs = self.tokenizer(batch, **padded, return_tensors="pt").to(self.device)
            embedded.append(_unit(_pooled(self.model.get_text_features(**inputs))))
        return torch.cat(embedded)

    def _check(self, lacking: Sequence[str]) -> None:
        """Refuse a model that does not embed images and texts, or that masks or drops parts of them at random.

        Args:
            lacking: names of the weights that its files lack.
        """
        probe = [Image.linear_gradient("L").convert("RGB")]
        try:
            once, again = self.embed(probe), self.embed(probe)
            texts = self._embed_texts(_TEXTS) if self.tokenizer is not None else once
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError) as error:
            kind, reason = type(self.model).__name__, " ".join(str(error).split())
            raise UserError(f"the encoder {self.name!r}: found a {kind} ({reason}); {_EXPECTED}") from error
        if not (once.isfinite().all() and texts.isfinite().all()):
            raise UserError(f"the encoder {self.name!r}: {_why_not_finite(lacking)}")
        if not torch.allclose(once, again, atol=1e-4):
            raise UserError(f"the encoder {self.name!r} embeds the same image in two ways; {_EXPECTED}")
        if self.tokenizer is not None and len({*map(tuple, self.tokenizer(_TEXTS)["input_ids"])}) < len(_TEXTS):
            found = f"its tokenizer reads {_TEXTS[0]!r} and {_TEXTS[1]!r} as the same"
            expected = "expected its vocabulary (tokenizer.json, or vocab.json and merges.txt) beside the weights"
            raise UserError(f"the encoder {self.name!r}: {found}; {expected}")


def _load_model(name: str, revision: str | None) -> tuple[Any, list[str]]:
    """Load a model, and name the weights that its files lack.

    transformers would leave those random and say so in its log alone. They become NaN here, and so does what depends on
    them: DINO's pooling layer may be missing, as nothing does.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, revision=revision)
    written_as = (getattr(config, "architectures", None) or [""])[0]
    has_projection = written_as.endswith("VisionModelWithProjection")  # AutoModel leaves that out
    kind: Any = getattr(transformers, written_as) if has_projection else transformers.AutoModel
    options: dict[str, Any] = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, found = kind.from_pretrained(name, revision=revision, **options)
    lacking = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    state = model.state_dict()
    for each in lacking:
        if each in state and state[each].is_floating_point():
            state[each].fill_(torch.nan)
    return model, lacking


def _why_not_finite(lacking: Sequence[str]) -> str:
    if not lacking:
        return "its embeddings are not finite, as some of its weights may be; expected the weights as published"
    found = f"its files lack weights, or have them in other shapes than its config.json says ({list_some(lacking)})"
    return f"{found}; expected a complete model of transformers, with the names that its save_pretrained writes"


def _pooled(output: Any) -> Tensor:
    """Return features (n, e) of what a model returns: a tensor, or an output with pooled or unpooled states."""
    projected = output if isinstance(output, Tensor) else getattr(output, "image_embeds", None)
    features = projected if projected is not None else getattr(output, "pooler_output", None)
    if features is None:
        states = output.last_hidden_state  # (n, tokens, e) or (n, e, h, w)
        features = states.mean(1) if states.ndim == 3 else states.mean((2, 3))
    return features.flatten(1)


def _unit(features: Tensor) -> Tensor:
    return normalize(features.float(), dim=1).cpu()


def check_encoder(name: str, revision: str | None = None) -> None:
    """Refuse an encoder that is not there, without loading its weights.

    Args:
        name: as for `open_encoders`.
        revision: on the Hub.

    Raises:
        UserError: it has no config.
    """
    if name == TOYBOX:
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"the encoder {name!r} cannot be loaded ({reason}); {_EXPECTED}")


def open_encoders(names: Sequence[str], device: str | torch.device) -> dict[str, ImageEncoder]:
    """Load encoders by name.

    Args:
        names: as for `VisionEncoder`, or `toybox`: the judge of the embedded model's images.
        device: where to compute.

    Raises:
        UserError: one cannot be loaded.
    """
    return {name: _toybox() if name == TOYBOX else VisionEncoder(name, device) for name in dict.fromkeys(names)}


def _toybox() -> ImageEncoder:
    from atomdiff.toybox.judge import load_judge

    return load_judge()
