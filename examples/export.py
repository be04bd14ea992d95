"""A concept for other programs, as a LoRA and as exact differences: python examples/export.py BASE CONCEPT."""

import argparse
from pathlib import Path

from diffusers import StableDiffusionPipeline

import atomdiff
from atomdiff.export.diff import export_diff
from atomdiff.export.lora import export_lora

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("base", help="folder or Hub id of a Stable Diffusion 1.x or 2.x")
parser.add_argument("concept", help="concept file")
parser.add_argument("--rank", type=int, default=32)
parser.add_argument("--output_dir", default="out/export")
options = parser.parse_args()

pipe = StableDiffusionPipeline.from_pretrained(options.base)
name = atomdiff.load_atoms(pipe, options.concept)
folder = Path(options.output_dir)
folder.mkdir(parents=True, exist_ok=True)

lora = export_lora(pipe, folder / f"{name}-lora.safetensors", options.rank)
diff = export_diff(pipe, folder / f"{name}-diff.safetensors")

worst = max(lora.layers, key=lambda layer: layer.error)
print(f"a LoRA of rank {options.rank}: {lora.path}; relative error at most {worst.error:.3f}, in {worst.name}")
print(f"the differences, exact to rounding: {diff.path}")
for word, file in lora.embeddings.items():
    print(f"the word {word}, as an embedding of textual inversion: {file}")
