"""A server's engine under load: images a minute and latency, beside other ways to serve many concepts.

    python -m benchmarks.serving
    python -m benchmarks.serving --architecture sd-1.5 --requests 8 --steps 2 --repeats 2

The base is the toybox, or has a UNet of another architecture with random weights between the toybox's text encoder and
autoencoder, and so its small latents; the concepts have random deltas. The ways take turns, so that what else the
machine does meets all alike; medians count. All requests are there at once, but for `latency`, where they come at
random times.

- engine/N: the engine, with N different concepts (0: the base alone).
- fixed/N: batches of `max_batch` with N concepts, by `atomdiff sample`'s way, of requests with equal numbers of steps.
- set_active: one request after another, its concept written into the weights.
- lora_set_adapters: one request after another, LoRA of rank 16 on attention, chosen by diffusers' `set_adapters`.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result
from benchmarks.timing import take_turns


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    base: str = "samples/toybox-sd"
    """The base model."""
    architecture: str | None = None
    """A UNet with random weights in place of the base's: sd-1.5, sd-2.1, or the folder of a pipeline like them."""
    channel_block: int = 1
    """Of the concepts."""
    requests: int = 16
    """Images in one measurement."""
    steps: int = 6
    """Denoising steps of each."""
    max_batch: int = 8
    """Images that the engine denoises together."""
    repeats: int = 3
    """Measurements of each kind; the median counts."""
    note: str = ""
    """What else the machine did."""
    output: str = "benchmarks/results/serving.json"
    """The result file."""


def open_base(config: BenchmarkConfig) -> Any:
    """Return the base as a pipeline."""
    from atomdiff.bases.architectures import open_architecture
    from atomdiff.pipelines.open import open_pipeline

    pipe = open_pipeline(config.base)
    if config.architecture is not None:
        unet: Any = open_architecture(config.architecture)
        fitting = {name: pipe.unet.config[name] for name in ("in_channels", "out_channels", "cross_attention_dim")}
        pipe.unet = type(unet).from_config({**unet.config, **fitting}).eval().requires_grad_(False)
    return pipe


def write_concepts(pipe: Any, folder: Path, count: int, channel_block: int) -> None:
    """Write concept files with random deltas."""
    import torch

    import atomdiff
    from atomdiff.concepts.concept_file import read_concept_file, write_concept_file

    pipe.unet.add_adapter(atomdiff.AtomConfig(channel_block=channel_block))
    path = atomdiff.save_atoms(pipe, folder / "first.atoms.safetensors")
    atomdiff.unload_atoms(pipe)
    concept = read_concept_file(path)
    path.unlink()
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        layers = {
            module: {
                kind: 0.02 * torch.randn(tensor.shape, generator=generator) if kind.endswith("delta") else tensor
                for kind, tensor in kinds.items()
            }
            for module, kinds in concept.layers.items()
        }
        write_concept_file(folder / f"c{number}.atoms.safetensors", replace(concept, layers=layers))


def prompts(count: int, concepts: int) -> list[str]:
    """Return prompts that use so many concepts in turn."""
    return [f"a photo of a mug <atoms:c{i % concepts}>" if concepts else "a photo of a mug" for i in range(count)]


def run_engine(engine: Any, requests: Sequence[Any], arrivals: Sequence[float] | None = None) -> list[float]:
    """Return the latency of each request in seconds, which come at these times or all at once."""
    started, done = time.monotonic(), [0.0] * len(requests)
    futures = []
    for number, request in enumerate(requests):
        arrival = arrivals[number] if arrivals else 0.0
        time.sleep(max(started + arrival - time.monotonic(), 0))
        (job,) = engine.submit([request])

        def note(_: Any, number: int = number, arrival: float = arrival) -> None:
            done[number] = time.monotonic() - started - arrival

        job.future.add_done_callback(note)
        futures.append(job.future)
    for future in futures:
        future.result()
    return done


