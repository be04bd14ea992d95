"""`/sdapi/v1/...`: what clients of AUTOMATIC1111's WebUI use of its API."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from atomdiff.serving.generation import generate_png
from atomdiff.serving.image_request import ImageRequest
from atomdiff.serving.openai_api import first_seed
from atomdiff.serving.request_body import RequestBody, naming
from atomdiff.serving.schedulers import SCHEDULERS
from atomdiff.utils.errors import UserError

router = APIRouter(prefix="/sdapi/v1", tags=["WebUI"])
_MAX_IMAGES = 10
_BY_WEBUI_NAME = {spec.webui_name.lower(): name for name, spec in SCHEDULERS.items()} | {n: n for n in SCHEDULERS}
_AUTOMATIC = ("", "automatic")
_NONE = ("", "None")  # as the WebUI's lists of styles and checkpoints have it
_SETTINGS = ("sd_model_checkpoint", "CLIP_stop_at_last_layers")  # those that would change images; others are ignored


class TextToImage(RequestBody):
    """A request of a client of the WebUI; fields that would change the image in ways unknown here are refused."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: Annotated[int, Field(description="-1: a random one")] = -1
    steps: int = 30
    cfg_scale: float = 7.0
    width: int | None = None
    height: int | None = None
    batch_size: Annotated[int, Field(ge=1, le=_MAX_IMAGES)] = 1
    n_iter: Annotated[int, Field(ge=1, le=_MAX_IMAGES)] = 1
    sampler_name: str = ""
    sampler_index: str = ""
    scheduler: Annotated[str, Field(description='"Karras" for some samplers')] = ""
    override_settings: dict[str, Any] = {}
    send_images: bool = True
    enable_hr: bool = False
    alwayson_scripts: dict[str, Any] = {}
    script_name: str = ""
    styles: list[str] = []
    tiling: bool = False
    subseed_strength: float = 0.0
    seed_resize_from_w: int = 0
    seed_resize_from_h: int = 0
    refiner_checkpoint: str = ""


