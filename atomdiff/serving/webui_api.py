"""`/sdapi/v1/...`: what clients of AUTOMATIC1111's WebUI use of its API."""

from __future__ import annotations

import base64
import json
import random
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from atomdiff.serving.generation import generate_png
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.openai_api import MAX_SEED
from atomdiff.serving.schedulers import SCHEDULERS
from atomdiff.utils.errors import UserError

router = APIRouter(prefix="/sdapi/v1", tags=["WebUI"])
_MAX_IMAGES = 10
_BY_WEBUI_NAME = {spec.webui_name.lower(): name for name, spec in SCHEDULERS.items()} | {n: n for n in SCHEDULERS}
_AUTOMATIC = ("", "automatic")


class TextToImage(BaseModel):
    """A request of a client of the WebUI; fields that would change the image in ways unknown here are refused."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = ""
    negative_prompt: str = ""
    seed: Annotated[int, Field(description="-1: a random one")] = -1
    steps: int = 30
    cfg_scale: float = 7.0
    width: int | None = None
    height: int | None = None
    batch_size: Annotated[int, Field(ge=1, le=_MAX_IMAGES)] = 1
    n_iter: Annotated[int, Field(ge=1, le=_MAX_IMAGES)] = 1
    sampler_name: str | None = None
    sampler_index: str | None = None
    enable_hr: bool = False
    alwayson_scripts: dict[str, Any] = {}
    script_name: str | None = None


class TextToImageAnswer(BaseModel):
    """The images, in base64, and how they were made."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


@router.post("/txt2img")
async def txt2img(body: TextToImage, http: Request) -> TextToImageAnswer:
    """Generate images from a prompt; `<lora:NAME:WEIGHT>` names concepts of the library."""
    for name in ("enable_hr", "alwayson_scripts", "script_name"):
        if getattr(body, name):
            raise UserError(f"{name}={getattr(body, name)!r}: this server has no such step; leave it out")
    count = body.batch_size * body.n_iter
    if count > _MAX_IMAGES:
        raise UserError(f"batch_size times n_iter is {count}; expected at most {_MAX_IMAGES}")
    first = random.SystemRandom().randint(0, MAX_SEED - count) if body.seed < 0 else body.seed
    requests = [
        ImageRequest(
            body.prompt,
            negative_prompt=body.negative_prompt or None,
            seed=first + number,
            num_inference_steps=body.steps,
            guidance_scale=body.cfg_scale,
            height=body.height,
            width=body.width,
            scheduler=_scheduler(body.sampler_name or body.sampler_index or ""),
        )
        for number in range(count)
    ]
    files = await generate_png(http, requests)
    seeds = [request.seed for request in requests]
    info = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "seed": first,
        "all_seeds": seeds,
        "all_prompts": [body.prompt] * count,
        "steps": body.steps,
        "cfg_scale": body.cfg_scale,
        "sampler_name": body.sampler_name or body.sampler_index or "",
    }
    images = [base64.b64encode(file).decode() for file in files]
    return TextToImageAnswer(images=images, parameters=body.model_dump(), info=json.dumps(info))


@router.get("/loras")
def loras(http: Request) -> list[dict[str, Any]]:
    """List the concepts of the library as LoRAs, which clients write into prompts as `<lora:NAME:WEIGHT>`."""
    concepts = http.app.state.engine.concepts
    if concepts is None:
        return []
    infos = [concepts.library.info(name) for name in concepts.library]
    return [
        {"name": info.name, "alias": info.trigger_phrase or info.name, "path": info.path.name, "metadata": {}}
        for info in infos
    ]


@router.get("/sd-models")
def sd_models(http: Request) -> list[dict[str, Any]]:
    """List the base model."""
    name = http.app.state.model_name
    return [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}]


@router.get("/samplers")
def samplers() -> list[dict[str, Any]]:
    """List the schedulers by the names that the WebUI has for them."""
    return [{"name": spec.webui_name, "aliases": [name], "options": {}} for name, spec in SCHEDULERS.items()]


def _scheduler(name: str) -> str | None:
    if name.lower() in _AUTOMATIC:
        return None
    if (found := _BY_WEBUI_NAME.get(name.lower())) is None:
        known = ", ".join(spec.webui_name for spec in SCHEDULERS.values())
        raise UserError(f"sampler_name={name!r}: expected one of {known}, or none for the base's own")
    return found
