"""One batch in which every prompt has its own concept: python examples/mixed_batch.py BASE CONCEPT [CONCEPT ...]."""

import argparse

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import atomdiff

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("base", help="folder or Hub id of a Stable Diffusion 1.x or 2.x")
parser.add_argument("concepts", nargs="+", help="concept files")
parser.add_argument("--prompt", default="a photo of {}, in the snow", help="{} is the concept's phrase")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", default="mixed.png")
options = parser.parse_args()

pipe = StableDiffusionPipeline.from_pretrained(options.base)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

# Concepts may all have the same trigger word: each gets one of its own here.
names = [f"concept{number}" for number in range(len(options.concepts))]
for name, file in zip(names, options.concepts, strict=True):
    atomdiff.load_atoms(pipe, file, adapter_name=name, trigger_word=name)

samples = [*names, None]  # None: the base alone
prompts = [options.prompt.format(name or "a cat") for name in samples]
with atomdiff.mixed_batch(pipe, samples):
    images = pipe(prompts, num_inference_steps=options.steps).images

sheet = Image.new("RGB", (sum(image.width for image in images), images[0].height))
for number, image in enumerate(images):
    sheet.paste(image, (number * image.width, 0))
sheet.save(options.output)
print(f"{len(images)} images, left to right: {', '.join(prompts)}; saved {options.output}")