class TextToImageAnswer(BaseModel):
    """The images, in base64, and how they were made."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


@router.post("/txt2img")
async def txt2img(body: TextToImage, http: Request) -> TextToImageAnswer:
    """Generate images from a prompt; `<lora:NAME:WEIGHT>` names concepts of the library."""
    for name, value in _further_steps(body).items():
        if value:
            raise UserError(f"{name}={value!r}: this server has no such step; leave it out")
    _check_settings(body.override_settings, http.app.state.model_name)
    requests = _image_requests(body)
    info = _describe_images(body, [request.seed for request in requests], http)
    files = await generate_png(http, requests, [{"parameters": text} for text in info["infotexts"]])
    images = [base64.b64encode(file).decode() for file in files] if body.send_images else []
    return TextToImageAnswer(images=images, parameters=body.model_dump(), info=json.dumps(info))


def _further_steps(body: TextToImage) -> dict[str, Any]:
    """Return what would change the image beside what is known here, as far as the WebUI would do anything about it."""
    names = ("enable_hr", "alwayson_scripts", "script_name", "tiling", "subseed_strength")
    resized_from = body.seed_resize_from_w, body.seed_resize_from_h
    return {
        **{name: getattr(body, name) for name in names},
        "styles": [style for style in body.styles if style not in _NONE],
        "seed_resize_from_w": body.seed_resize_from_w if min(resized_from) > 0 else 0,
        "refiner_checkpoint": "" if body.refiner_checkpoint in _NONE else body.refiner_checkpoint,
    }


def _image_requests(body: TextToImage) -> list[ImageRequest]:
    count = body.batch_size * body.n_iter
    if count > _MAX_IMAGES:
        raise UserError(f"batch_size times n_iter is {count}; expected at most {_MAX_IMAGES}")
    first = first_seed(body.seed, count)
    with naming(num_inference_steps="steps", guidance_scale="cfg_scale"):
        return [
            ImageRequest(
                body.prompt,
                negative_prompt=body.negative_prompt or None,
                seed=first + number,
                num_inference_steps=body.steps,
                guidance_scale=body.cfg_scale,
                height=body.height,
                width=body.width,
                scheduler=_scheduler(body.sampler_name or body.sampler_index, body.scheduler),
            )
            for number in range(count)
        ]


def _describe_images(body: TextToImage, seeds: list[int], http: Request) -> dict[str, Any]:
    """Describe images by the names and in the words of the WebUI."""
    model, (height, width) = http.app.state.model_name, http.app.state.engine.native_size
    height, width = body.height or height, body.width or width
    sampler = body.sampler_name or body.sampler_index
    settings = {
        "Steps": body.steps,
        "Sampler": sampler or None,
        "CFG scale": f"{body.cfg_scale:g}",
        "Size": f"{width}x{height}",
        "Model": model,
    }
    text = ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)
    negative = f"Negative prompt: {body.negative_prompt}\n" if body.negative_prompt else ""
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(seeds),
        "negative_prompt": body.negative_prompt,
        "all_negative_prompts": [body.negative_prompt] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "steps": body.steps,
        "cfg_scale": body.cfg_scale,
        "width": width,
        "height": height,
        "batch_size": body.batch_size,
        "sampler_name": sampler,
        "sd_model_name": model,
        "infotexts": [f"{body.prompt}\n{negative}{text}, Seed: {seed}" for seed in seeds],
    }


@router.get("/loras")
def loras(http: Request) -> list[dict[str, Any]]:
    """List the concepts of the library as LoRAs, which clients write into prompts as `<lora:NAME:WEIGHT>`.

    What to write besides is in their metadata.
    """
    concepts = http.app.state.engine.concepts
    if concepts is None:
        return []
    concepts.library.refresh()
    return [
        {
            "name": info.name,
            "alias": info.name,  # some clients write it into the tag
            "path": info.path.name,
            "metadata": {"modelspec.trigger_phrase": info.trigger_phrase} if info.trigger_phrase else {},
        }
        for info in concepts.library.infos()
    ]


@router.get("/sd-models")
def sd_models(http: Request) -> list[dict[str, Any]]:
    """List the base model."""
    name = http.app.state.model_name
    return [{"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}]


@router.get("/options")
def options(http: Request) -> dict[str, Any]:
    """Show the settings that mean something here."""
    return dict(zip(_SETTINGS, (http.app.state.model_name, 1), strict=True))


@router.post("/options")
def set_options(settings: dict[str, Any], http: Request) -> dict[str, Any]:
    """Take settings that are as they are; those that mean nothing here are passed over."""
    _check_settings(settings, http.app.state.model_name)
    return {}


@router.post("/refresh-loras")
def refresh_loras() -> dict[str, Any]:
    """Do nothing: new files of the library are found without."""
    return {}


@router.get("/samplers")
def samplers() -> list[dict[str, Any]]:
    """List the schedulers by the names that the WebUI has for them."""
    return [{"name": spec.webui_name, "aliases": [name], "options": {}} for name, spec in SCHEDULERS.items()]


@router.get("/schedulers")
def noise_schedules() -> list[dict[str, Any]]:
    """List what the WebUI calls schedulers: the spacing of the noise levels."""
    return [{"name": name.lower(), "label": name, "aliases": []} for name in ("Automatic", "Karras")]


@router.get("/upscalers")
@router.get("/sd-vae")
def nothing() -> list[dict[str, Any]]:
    """List what there is none of here; clients ask for it when they connect."""
    return []


def _check_settings(settings: Mapping[str, Any], model: str) -> None:
    """Check that settings of the WebUI ask for nothing that is not so."""
    for name, expected in zip(_SETTINGS, (model, 1), strict=True):
        if settings.get(name) not in (None, "", expected):
            raise UserError(f"{name}={settings[name]!r}: this server has {expected!r} only; leave it out")


def _scheduler(sampler: str, schedule: str) -> str | None:
    """Find a scheduler by the WebUI's names: "DPM++ 2M" with "Karras", or "DPM++ 2M Karras" as until version 1.8."""
    wanted = "" if sampler.lower() in _AUTOMATIC else sampler.lower()
    if schedule.lower() not in _AUTOMATIC and not wanted.endswith(schedule.lower()):
        wanted = f"{wanted} {schedule.lower()}"
    if not wanted:
        return None
    if (found := _BY_WEBUI_NAME.get(wanted)) is None:
        known = ", ".join(spec.webui_name for spec in SCHEDULERS.values())
        asked = f"sampler_name={sampler!r}" + (f", scheduler={schedule!r}" if schedule else "")
        raise UserError(f"{asked}: expected one of {known}, or none for the base's own")
    return found
