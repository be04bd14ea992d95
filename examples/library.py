"""Every concept of a folder, with one pipeline: python examples/library.py BASE FOLDER."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import atomdiff

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("base", help="folder or Hub id of a Stable Diffusion 1.x or 2.x")
parser.add_argument("folder", help="folder with concept files, and subfolders")
parser.add_argument("--find", help="only concepts with these words in their trigger phrase")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--guidance_scale", type=float, default=7.5, help="1.5 for the toybox")
parser.add_argument("--output_dir", default="out/library")
options = parser.parse_args()

library = atomdiff.ConceptLibrary(options.folder)  # reads headers only
names = library.find(options.find) if options.find else list(library)
print(f"{len(names)} of {len(library)} concepts in {library.folder}")

pipe = StableDiffusionPipeline.from_pretrained(options.base)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
for name in names:
    info = library.info(name)
    concept = info.path if info.is_lora else library[name]  # LoRA files of other programs are listed, too
    adapter = atomdiff.load_atoms(pipe, concept, adapter_name=name.replace("/", "-").replace(".", "-"))
    atomdiff.set_active(pipe, adapter)  # written into the weights: an image costs what the base's costs
    prompt = f"a photo of {info.trigger_phrase}"
    image = pipe(prompt, num_inference_steps=options.steps, guidance_scale=options.guidance_scale).images[0]
    file = Path(options.output_dir, f"{name}.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    print(f"{info.size:>8,} bytes  {info.trigger_phrase:<30} {file}")
    atomdiff.unload_atoms(pipe, adapter)
