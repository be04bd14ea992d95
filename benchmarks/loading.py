"""Switch concepts and mix them in a batch, at the size of Stable Diffusion 1.5, beside diffusers' and PEFT's LoRA.

    python -m benchmarks.loading

The UNet has SD 1.5's architecture and random weights. "copy" is one copy of the adapted weights. "switch" is
`atomdiff.set_active` from one concept to another; a LoRA is switched the way diffusers offers it: `unfuse_lora`,
`set_adapters`, `fuse_lora`. Concepts are `spatial` (kernels only) or `blocks` (the default: kernels, and channel blocks
of 4), on all 3x3 convolutions; LoRAs have rank 4, on the same layers (`lora_conv`) or on the attention (`lora_attn`).
All of a comparison takes turns in one process, after a round to warm up; figures are medians. "mixed" is one call of
the UNet in which every sample of a batch has another concept; PEFT's way to that is `adapter_names`. Figures "over"
another are ratios of times for switches, and of images a second for batches.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from atomdiff.utils.options import parse_config
from atomdiff.utils.precision import choose_precision
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result
from benchmarks.timing import seconds, take_turns

LORA_LAYERS = {
    "lora_attn": ["to_q", "to_k", "to_v", "to_out.0"],
    "lora_conv": r".*\.(conv1|conv2|conv)|conv_in|conv_out",
}
BLOCKS = {"spatial": 1, "blocks": 4}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    parts: tuple[str, ...] = ("switch", "many", "mixed")
    """Comparisons to run."""
    dtypes: tuple[str, ...] = ()
    """Precisions of the UNet. Default: float32, and bfloat16 where the processor or GPU has instructions for it."""
    repeats: int = 5
    """Times each thing takes its turn, after one round to warm up."""
    many: int = 200
    """Concepts loaded to see whether a switch slows down."""
    samples: int = 8
    """Samples of the mixed batch, each with its own concept."""
    latent_size: int = 64
    """Height and width of the mixed batch's latents; 64 is an image of 512 pixels."""
    mixed_repeats: int = 2
    """Repeats of the mixed batch."""
    output: str = "benchmarks/results/loading.json"
    """The result file; figures of parts and precisions that are not run again stay in it."""


