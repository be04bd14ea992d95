"""Image encoders: the models that metrics see images with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize


class ImageEncoder(Protocol):
    """A model that embeds images and recognizes what they show."""

    def embed(self, images: list[Image.Image]) -> Tensor:
        """Return embeddings (n, e); the larger the cosine of two, the more alike are the images' subjects."""

    def recognize(self, images: list[Image.Image], labels: Sequence[str]) -> list[str]:
        """Return a label for each image: the one, of these or of others that the encoder knows, that fits it best."""


class ClipEncoder:
    """CLIP (Radford et al., arXiv 2103.00020): the embeddings of CLIP-I, labels by zero-shot classification.

    Args:
        name: a local folder or an id on the Hub, such as "openai/clip-vit-base-patch32".
        device: where to compute.
        template: the text that a label is put into.
    """

    def __init__(
        self, name: str, device: str | torch.device = "cpu", template: str = "a photo taken in this place: {label}"
    ) -> None:
        from transformers import CLIPModel, CLIPProcessor  # only when asked for

        self.model: Any = CLIPModel.from_pretrained(name).to(device).eval()
        self.processor: Any = CLIPProcessor.from_pretrained(name)
        self.template = template

    def embed(self, images: list[Image.Image]) -> Tensor:
        """Return unit embeddings (n, e) on the CPU."""
        batches = [images[first : first + 32] for first in range(0, len(images), 32)]
        return torch.cat([self._encode(images=[image.convert("RGB") for image in batch]) for batch in batches])

    def recognize(self, images: list[Image.Image], labels: Sequence[str]) -> list[str]:
        """Return for each image the label whose text is nearest."""
        texts = self._encode(text=[self.template.format(label=label) for label in labels], padding=True)
        return [labels[i] for i in (self.embed(images) @ texts.T).argmax(1).tolist()]

    @torch.no_grad()
    def _encode(self, **inputs: Any) -> Tensor:
        """Return unit embeddings (n, e) of images or of texts."""
        prepared = self.processor(**inputs, return_tensors="pt").to(self.model.device)
        encode = self.model.get_image_features if "images" in inputs else self.model.get_text_features
        features = encode(**prepared)
        features = getattr(features, "pooler_output", features)  # transformers 5 returns more than the tensor
        return normalize(features.float(), dim=1).cpu()
