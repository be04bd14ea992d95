"""The ComfyUI node at the size of Stable Diffusion 1.5: weights beside the merged pipeline's, times and memory.

    COMFYUI_PATH=/path/to/ComfyUI python -m benchmarks.comfyui

The checkpoint has SD 1.5's architecture and random weights, in float16; ComfyUI loads it by its own loader, on the CPU,
in float32 or float16. Concepts are on all 3x3 convolutions, or on all layers of the UNet (float16 only, for memory).
"load" is the node *Load atoms*, the first time with the check of the base; "patch" and "unpatch" are ComfyUI's. The
peaks are what the process had more than before the step. Every weight that the node changes is compared with the merged
pipeline's, and after unpatching every weight of the UNet with the checkpoint's, bit by bit. Pipeline and ComfyUI run in
processes of their own, one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result
from benchmarks.timing import seconds

CHECKPOINT = "base.safetensors"
CASES = (("conv", "float32"), ("conv", "float16"), ("all", "float16"))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    folder: str = ""
    """Where the checkpoint and the merged weights go, 5 GB. Default: a temporary folder."""
    output: str = "benchmarks/results/comfyui.json"
    """The result file."""


def write_base(folder: Path) -> None:
    """Write the checkpoint, and its UNet as a pipeline has it."""
    from tests.comfyui import checkpoints, real_comfy

    real_comfy.install(folder)
    pipe = checkpoints.make_pipe("sd1", **checkpoints.FULL_SD1)
    checkpoints.write_checkpoint(pipe, folder / CHECKPOINT)
    pipe.unet.half().save_pretrained(folder / "unet")


def write_merged(folder: Path, layers: str, dtype: str) -> None:
    """Write a concept with random deltas, and the weights that it changes in a pipeline where it is merged."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    import atomdiff
    from atomdiff.tuner import AtomConfig
    from tests.helpers import add_adapter

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=getattr(torch, dtype))
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(**nothing, unet=unet, scheduler=DDIMScheduler(), requires_safety_checker=False)
    add_adapter(pipe, "concept", AtomConfig(target_modules=layers))
    path = folder / "atoms" / f"{layers}-{dtype}.atoms.safetensors"
    atomdiff.save_atoms(pipe, path, "concept")
    atomdiff.unload_atoms(pipe)
    atomdiff.load_atoms(pipe, path, adapter_name="concept")
    atomdiff.set_active(pipe, "concept")
    layers_of = {name: module for name, module in unet.named_modules() if hasattr(module, "get_base_layer")}
    merged = {name: module.get_base_layer().weight.detach() for name, module in layers_of.items()}
    save_file(merged, folder / "merged.safetensors")


def measure(folder: Path, layers: str, dtype: str) -> dict[str, float]:
    """Load, patch, compare and unpatch in ComfyUI."""
    from tests.comfyui import real_comfy
    from tests.comfyui.pack import import_pack

    torch.set_num_threads(1)
    real_comfy.install(folder)
    import comfy.sd

    node = import_pack().NODE_CLASS_MAPPINGS["LoadAtoms"]()
    options = {"dtype": getattr(torch, dtype)}
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
        str(folder / CHECKPOINT), output_vae=False, model_options=options
    )
    file = f"{layers}-{dtype}.atoms.safetensors"
    found: dict[str, float] = {"file_bytes": (folder / "atoms" / file).stat().st_size}
    loaded: list[Any] = []
    for time in ("first", "next"):
        figures = _measured(lambda: loaded.append(node.load(model, clip, file, 1.0, 1.0)[0]))
        found |= {f"load_{time}_{name}": value for name, value in figures.items()}
    patched = loaded[-1]
    found |= {f"patch_{name}": value for name, value in _measured(lambda: patched.patch_model(CPU)).items()}
    found |= _compare(patched, folder)
    found |= {f"unpatch_{name}": value for name, value in _measured(lambda: patched.unpatch_model(CPU)).items()}
    with safe_open(folder / CHECKPOINT, "pt") as base:
        for key, weight in model.model.diffusion_model.state_dict().items():
            assert torch.equal(weight, base.get_tensor(f"model.diffusion_model.{key}").to(weight.dtype)), key
    return found


def _compare(patched: Any, folder: Path) -> dict[str, float]:
    """Return how far patched weights are from the merged pipeline's, relative to the largest of a layer."""
    from comfyui_atoms.base import unet_keys

    keys, state = unet_keys(patched), patched.model.state_dict()
    equal, worst = 0, 0.0
    with safe_open(folder / "merged.safetensors", "pt") as merged:
        names = list(merged.keys())
        assert {keys[f"unet.{name}"] for name in names} == {*patched.patches} == {*patched.backup}
        for name in names:
            weight, expected = state[keys[f"unet.{name}"]], merged.get_tensor(name)
            equal += torch.equal(weight, expected)
            worst = max(worst, float((weight.float() - expected.float()).abs().max() / expected.float().abs().max()))
    return {"layers": len(names), "layers_equal_to_the_bit": equal, "largest_difference": worst}


def _measured(work: Callable[[], Any]) -> dict[str, float]:
    """Return seconds, and the most bytes that the process had more than before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = psutil.Process().memory_info().rss
    took = seconds(work)
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {"seconds": round(took, 4), "peak_bytes": int(status["VmHWM"].split()[0]) * 1024 - before}


def main(config: BenchmarkConfig) -> None:
    """Measure all cases, and write the result file."""
    figures: dict[str, float] = {}
    with TemporaryDirectory(dir=config.folder or None) as temporary:
        folder = Path(temporary)
        for name in ("atoms", "loras"):
            (folder / name).mkdir()
        run = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1).submit
        run(write_base, folder).result()
        for layers, dtype in CASES:
            run(write_merged, folder, layers, dtype).result()
            found = run(measure, folder, layers, dtype).result()
            figures |= {f"{name}_{layers}_{dtype}": value for name, value in found.items()}
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfyui_version import __version__

    command = command_line("comfyui", config, ("output", "folder"))
    write_result(config.output, command, figures, "x86_64, 1 thread used", comfyui=__version__)


if __name__ == "__main__":
    quiet_libraries()
    main(parse_config(BenchmarkConfig))
