"""One training step at real size: time, memory, trained parameters and file size of every method, in one run.

    python -m benchmarks.training_step

The UNets have the architecture of SD 1.5 or SDXL and random weights. A step is the forward pass on one latent with
random text states, the mean squared error, the backward pass and AdamW; autocast in `dtype`, frozen weights in that
dtype, trained parameters in float32. The methods share the frozen weights and take turns, one step each in every round,
in an order drawn anew, as a step finds memory and caches as the one before left them; seconds are medians. `full` has
weights of its own and runs by itself afterwards, on a CPU in a single round.

Methods: every folder of configs/experiments/atoms by its name (`conv` is `AtomConfig()`, `spatial` the plain variant of
the paper: kernels only); PEFT's LoRA of rank 16 on the attention (`lora_attn`), and on that and all convolutions with
kernels larger than 1x1 (`lora_conv`); PEFT's OFT on the attention (`oft`); training all weights (`full`); and two
convolutions a layer (`reference`): beside every frozen 3x3 convolution runs a second one, whose kernels are made in the
forward pass of frozen coefficients, as many as the kernels have parameters, and trained changes of nine atoms.

Figures are named `<what>[_<method>][_checkpointing]_<part>`. Ratios without a method are those of `spatial`.
`memory` is the peak of a step with all that lives between steps (weights, AdamW's state), as the allocator counts it:
on a GPU `torch.cuda.max_memory_allocated`, on a CPU the profiler's record of allocations; a process's resident size
counts freed pages, too. `above_idle` is that peak less what lives between steps, `saved` what autograd keeps for the
backward pass, parameters left out (without checkpointing).
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from atomdiff.utils.options import parse_config
from atomdiff.utils.precision import choose_precision
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.experiments import EXPERIMENTS
from benchmarks.result_file import command_line, write_result
from benchmarks.timing import take_turns

OTHERS = ("lora_attn", "lora_conv", "oft", "reference", "full")
PLAIN = "spatial"


@dataclass(frozen=True)
class Part:
    """A model on a device."""

    architecture: str  # of `atomdiff.bases.architectures.ARCHITECTURES`, or "tiny" to try the benchmark out
    device: str
    latent_size: int
    repeats: int


PARTS = {
    "sd15_cpu": Part("sd-1.5", "cpu", 32, 3),
    "sd15_512_cpu": Part("sd-1.5", "cpu", 64, 3),
    "sd15_gpu": Part("sd-1.5", "cuda", 64, 20),
    "sdxl_gpu": Part("sdxl", "cuda", 128, 10),
    "tiny_cpu": Part("tiny", "cpu", 16, 3),
}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure; 0 stands for what suits the part."""

    parts: tuple[str, ...] = ()
    """Models and devices: sd15_cpu, sd15_512_cpu, sd15_gpu, sdxl_gpu, tiny_cpu. None: the first, and with a
    GPU the two for it."""
    methods: tuple[str, ...] = ()
    """Methods to compare; none: all."""
    checkpointing: tuple[bool, ...] = (False, True)
    """Gradient checkpointing off, on, or both."""
    dtype: str | None = None
    """Precision: bfloat16, float16 or float32. Default: bfloat16 where the processor or GPU has instructions for it."""
    channels_last: bool = False
    """Keep the weights in the channels-last format."""
    latent_size: int = 0
    """Height and width of the latent; 64 is an image of 512 pixels."""
    repeats: int = 0
    """Rounds that count."""
    output_dir: str = "benchmarks/results"
    """Folder of the result files, training_step_<part>.json."""


def precision(config: BenchmarkConfig, part: Part) -> torch.dtype:
    """The dtype to measure a part in."""
    return choose_precision(config.dtype, torch.device(part.device), field="dtype").dtype


class TwoConvolutions(nn.Module):
    """conv(x, W) + conv(x, A @ dD): the reference recipe, with frozen A (out * in, 9) and trained dD (9, 9)."""

    coefficients: Tensor

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        rows = base.weight.detach().flatten(0, 1).flatten(1)  # (out * in, 9)
        self.register_buffer("coefficients", torch.empty_like(rows).normal_(0, 0.02))
        self.delta = nn.Parameter(torch.zeros(9, 9, device=rows.device))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height, width)."""
        kernels = (self.coefficients @ self.delta.to(self.coefficients.dtype)).view(self.base.weight.shape)
        return self.base(x) + self.base._conv_forward(x, kernels, None)


def tiny_unet() -> nn.Module:
    """A UNet that a CPU trains in no time, with all the kinds of layers that the methods look for."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )


