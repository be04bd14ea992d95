"""Concepts for sampling jobs, and the images that the jobs leave."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import atomdiff
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.sampling.generate import generate

QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0}


def pixels(image):
    """The pixels of an image, to subtract from others."""
    return np.asarray(image).astype(int)


def write_concept(pipe, path, seed=0):
    """A random concept with the trigger word "sks"."""
    generator = torch.Generator().manual_seed(seed)
    pipe.unet.add_adapter(atomdiff.AtomConfig(target_modules=["conv1"]))
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith("default") and "delta" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    add_placeholder_token(pipe, "sks")
    set_token_embedding(pipe, "sks", {"text_encoder": torch.randn(32, generator=generator)})
    path.parent.mkdir(exist_ok=True, parents=True)
    atomdiff.save_atoms(pipe, path, trigger_phrase="sks mug")
    atomdiff.unload_atoms(pipe)
    return str(path)


def image_files(config):
    """File name of each image of a job -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(Path(config.output_dir).glob("*-seed*.png"))}


def concepts_in_images(config):
    """Prompt -> concepts, as the images of a job tell them."""
    found = {}
    for name in image_files(config):
        with Image.open(Path(config.output_dir) / name) as image:
            found[image.text["prompt"]] = json.loads(image.text["concepts"])
    return found


def image_of(config, prompt, seed=0):
    """An image of a finished job."""
    images = json.loads((Path(config.output_dir) / "manifest.json").read_text())["images"]
    (file,) = [image["file"] for image in images if (image["prompt"], image["seed"]) == (prompt, seed)]
    return pixels(Image.open(Path(config.output_dir) / file))


def generate_alone(pipe, library, text, weights, seed=0, **changes):
    """An image generated with nothing else in the pipeline, by its own words, unmerged where weights are numbers."""
    for number, name in enumerate(weights):
        word = "sks" if len(weights) == 1 else f"w{number}"
        atomdiff.load_atoms(pipe, library / f"{name}.atoms.safetensors", f"c{number}", trigger_word=word)
    names = [f"c{number}" for number in range(len(weights))]
    if all(isinstance(weight, float) for weight in weights.values()):
        pipe.set_adapters(names, list(weights.values())) if names else None
    else:
        atomdiff.set_active(pipe, dict(zip(names, weights.values(), strict=True)))
    image = generate(pipe, [text], seeds=[seed], progress=False, **{**QUICK, **changes})[0]
    atomdiff.unload_atoms(pipe)
    return pixels(image)