def build_pipe(dtype: torch.dtype, device: str) -> Any:
    """A pipeline whose UNet has SD 1.5's architecture and random weights, and which has nothing else."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from atomdiff.bases.architectures import ARCHITECTURES

    with torch.device("meta"):
        unet = ARCHITECTURES["sd-1.5"]().to(dtype).eval()
    unet.to_empty(device=device)
    for parameter in unet.parameters():
        parameter.data.normal_(0, 0.02)
    parts = {name: None for name in ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")}
    return StableDiffusionPipeline(**parts, unet=unet, scheduler=DDIMScheduler(), requires_safety_checker=False)


def add_concepts(pipe: Any, kind: str, names: list[str]) -> None:
    """Add concepts with random deltas."""
    from atomdiff import AtomConfig

    for name in names:
        pipe.unet.add_adapter(AtomConfig(target_modules="conv", channel_block=BLOCKS[kind], basis="dct"), name)
    for key, parameter in pipe.unet.named_parameters():
        if "atom_" in key and key.rpartition(".")[2] in names:
            parameter.data.normal_(0, 0.05)


def add_loras(pipe: Any, kind: str, names: list[str]) -> None:
    """Add LoRAs with random factors."""
    from peft import LoraConfig

    for name in names:
        layers = LORA_LAYERS[kind]
        pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=layers, init_lora_weights=False), name)


def alternate(thing: Callable[[str], Any], names: tuple[str, ...] = ("a", "b")) -> Callable[[], Any]:
    """Call with the one name and the other by turns."""
    calls = iter(range(1 << 30))
    return lambda: thing(names[next(calls) % len(names)])


def targeted_weights(pipe: Any) -> list[torch.Tensor]:
    """The weights that concepts on convolutions adapt."""
    from atomdiff.tuner import adapter_state

    return [layer.get_base_layer().weight.data for layer in adapter_state.atom_layers(pipe.unet).values()]


def measure_copy_and_switch(kind: str, dtype: torch.dtype, device: str, config: BenchmarkConfig) -> dict[str, float]:
    """Seconds of a copy of the adapted weights and of a switch, in both memory formats."""
    import atomdiff

    found: dict[str, float] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        pipe = build_pipe(dtype, device)
        pipe.unet.to(memory_format=layout)
        add_concepts(pipe, kind, ["a", "b"])
        atomdiff.set_active(pipe, "a")
        weights = targeted_weights(pipe)
        copies = [weight.clone() for weight in weights]

        def copy(weights: Any = weights, copies: Any = copies) -> None:
            for weight, goal in zip(weights, copies, strict=True):
                goal.copy_(weight)

        things = {"copy": copy, "switch": alternate(partial(atomdiff.set_active, pipe))}
        suffix = "" if layout is torch.contiguous_format else "_channels_last"
        found |= {
            f"{name}{suffix}": value for name, value in take_turns(things, config.repeats, device, warm_up=1).items()
        }
        found["adapted_bytes"] = sum(weight.numel() * weight.element_size() for weight in weights)
        del pipe, weights, copies, things, copy
        gc.collect()
    return found


def measure_lora(kind: str, dtype: torch.dtype, device: str, config: BenchmarkConfig) -> float:
    """Seconds of a switch between two LoRAs by diffusers."""
    pipe = build_pipe(dtype, device)
    add_loras(pipe, kind, ["a", "b"])
    pipe.set_adapters("a")
    pipe.fuse_lora(components=["unet"], adapter_names=["a"])

    def switch(name: str) -> None:
        pipe.unfuse_lora(components=["unet"])
        pipe.set_adapters(name)
        pipe.fuse_lora(components=["unet"], adapter_names=[name])

    return take_turns({"lora": alternate(switch)}, config.repeats, device, warm_up=1)["lora"]


def compare_switches(dtype: torch.dtype, device: str, config: BenchmarkConfig) -> dict[str, float]:
    """Switches of concepts over a copy and beside LoRAs."""
    spatial = measure_copy_and_switch("spatial", dtype, device, config)
    blocks = measure_copy_and_switch("blocks", dtype, device, config)
    lora = {kind: measure_lora(kind, dtype, device, config) for kind in LORA_LAYERS}
    return {
        "adapted_bytes": spatial["adapted_bytes"],
        "copy_seconds": spatial["copy"],
        "switch_seconds": spatial["switch"],
        "switch_over_copy": spatial["switch"] / spatial["copy"],
        "switch_over_copy_channels_last": spatial["switch_channels_last"] / spatial["copy_channels_last"],
        "switch_blocks_seconds": blocks["switch"],
        "switch_blocks_over_copy": blocks["switch"] / blocks["copy"],
        "switch_blocks_over_copy_channels_last": blocks["switch_channels_last"] / blocks["copy_channels_last"],
        "lora_conv_seconds": lora["lora_conv"],
        "lora_attn_seconds": lora["lora_attn"],
        "switch_speedup_over_lora": lora["lora_conv"] / spatial["switch"],
        "switch_speedup_over_lora_attn": lora["lora_attn"] / spatial["switch"],
        "switch_blocks_speedup_over_lora": lora["lora_conv"] / blocks["switch"],
    }


def compare_many(dtype: torch.dtype, device: str, config: BenchmarkConfig) -> dict[str, float]:
    """A switch with many concepts loaded over one with two, and the seconds that loading takes."""
    import atomdiff

    pipes = {"few": build_pipe(dtype, device), "many": build_pipe(dtype, device)}
    add_concepts(pipes["few"], "spatial", ["made"])
    loads: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        file = atomdiff.save_atoms(pipes["few"], Path(folder) / "made.atoms.safetensors", "made")
        file_bytes = file.stat().st_size
        atomdiff.unload_atoms(pipes["few"])
        pipes["many"].unet.load_state_dict(pipes["few"].unet.state_dict())
        for name, count in (("few", 2), ("many", config.many)):
            load = partial(atomdiff.load_atoms, pipes[name], file)
            loads[name] = [seconds(partial(load, f"c{number}"), device) for number in range(count)]
    things = {name: alternate(partial(atomdiff.set_active, pipe), ("c0", "c1")) for name, pipe in pipes.items()}
    switches = take_turns(things, config.repeats, device, warm_up=1)
    return {
        f"switch_{config.many}_over_2": switches["many"] / switches["few"],
        "file_bytes": file_bytes,
        "load_first_seconds": loads["many"][0],
        "load_next_seconds": statistics.median(loads["many"][1:11]),
        f"load_after_{config.many - 10}_seconds": statistics.median(loads["many"][-10:]),
    }


def build_peft(kind: str, names: list[str], dtype: torch.dtype, device: str) -> Any:
    """A UNet with a LoRA for each sample, as PEFT mixes them."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=4, target_modules=LORA_LAYERS[kind], init_lora_weights=False)
    model = get_peft_model(build_pipe(dtype, device).unet, lora, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)
    return model.eval()