def measure(config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    """Return all figures, with concepts in an empty folder."""
    import torch

    from atomdiff.concepts.library import ConceptLibrary
    from atomdiff.sampling.adapter_cache import AdapterCache
    from atomdiff.sampling.generate import generate
    from atomdiff.sampling.prompt_requests import read_requests
    from atomdiff.serving.concepts import ServedConcepts
    from atomdiff.serving.engine import Engine
    from atomdiff.serving.image_request import ImageRequest

    pipe, lora_pipe, engine_pipe = (open_base(config) for _ in range(3))
    write_concepts(pipe, folder, 64, config.channel_block)
    library = ConceptLibrary(folder)
    engine = Engine(engine_pipe, ServedConcepts(library), max_batch=config.max_batch, max_queue=10_000)
    cache = AdapterCache(pipe)
    settings: dict[str, Any] = {"num_inference_steps": config.steps, "guidance_scale": 4.0, "progress": False}

    def engine_way(concepts: int) -> Callable[[], Any]:
        requests = [
            ImageRequest(prompt, num_inference_steps=config.steps, guidance_scale=4.0, seed=seed)
            for seed, prompt in enumerate(prompts(config.requests, concepts))
        ]
        return lambda: run_engine(engine, requests)

    def fixed_way(concepts: int, size: int) -> Callable[[], Any]:
        requests = read_requests(prompts(config.requests, concepts), library=library)

        def run() -> None:
            for first in range(0, len(requests), size):
                batch = requests[first : first + size]
                with cache.use(batch):
                    generate(pipe, [each.text for each in batch], seeds=range(len(batch)), batch_size=size, **settings)

        return run

    lora_names = add_loras(lora_pipe, 8)

    def lora_way() -> None:
        for number in range(config.requests):
            lora_pipe.set_adapters([lora_names[number % 8]])
            generate(lora_pipe, ["a photo of a mug"], seeds=[number], batch_size=1, **settings)

    ways: dict[str, Callable[[], Any]] = {f"engine/{count}": engine_way(count) for count in (0, 1, 8, 64)}
    ways |= {f"fixed/{count}": fixed_way(count, config.max_batch) for count in (0, 8)}
    ways |= {"set_active": fixed_way(8, 1), "one_by_one": fixed_way(0, 1), "lora_set_adapters": lora_way}
    seconds = take_turns(ways, config.repeats, warm_up=1)
    figures: dict[str, Any] = {
        "images_per_minute": {name: round(60 * config.requests / time, 1) for name, time in seconds.items()},
        "throughput_of_8_concepts_over_none": round(seconds["engine/0"] / seconds["engine/8"], 3),
        "throughput_of_engine_over_fixed_batch": {
            count: round(seconds[f"fixed/{count}"] / seconds[f"engine/{count}"], 3) for count in ("0", "8")
        },
        "throughput_of_8_concepts_over_set_active": round(seconds["set_active"] / seconds["engine/8"], 3),
    }
    rate = config.requests / seconds["engine/8"]
    figures["latency"] = {
        f"load {load}": latencies(engine, load * rate, config, ImageRequest) for load in (0.3, 0.6, 0.9)
    }
    figures["short_jobs_behind_long_ones"] = short_behind_long(engine, config, ImageRequest)
    engine.close()
    figures["threads"] = torch.get_num_threads()
    return figures


def add_loras(pipe: Any, count: int) -> list[str]:
    """Add LoRAs of rank 16 on attention; return their names."""
    from peft import LoraConfig

    for number in range(count):
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        pipe.unet.add_adapter(LoraConfig(r=16, target_modules=targets, init_lora_weights=False), f"l{number}")
    return [f"l{number}" for number in range(count)]


def latencies(engine: Any, rate: float, config: BenchmarkConfig, make: Any) -> dict[str, float]:
    """Return p50 and p95 of the latency, in seconds, of requests that come at random with a mean rate a second."""
    draw = random.Random(0)
    arrivals = [0.0]
    while len(arrivals) < config.requests:
        arrivals.append(arrivals[-1] + draw.expovariate(rate))
    requests = [
        make(prompt, num_inference_steps=config.steps, guidance_scale=4.0) for prompt in prompts(config.requests, 8)
    ]
    return percentiles(run_engine(engine, requests, arrivals)) | {"requests_per_minute": round(60 * rate, 1)}


def short_behind_long(engine: Any, config: BenchmarkConfig, make: Any) -> dict[str, Any]:
    """Let short jobs come right after as many long ones as fill the batch twice; seconds until each kind is done."""
    long = [make(p, num_inference_steps=8 * config.steps, guidance_scale=4.0) for p in prompts(config.max_batch, 8)]
    short = [make(p, num_inference_steps=config.steps, guidance_scale=4.0) for p in prompts(config.max_batch, 8)]
    alone = run_engine(engine, short)
    both = run_engine(engine, long + short)
    return {
        "short alone": percentiles(alone),
        "short after long": percentiles(both[len(long) :]),
        "long": percentiles(both[: len(long)]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the 50th and the 95th percentile."""
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {"p50": round(cuts[9], 2), "p95": round(cuts[18], 2)}


def main() -> None:
    """Measure, and write the result file."""
    config = parse_config(BenchmarkConfig, prog="python -m benchmarks.serving")
    quiet_libraries()
    command = command_line("serving", config, ("output", "note"))
    with tempfile.TemporaryDirectory() as folder:
        write_result(config.output, command, measure(config, Path(folder)), note=config.note)


if __name__ == "__main__":
    main()
