"""Lone images, to compare those of the server with, and what is in its answers."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.sampling.adapter_cache import AdapterCache
from atomdiff.sampling.prompt_requests import read_requests
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.schedulers import named_scheduler

GENERATE = "/v1/images/generations"
TOLERANCE = 1e-4


class Alone:
    """Generates each request alone with the pipeline's own call, merged as `atomdiff sample` does it."""

    def __init__(self, pipe, library):
        self.pipe, self.library, self.scheduler = pipe, ConceptLibrary(library), pipe.scheduler
        self.cache = AdapterCache(pipe)

    def __call__(self, request):
        """The image (3, h, w) from 0 to 1."""
        tags = "".join(f" <atoms:{name}:{weight}>" for name, weight in request.concepts.items())
        (prompt,) = read_requests([request.prompt + tags], library=self.library)
        self.pipe.scheduler = (
            named_scheduler(request.scheduler, self.scheduler) if request.scheduler else self.scheduler
        )
        with self.cache.use([prompt]):
            texts = [prompt.text, request.negative_prompt]
            text, negative = (each and self.cache.replace_trigger_words(prompt, each) for each in texts)
            return self.pipe(
                text,
                negative_prompt=negative,
                generator=torch.Generator().manual_seed(request.seed),
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                height=request.height,
                width=request.width,
                output_type="pt",
            ).images[0]


def ask(prompt="a photo of a red mug", steps=3, **fields):
    """A short request."""
    return ImageRequest(prompt, num_inference_steps=steps, **{"guidance_scale": 3.0, **fields})


def pixels_of(text):
    """The pixels of an image in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


def pixels(image):
    """The pixels of an image (3, h, w) from 0 to 1."""
    return (image.permute(1, 2, 0) * 255).round().numpy().astype(int)


def message_of(answer, status):
    """The message of an error of this status."""
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]
