"""A library of 10,000 concepts of Stable Diffusion 1.5's size: seconds to index it, memory, time to open one.

    python -m benchmarks.library

The files are real ones: atoms of all 52 spatial convolutions, fitted to untrained layers, with random deltas, a trigger
phrase and the embedding of a trigger word. They are written by another process, so that what this one takes is the
library's. "Cold" is after the file contents were dropped from the page cache; names and sizes stay in the kernel's.
"Processor" is the time that the process ran, which other programs on the machine change little.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result
from benchmarks.timing import seconds

PER_FOLDER = 500
WORD = "sks"
COLORS = ("red", "blue", "green", "black", "white", "golden", "striped", "dotted", "shiny", "old")
THINGS = ("mug", "teapot", "robot", "cat", "dog", "chair", "lamp", "boat", "house", "shoe", "vase", "clock", "bag")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    concepts: int = 10_000
    """Files in the library."""
    opened: int = 1_000
    """Concepts opened one after the other, each once, and as many more by threads."""
    hits: int = 20_000
    """Concepts taken from memory."""
    threads: int = 8
    """Threads that open concepts at once."""
    repeats: int = 5
    """Times that what is quick is measured; the median counts."""
    output: str = "benchmarks/results/library.json"
    """The result file."""


def write_library(folder: str, concepts: int) -> None:
    """Write concept files whose names, phrases and numbers differ, in subfolders."""
    quiet_libraries()
    import torch

    from atomdiff.atoms.basis import svd_atoms
    from atomdiff.concepts.concept_file import DeltaFile, write_delta_file
    from atomdiff.tuner import AtomConfig
    from benchmarks.decompose import untrained_kernels

    kernels = untrained_kernels()
    values = {f"unet.{name}": torch.linalg.svdvals(rows.double()).tolist() for name, rows in kernels.items()}
    atoms = {f"unet.{name}": svd_atoms(rows, rows.shape[1]) for name, rows in kernels.items()}
    template = DeltaFile(
        config=AtomConfig(channel_block=1),
        layers={},
        fingerprint={module: [float(f"{value:.6g}") for value in numbers] for module, numbers in values.items()},
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        training={"steps": 300, "seed": 0, "learning_rate": 1e-3, "images": 5, "final_loss": 0.05},
        modelspec={"architecture": "stable-diffusion-v1/atoms", "resolution": "512x512"},
    )
    generator = torch.Generator().manual_seed(0)
    for number in range(concepts):
        thing = f"{COLORS[number % len(COLORS)]} {THINGS[number % len(THINGS)]}"
        delta = dataclasses.replace(
            template,
            layers={
                module: {"atom_delta": torch.randn(d.shape, generator=generator), "atom_basis": d}
                for module, d in atoms.items()
            },
            tokens={WORD: {"text_encoder": torch.randn(768, generator=generator)}},
            trigger_phrase=f"a photo of {WORD} {thing} number {number}",
        )
        name = f"{number // PER_FOLDER:02}/{thing.replace(' ', '-')}-{number}.atoms.safetensors"
        write_delta_file(Path(folder) / name, delta)


def drop_from_page_cache(folder: str) -> None:
    """Make the kernel forget what the files hold."""
    os.sync()
    for file in Path(folder).rglob("*.atoms.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_mb(field: str = "VmRSS") -> float:
    """Memory of this process: what it takes now, or with `VmHWM` the most it ever took."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(folder: str, config: BenchmarkConfig) -> dict[str, float]:
    """All figures."""
    from atomdiff.concepts.concept_file import read_delta_file, write_delta_file
    from atomdiff.concepts.library import ConceptLibrary
    from atomdiff.utils.errors import UserError

    def median(work: Callable[[], object]) -> float:
        return statistics.median(seconds(work) for _ in range(config.repeats))

    files = sorted(Path(folder).rglob("*.atoms.safetensors"))
    template = read_delta_file(files[0])  # also warms torch up
    figures: dict[str, float] = {"concepts": len(files), "file_bytes": files[0].stat().st_size}

    drop_from_page_cache(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the most ever taken counts from here
    before = resident_mb()
    started, used = time.perf_counter(), time.process_time()
    library = ConceptLibrary(folder)
    figures["index_seconds_cold"] = round(time.perf_counter() - started, 2)
    figures["index_seconds_cold_processor"] = round(time.process_time() - used, 2)
    figures["memory_mb_before"] = round(before, 1)
    figures["index_growth_mb"] = round(resident_mb() - before, 1)

    names = random.Random(0).sample(list(library), config.opened)
    opened = [seconds(lambda name=name: library[name]) for name in names]
    figures["first_open_ms_median"] = round(1e3 * statistics.median(opened), 2)
    figures["first_open_ms_99th"] = round(1e3 * statistics.quantiles(opened, n=100)[-1], 2)
    figures["budget_mb"] = library.memory_budget / 2**20
    figures["budget_used_mb"] = round(library.memory_used / 2**20, 1)
    figures["full_growth_mb"] = round(resident_mb() - before, 1)
    kept = library._held.keys()
    figures["concepts_kept"] = len(kept)

    hot = random.Random(1).choices(list(kept), k=config.hits)
    figures["hit_microseconds"] = round(1e6 * median(lambda: [library[name] for name in hot]) / len(hot), 2)
    phrases = [library.info(name).trigger_phrase.upper() for name in names]
    figures["find_microseconds"] = round(1e6 * median(lambda: [library.find(p) for p in phrases]) / len(phrases), 1)
    figures["find_two_words_ms"] = round(1e3 * median(lambda: library.find("red mug")), 2)
    figures["found_by_two_words"] = len(library.find("red mug"))

    others = [name for name in library if name not in set(names)]
    random.Random(2).shuffle(others)
    with ThreadPoolExecutor(config.threads) as pool:
        took = seconds(lambda: sum(pool.map(lambda name: len(library[name].layers), others[: config.opened])))
    figures["threads"] = config.threads
    figures["opens_per_second_threads"] = round(config.opened / took)
    figures["full_growth_mb_threads"] = round(resident_mb() - before, 1)

    figures["refresh_seconds_unchanged"] = round(median(library.refresh), 3)
    new = iter(range(1000))

    def pick_up(number: int) -> float:
        write_delta_file(Path(folder) / f"new-{number}.atoms.safetensors", template)
        return seconds(library.refresh)

    picked_up = [pick_up(next(new)) for _ in range(config.repeats)]
    figures["refresh_seconds_one_new"] = round(statistics.median(picked_up), 3)

    def unknown() -> None:
        try:
            library["red-mugg-20000"]
        except UserError:
            pass

    figures["unknown_name_seconds"] = round(median(unknown), 3)
    figures["growth_mb_at_the_end"] = round(resident_mb() - before, 1)
    figures["growth_mb_at_most"] = round(resident_mb("VmHWM") - before, 1)
    used = time.process_time()
    figures["index_seconds_warm"] = round(median(lambda: ConceptLibrary(folder)), 2)
    figures["index_seconds_warm_processor"] = round((time.process_time() - used) / config.repeats, 2)
    return figures


def main(config: BenchmarkConfig) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(target=write_library, args=(folder, config.concepts))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit(writer.exitcode)
        figures = measure(folder, config)
    write_result(config.output, command_line("library", config), figures, load_average_before=load)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig))