def compare_mixed(dtype: torch.dtype, device: str, config: BenchmarkConfig) -> dict[str, float]:
    """A batch of as many concepts as samples, over the bare base and beside PEFT's `adapter_names`."""
    import atomdiff

    names = {kind: [f"{kind}{number}" for number in range(config.samples)] for kind in (*BLOCKS, *LORA_LAYERS)}
    shape = (config.samples, 4, config.latent_size, config.latent_size)
    inputs = {
        "sample": torch.randn(shape, device=device, dtype=dtype),
        "timestep": torch.full((config.samples,), 500, device=device),
        "encoder_hidden_states": torch.randn(config.samples, 77, 768, device=device, dtype=dtype),
    }
    pipe = build_pipe(dtype, device)
    for kind in BLOCKS:
        add_concepts(pipe, kind, names[kind])
    atomdiff.set_active(pipe, {})
    peft = {kind: build_peft(kind, names[kind], dtype, device) for kind in LORA_LAYERS}

    def mixed(kind: str) -> None:
        with atomdiff.mixed_batch(pipe, names[kind]):
            pipe.unet(**inputs)

    things: dict[str, Callable[[], Any]] = {"base": lambda: pipe.unet(**inputs)}
    things |= {kind: partial(mixed, kind) for kind in BLOCKS}
    things |= {kind: partial(model, **inputs, adapter_names=names[kind]) for kind, model in peft.items()}
    with torch.inference_mode():
        turns = take_turns(things, config.mixed_repeats, device, warm_up=1)
    return {
        "base_seconds": turns["base"],
        "mixed_over_base": turns["base"] / turns["spatial"],
        "mixed_blocks_over_base": turns["base"] / turns["blocks"],
        "peft_conv_over_base": turns["base"] / turns["lora_conv"],
        "peft_attn_over_base": turns["base"] / turns["lora_attn"],
        "mixed_over_peft": turns["lora_conv"] / turns["spatial"],
        "mixed_over_peft_attn": turns["lora_attn"] / turns["spatial"],
        "mixed_blocks_over_peft": turns["lora_conv"] / turns["blocks"],
    }


COMPARISONS = {"switch": compare_switches, "many": compare_many, "mixed": compare_mixed}


def main(config: BenchmarkConfig) -> None:
    """Run the comparisons and write the result file."""
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = Path(config.output)
    figures = json.loads(output.read_text())["figures"] if output.is_file() else {}
    fastest = choose_precision(None, torch.device(device)).dtype
    able = dict.fromkeys(("float32", str(fastest).removeprefix("torch.")))
    for name in config.dtypes or able:
        short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[name]
        suffix = f"_{'cpu' if device == 'cpu' else 'gpu'}_{short}"
        for part in config.parts:
            found = COMPARISONS[part](getattr(torch, name), device, config)
            figures |= {f"{key}{suffix}": round(value, 4) for key, value in found.items()}
            print(part, name, found, flush=True)
            gc.collect()
    write_result(output, command_line("loading", config), figures)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig))
