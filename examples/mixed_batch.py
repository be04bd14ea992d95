"""One batch in which every prompt has its own concept: python examples/mixed_batch.py BASE CONCEPT [CONCEPT ...]."""

import argparse

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import atomdiff

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("base", help="folder or Hub id of a Stable Diffusion 1.x or 2.x")
parser.add_argument("concepts", nargs="+", help="concept files")
parser.add_argument("--prompt", default="a photo of {}, in the snow", help="{} is the concept's word and its class")
parser.add_argument("--class_names", nargs="+", help="class of each concept's subject, such as mug")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--guidance_scale", type=float, default=7.5, help="1.5 for the toybox")
parser.add_argument("--output", default="mixed.png")
options = parser.parse_args()
if options.class_names and len(options.class_names) != len(options.concepts):
    parser.error(f"found {len(options.class_names)} class names; expected one a concept, {len(options.concepts)}")

pipe = StableDiffusionPipeline.from_pretrained(options.base)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

# Concepts may all have the same trigger word: each gets one of its own here.
names = [f"concept{number}" for number in range(len(options.concepts))]
for name, file in zip(names, options.concepts, strict=True):
    atomdiff.load_atoms(pipe, file, adapter_name=name, trigger_word=name)

samples = [*names, None]  # None: the base alone
classes = options.class_names or [""] * len(names)
subjects = [f"{name} {kind}".strip() for name, kind in zip(names, classes, strict=True)]
prompts = [options.prompt.format(subject) for subject in (*subjects, "a cat")]
with atomdiff.mixed_batch(pipe, samples):
    images = pipe(prompts, num_inference_steps=options.steps, guidance_scale=options.guidance_scale).images

sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
for number, image in enumerate(images):
    sheet.paste(image, (number * image.width, 0))
sheet.save(options.output)
print(f"{len(images)} images, left to right: {', '.join(prompts)}; saved {options.output}")
