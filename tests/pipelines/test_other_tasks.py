"""Concepts in diffusers' pipelines of other tasks, which share the models of a text-to-image pipeline."""

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

import atomdiff
from tests.sampling.helpers import write_concept

SIZE = {"height": 32, "width": 32}


def img2img(pipe, image):
    return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), {"image": image}


def inpaint(pipe, image):
    mask = Image.linear_gradient("L").resize(image.size)
    pipe = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    return pipe, {"image": image, "mask_image": mask, **SIZE}


def controlnet(pipe, image):
    model = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8))
    for module in model.controlnet_down_blocks:
        torch.nn.init.normal_(module.weight, std=0.1)  # zero at the start of its training
    pipe = StableDiffusionControlNetPipeline(**pipe.components, controlnet=model, requires_safety_checker=False)
    return pipe, {"image": image, **SIZE}


@pytest.mark.slow
@pytest.mark.parametrize("task", [img2img, inpaint, controlnet])
def test_concepts_act_and_leave_no_trace(task, tiny_pipe, tmp_path):
    concept = write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors")
    pipe, inputs = task(tiny_pipe, Image.radial_gradient("L").resize((32, 32)).convert("RGB"))
    pipe.set_progress_bar_config(disable=True)

    def generate():
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "generator": generator, "output_type": "latent", **inputs}
        return pipe("a photo of sks mug", **options).images

    base = generate()
    atomdiff.load_atoms(pipe, concept, adapter_name="mug")
    expected = generate()
    assert (expected - base).abs().max() > 0.01
    atomdiff.set_active(pipe, "mug")
    torch.testing.assert_close(generate(), expected, atol=1e-4, rtol=0)
    with atomdiff.mixed_batch(pipe, ["mug"]):
        torch.testing.assert_close(generate(), expected, atol=1e-4, rtol=0)
    atomdiff.set_active(pipe, {"mug": {"steps": {0: 1, 1: 0}}})
    assert (generate() - expected).abs().max() > 1e-4
    atomdiff.unload_atoms(pipe)
    assert torch.equal(generate(), base)