def make_unet(part: Part) -> Any:
    """The UNet of a part without weights."""
    from atomdiff.bases.architectures import ARCHITECTURES

    with torch.device("meta"):
        return (ARCHITECTURES | {"tiny": tiny_unet})[part.architecture]()


def make_weights(part: Part, config: BenchmarkConfig) -> dict[str, Tensor]:
    """Random weights, which all methods share."""
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    unet = make_unet(part).to(precision(config, part)).to_empty(device=part.device).to(memory_format=layout)
    for parameter in unet.parameters():
        parameter.data.normal_(0, 0.02)
    weights: dict[str, Tensor] = unet.state_dict()
    return weights


def build(method: str, part: Part, weights: dict[str, Tensor]) -> Any:
    """A UNet that shares the given weights, with what the method trains, in training mode."""
    from atomdiff.training.method import make_trainable

    unet = make_unet(part).train()
    unet.load_state_dict(weights, assign=True)
    if method == "reference":
        unet.requires_grad_(False)
        for path, module in list(unet.named_modules()):
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                unet.set_submodule(path, TwoConvolutions(module))
    else:
        make_trainable(unet, adapter_of(method, unet), seed=0)
    return unet


def adapter_of(method: str, unet: nn.Module) -> Any:
    """The config of a method, None for `full`."""
    from atomdiff.tuner.model import preset_targets
    from atomdiff.tuner.read_config import read_adapter

    if method == "full":
        return read_adapter("full")
    if method == "lora_conv":
        layers = preset_targets(unet, "conv") | preset_targets(unet, "attention")
        return dataclasses.replace(adapter_of("lora_attn", unet), target_modules=sorted(layers))
    folder = {"lora_attn": "lora/attention_r16", "oft": "oft/default"}.get(method, f"atoms/{method}")
    return read_adapter(str(EXPERIMENTS / folder / "adapter.json"))


