"""Lone images, to compare those of the server with."""

import torch

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.sampling.adapter_cache import AdapterCache
from atomdiff.sampling.prompt_requests import read_requests
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.schedulers import named_scheduler

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
