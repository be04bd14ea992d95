"""Mixed batches in pipelines whose guidance has any number of groups."""

import copy

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPAGPipeline, UNet2DConditionModel

import atomdiff
from tests.helpers import add_adapter
from tests.pipelines.helpers import VARIANTS, generate, noise

PROMPTS = ["a photo of a mug", "a red cat", "the beach"]


def edit_pipe(template):
    """A pipeline that has one group for text and image, one for the image alone, and one for neither."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(template.unet.config, in_channels=8)
    parts = copy.deepcopy(template).components | {"unet": unet.eval()}
    return StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)


def perturbed_pipe(template):
    """A pipeline that has a group without attention besides those of guidance."""
    parts = copy.deepcopy(template).components
    return StableDiffusionPAGPipeline(**parts, pag_applied_layers="mid", requires_safety_checker=False)


GROUPS = {
    "one, edit": (edit_pipe, {"guidance_scale": 1.0}, 1),
    "three, edit": (edit_pipe, {"image_guidance_scale": 1.5}, 3),
    "one, perturbed": (perturbed_pipe, {"guidance_scale": 1.0, "pag_scale": 0.0}, 1),
    "two, plain": (perturbed_pipe, {"pag_scale": 0.0}, 2),
    "two, perturbed": (perturbed_pipe, {"guidance_scale": 1.0, "pag_scale": 2.0}, 2),
    "three, perturbed": (perturbed_pipe, {"pag_scale": 2.0}, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("kind", GROUPS)
def test_any_number_of_guidance_groups(pipe_template, kind, images):
    make, options, groups = GROUPS[kind]
    pipe = make(pipe_template)
    pipe.set_progress_bar_config(disable=True)
    add_adapter(pipe, "spatial", VARIANTS["spatial"])
    add_adapter(pipe, "separable", VARIANTS["separable"], ("unet", "text_encoder"), seed=1)
    samples = ["spatial", None, {"separable": 0.7}]
    latents = noise(3 * images)
    inputs = torch.rand(3 * images, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def generate_some(prompts, which, **more):
        more |= {"image": inputs[which]} if make is edit_pipe else {}
        return generate(pipe, prompts, latents[which], **options, **more)

    expected = []
    for number, (sample, prompt) in enumerate(zip(samples, PROMPTS, strict=False)):
        atomdiff.set_active(pipe, {} if sample is None else sample)
        for one in range(number * images, (number + 1) * images):
            expected.append(generate_some([prompt], slice(one, one + 1)))
    atomdiff.restore(pipe)
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    before = sorted(vars(pipe))
    with atomdiff.mixed_batch(pipe, samples):
        mixed = generate_some(PROMPTS[:3], slice(None), num_images_per_prompt=images)
    assert set(sizes) == {groups * 3 * images} and sorted(vars(pipe)) == before
    torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-5, rtol=0)