def make_step(unet: Any, part: Part, config: BenchmarkConfig) -> Callable[[], None]:
    """A function that trains for one step, each time on the same random numbers."""
    settings, dtype = unet.config, precision(config, part)
    size, noise = config.latent_size or part.latent_size, partial(torch.randn, device=part.device)
    latents, target = noise(2, 1, 4, size, size)
    inputs: dict[str, Any] = {"timestep": torch.tensor([500], device=part.device)}
    inputs["encoder_hidden_states"] = noise(1, 77, settings.cross_attention_dim)
    if settings.addition_embed_type == "text_time":
        times = torch.full((1, 6), 8.0 * size, device=part.device)
        inputs["added_cond_kwargs"] = {"text_embeds": noise(1, 1280), "time_ids": times}
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        with torch.autocast(part.device, dtype, enabled=dtype != torch.float32):
            predicted = unet(latents, **inputs, return_dict=False)[0]
        functional.mse_loss(predicted.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextmanager
def allocations(device: str) -> Iterator[dict[str, int]]:
    """Count bytes on a device: at the end of the block, `peak` above what there was before, and `left` by it."""
    found: dict[str, int] = {}
    gc.collect()
    if device == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
            yield found
            gc.collect()
        events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        levels = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
        found.update(peak=max(levels, default=0), left=levels[-1] if levels else 0)
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    gc.collect()
    found.update(peak=torch.cuda.max_memory_allocated() - before, left=torch.cuda.memory_allocated() - before)


def bytes_saved(step: Callable[[], None], unet: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of a step, each memory once, parameters and buffers left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*unet.parameters(), *unet.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(found.values())


def bytes_on_disk(method: str, unet: Any) -> int:
    """Bytes of the files that hold what was trained, as they are written by default."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors.torch import save_file

    from atomdiff.training.saving import result_path, save_trained

    trained = {name: p.detach() for name, p in unet.named_parameters() if p.requires_grad}
    if method == "full":  # as large as its numbers, and nothing to try out
        return sum(tensor.numel() * tensor.element_size() for tensor in trained.values())
    with TemporaryDirectory() as folder:
        if method == "reference":
            save_file(trained, Path(folder) / "deltas.safetensors")
        else:
            adapter = adapter_of(method, unet)
            others = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
            parts = dict.fromkeys(others) | {"unet": unet, "scheduler": DDIMScheduler()}
            pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
            save_trained(pipe, adapter, result_path(adapter, Path(folder) / "trained"))
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def measure(methods: list[str], part: Part, config: BenchmarkConfig, weights: dict[str, Tensor]) -> dict[str, float]:
    """The figures of methods that take turns, named `<what>_<method>[_checkpointing]`."""
    shared = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    unets: dict[str, Any] = {}
    steps: dict[str, Callable[[], None]] = {}
    idle: dict[str, int] = {}
    figures: dict[str, float] = {}
    for method in methods:
        with allocations(part.device) as memory:
            unet = unets[method] = build(method, part, weights)
            step = steps[method] = make_step(unet, part, config)
            figures[f"saved_bytes_{method}"] = bytes_saved(step, unet)
        idle[method] = memory["left"] + (0 if method == "full" else shared)
        figures[f"trained_numbers_{method}"] = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        figures[f"checkpoint_bytes_{method}"] = bytes_on_disk(method, unet)
    for checkpointing in config.checkpointing:
        mode = "_checkpointing" if checkpointing else ""
        for method, unet in unets.items():
            (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
            with allocations(part.device) as memory:
                steps[method]()
            figures[f"memory_bytes_{method}{mode}"] = idle[method] + memory["peak"]
            figures[f"above_idle_bytes_{method}{mode}"] = memory["peak"]
        repeats = 1 if methods == ["full"] and part.device == "cpu" else config.repeats or part.repeats
        for method, seconds in take_turns(steps, repeats, part.device).items():
            figures[f"step_seconds_{method}{mode}"] = seconds
            print(f"{method:<16}{mode[1:]:<14}{seconds:9.4f} s", end="", flush=True)
            print(f"{figures[f'memory_bytes_{method}{mode}'] / 1e9:9.3f} GB", flush=True)
    return figures


def ratios(measured: dict[str, float], methods: list[str], mode: str) -> dict[str, float]:
    """Every method's time and memory over those of the two LoRAs, and the reference recipe's over them."""
    found = {}
    for method in methods:
        name = "" if method == PLAIN else f"_{method}"
        for what, unit in (("step", "seconds"), ("memory", "bytes"), ("above_idle", "bytes")):
            of = {other: measured[f"{what}_{unit}_{other}{mode}"] for other in methods}
            for other in ("lora_attn", "lora_conv", "reference"):
                if other in of and other != method and method != "reference":
                    label = f"reference_over_{what}{name}" if other == "reference" else f"{what}{name}_over_{other}"
                    over, under = (other, method) if other == "reference" else (method, other)
                    found[f"{label}{mode}"] = of[over] / of[under]
    return found


def run_part(name: str, config: BenchmarkConfig) -> dict[str, float]:
    """All figures of a part."""
    part = PARTS[name]
    torch.manual_seed(0)
    atoms = sorted(folder.name for folder in (EXPERIMENTS / "atoms").iterdir())
    methods = list(config.methods) or [*atoms, *OTHERS]
    weights = make_weights(part, config)
    measured: dict[str, float] = {}
    for alone in (False, True):
        measured |= measure([method for method in methods if (method == "full") is alone], part, config, weights)
        gc.collect()
    found: dict[str, float] = {}
    for checkpointing in config.checkpointing:
        found |= ratios(measured, methods, "_checkpointing" if checkpointing else "")
    return {f"{key}_{name}": round(value, 4) for key, value in (found | measured).items()}


def main(config: BenchmarkConfig) -> None:
    """Run the parts and write a result file for each."""
    quiet_libraries()
    default = ("sd15_cpu", "sd15_gpu", "sdxl_gpu") if torch.cuda.is_available() else ("sd15_cpu",)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    for name in config.parts or default:
        figures = run_part(name, config)
        command = command_line("training_step", dataclasses.replace(config, parts=(name,)), ("output_dir",))
        machine = torch.cuda.get_device_name() if PARTS[name].device == "cuda" else None
        write_result(Path(config.output_dir, f"training_step_{name}.json"), command, figures, machine)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig))
