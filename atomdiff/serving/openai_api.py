"""`POST /v1/images/generations` and `GET /v1/models`, in the shape of OpenAI's API."""

from __future__ import annotations

import base64
import random
import re
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from atomdiff.serving.errors import NotFoundError
from atomdiff.serving.generation import generate_png
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.request_body import RequestBody, naming
from atomdiff.utils.errors import UserError

router = APIRouter(tags=["images"])
MAX_SEED = 2**32 - 1  # of seeds that are drawn: every client can read it as a number


class ImageGeneration(RequestBody):
    """A request for images; fields of OpenAI's that have no meaning here are passed over."""

    prompt: str = Field(description="Prompt; `<atoms:NAME:0.8>` applies a concept with weight 0.8")
    n: Annotated[int, Field(ge=1, le=10, description="Images; their seeds count up")] = 1
    size: Annotated[str, Field(description='"512x512", width first; "auto": the base\'s own')] = "auto"
    response_format: Annotated[str, Field(description='"b64_json", or "png": the file itself')] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: Annotated[bool, Field(description="false only")] = False
    seed: Annotated[int, Field(ge=-1, description="-1: a random one")] = -1
    negative_prompt: str | None = None
    steps: Annotated[int, Field(description="Denoising steps")] = 30
    guidance_scale: Annotated[float, Field(description="1 turns guidance off")] = 7.5
    concepts: Annotated[dict[str, Any], Field(description="Name -> weight, beside the tags of the prompt")] = {}
    scheduler: str | None = None


class GeneratedImage(BaseModel):
    """An image."""

    b64_json: str
    seed: int


class GeneratedImages(BaseModel):
    """The images of a request."""

    created: int
    data: list[GeneratedImage]


@router.post("/v1/images/generations", response_model=GeneratedImages, responses={200: {"content": {"image/png": {}}}})
async def generate_images(body: ImageGeneration, http: Request) -> GeneratedImages | Response:
    """Generate images from a prompt, with any number of concepts."""
    _check_response_format(body)
    if body.stream:
        raise UserError("stream=true: expected false; images are sent when they are done")
    width, height = read_size(body.size)
    first = first_seed(body.seed, body.n)
    with naming(num_inference_steps="steps"):
        requests = [
            ImageRequest(
                body.prompt,
                negative_prompt=body.negative_prompt,
                seed=first + number,
                num_inference_steps=body.steps,
                guidance_scale=body.guidance_scale,
                height=height,
                width=width,
                concepts=body.concepts,
                scheduler=body.scheduler,
            )
            for number in range(body.n)
        ]
    files = await generate_png(http, requests)
    if body.response_format == "png":
        return Response(files[0], media_type="image/png")
    images = [
        GeneratedImage(b64_json=base64.b64encode(file).decode(), seed=request.seed)
        for file, request in zip(files, requests, strict=True)
    ]
    return GeneratedImages(created=int(time.time()), data=images)


def _check_response_format(body: ImageGeneration) -> None:
    if body.response_format not in ("b64_json", "png"):
        found = f"response_format={body.response_format!r}"
        raise UserError(f"{found}: expected b64_json, or png for the file itself; no image is kept for a URL")
    if body.response_format == "png" and body.n > 1:
        raise UserError(f"n={body.n}: expected 1 with response_format='png', or b64_json for several images")


@router.get("/v1/models")
def list_models(http: Request) -> dict[str, Any]:
    """List the base model, the only one; requests need not name it."""
    return {"object": "list", "data": [_describe_model(http)]}


@router.get("/v1/models/{name}")
def show_model(http: Request, name: str) -> dict[str, Any]:
    """Describe the base model."""
    model = _describe_model(http)
    if name != model["id"]:
        raise NotFoundError(f"there is no model {name!r}; this server has {model['id']!r}")
    return model


def _describe_model(http: Request) -> dict[str, Any]:
    return {"id": http.app.state.model_name, "object": "model", "created": 0, "owned_by": "atomdiff"}


def first_seed(seed: int, count: int) -> int:
    """Return the seed of the first of some images: the one that was asked for, or for -1 a random one."""
    return random.SystemRandom().randint(0, MAX_SEED - count) if seed < 0 else seed


def read_size(size: str) -> tuple[int | None, int | None]:
    """Return width and height of "WIDTHxHEIGHT"; None for both of "auto"."""
    if size == "auto":
        return None, None
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", size):
        return int(match[1]), int(match[2])
    raise UserError(f"size={size!r}: expected WIDTHxHEIGHT in pixels, such as 512x512, or auto")
