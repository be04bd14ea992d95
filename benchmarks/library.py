"""A library of 10,000 concepts of Stable Diffusion 1.5's size: seconds to index it, memory, time to open one.

    python -m benchmarks.library

The files are real ones: atoms of all 52 spatial convolutions, fitted to untrained layers, with random deltas, a trigger
phrase and the embedding of a trigger word. They are written by another process, so that what this one takes is the
library's. "Cold" is after the file contents were dropped from the page cache; names and sizes stay in the kernel's.
"Processor" is the time that the process ran, which other programs on the machine change little.

    python -m benchmarks.library --part similar --output benchmarks/results/library_similar.json

measures what it takes to compare the concepts: the first time, when all files are read, and later.
"""

from __future__ import annotations

import contextlib
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
from typing import TYPE_CHECKING, Literal

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result
from benchmarks.timing import seconds

if TYPE_CHECKING:
    from atomdiff.concepts.concept_file import ConceptFile
    from atomdiff.concepts.library import ConceptLibrary

PER_FOLDER = 500
WORD = "sks"
COLORS = ("red", "blue", "green", "black", "white", "golden", "striped", "dotted", "shiny", "old")
THINGS = ("mug", "teapot", "robot", "cat", "dog", "chair", "lamp", "boat", "house", "shoe", "vase", "clock", "bag")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    part: Literal["open", "similar"] = "open"
    """Index and open concepts, or compare them."""
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
    from atomdiff.concepts.concept_file import ConceptFile, write_concept_file
    from atomdiff.tuner import AtomConfig
    from benchmarks.decompose import untrained_kernels

    kernels = untrained_kernels()
    values = {f"unet.{name}": torch.linalg.svdvals(rows.double()).tolist() for name, rows in kernels.items()}
    atoms = {f"unet.{name}": svd_atoms(rows, rows.shape[1]) for name, rows in kernels.items()}
    template = ConceptFile(
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
        write_concept_file(Path(folder) / name, delta)


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


def median_of(work: Callable[[], object], repeats: int) -> float:
    """Return the median wall time of a call."""
    return statistics.median(seconds(work) for _ in range(repeats))


def measure(folder: str, config: BenchmarkConfig) -> dict[str, float]:
    """Return all figures."""
    from atomdiff.concepts.concept_file import read_concept_file
    from atomdiff.concepts.library import ConceptLibrary

    files = sorted(Path(folder).rglob("*.atoms.safetensors"))
    template = read_concept_file(files[0])  # also warms torch up
    drop_from_page_cache(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the most ever taken counts from here
    before = resident_mb()
    started, used = time.perf_counter(), time.process_time()
    library = ConceptLibrary(folder)
    figures: dict[str, float] = {
        "concepts": len(files),
        "file_bytes": files[0].stat().st_size,
        "index_seconds_cold": round(time.perf_counter() - started, 2),
        "index_seconds_cold_processor": round(time.process_time() - used, 2),
        "memory_mb_before": round(before, 1),
        "index_growth_mb": round(resident_mb() - before, 1),
    }
    names = random.Random(0).sample(list(library), config.opened)
    figures |= measure_opening(library, names)
    figures["full_growth_mb"] = round(resident_mb() - before, 1)
    figures |= measure_finding(library, names, config)
    figures |= measure_threads(library, names, config)
    figures["full_growth_mb_threads"] = round(resident_mb() - before, 1)
    figures |= measure_changes(library, template, config)
    figures["growth_mb_at_the_end"] = round(resident_mb() - before, 1)
    figures["growth_mb_at_most"] = round(resident_mb("VmHWM") - before, 1)
    used = time.process_time()
    figures["index_seconds_warm"] = round(median_of(lambda: ConceptLibrary(folder), config.repeats), 2)
    figures["index_seconds_warm_processor"] = round((time.process_time() - used) / config.repeats, 2)
    return figures


def measure_opening(library: ConceptLibrary, names: list[str]) -> dict[str, float]:
    """Open concepts one after the other, each once."""
    opened = [seconds(lambda name=name: library[name]) for name in names]  # type: ignore[misc]
    return {
        "first_open_ms_median": round(1e3 * statistics.median(opened), 2),
        "first_open_ms_99th": round(1e3 * statistics.quantiles(opened, n=100)[-1], 2),
        "budget_mb": library.memory_budget / 2**20,
        "budget_used_mb": round(library.memory_used / 2**20, 1),
    }


def measure_finding(library: ConceptLibrary, names: list[str], config: BenchmarkConfig) -> dict[str, float]:
    """Take concepts from memory, and find them by their phrases."""
    kept = [info.name for info in library._cache]
    hot = random.Random(1).choices(kept, k=config.hits)
    phrases = [library.info(name).trigger_phrase.upper() for name in names]
    hits = median_of(lambda: [library[name] for name in hot], config.repeats)
    finds = median_of(lambda: [library.find(phrase) for phrase in phrases], config.repeats)
    return {
        "concepts_kept": len(kept),
        "hit_microseconds": round(1e6 * hits / len(hot), 2),
        "find_microseconds": round(1e6 * finds / len(phrases), 1),
        "find_two_words_ms": round(1e3 * median_of(lambda: library.find("red mug"), config.repeats), 2),
        "found_by_two_words": len(library.find("red mug")),
    }


def measure_threads(library: ConceptLibrary, names: list[str], config: BenchmarkConfig) -> dict[str, float]:
    """Open by threads as many concepts as there are names, other ones."""
    unopened = sorted(set(library) - set(names))
    random.Random(2).shuffle(unopened)
    unopened = unopened[: len(names)]
    with ThreadPoolExecutor(config.threads) as pool:
        took = seconds(lambda: sum(pool.map(lambda name: len(library[name].layers), unopened)))
    return {"threads": config.threads, "opens_per_second_threads": round(len(unopened) / took)}


def measure_changes(library: ConceptLibrary, template: ConceptFile, config: BenchmarkConfig) -> dict[str, float]:
    """Scan the folder again, with nothing new, with one new file, and for a name that is not there."""
    from atomdiff.concepts.concept_file import write_concept_file
    from atomdiff.utils.errors import UserError

    def pick_up(number: int) -> float:
        write_concept_file(library.folder / f"new-{number}.atoms.safetensors", template)
        return seconds(library.refresh)

    def unknown() -> None:
        with contextlib.suppress(UserError):
            library["red-mugg-20000"]

    return {
        "refresh_seconds_unchanged": round(median_of(library.refresh, config.repeats), 3),
        "refresh_seconds_one_new": round(statistics.median(pick_up(number) for number in range(config.repeats)), 3),
        "unknown_name_seconds": round(median_of(unknown, config.repeats), 3),
    }


def measure_similar(folder: str, config: BenchmarkConfig) -> dict[str, float]:
    """Compare concepts with all others, and all with each other."""
    from atomdiff.concepts.concept_file import write_concept_file
    from atomdiff.concepts.library import SIMILARITY_FILE, ConceptLibrary

    library = ConceptLibrary(folder)
    names = random.Random(0).sample(list(library), min(config.opened, len(library)))
    used = time.process_time()
    first = seconds(lambda: library.similar(names[0]))
    figures = {
        "concepts": len(library),
        "first_seconds": round(first, 1),
        "first_seconds_processor": round(time.process_time() - used, 1),
        "similarity_file_mb": round((Path(folder) / SIMILARITY_FILE).stat().st_size / 2**20, 1),
    }
    opened = ConceptLibrary(folder)
    concepts = [opened[name] for name in names]
    before = resident_mb()
    figures["first_seconds_of_a_later_process"] = round(seconds(lambda: opened.similar(concepts[0])), 3)
    each = [seconds(lambda concept=concept: opened.similar(concept)) for concept in concepts]  # type: ignore[misc]
    figures["similar_ms"] = round(1e3 * statistics.median(each), 1)
    figures["similar_microseconds_per_concept"] = round(1e6 * statistics.median(each) / len(opened), 2)
    figures["growth_mb"] = round(resident_mb() - before, 1)
    write_concept_file(opened.folder / "new.atoms.safetensors", concepts[0])
    opened.refresh()
    figures["similar_seconds_one_new"] = round(seconds(lambda: opened.similar(concepts[0])), 3)
    figures["duplicates_seconds"] = round(seconds(opened.duplicates), 1)
    figures["duplicates_found"] = len(opened.duplicates(2))
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
        figures = measure(folder, config) if config.part == "open" else measure_similar(folder, config)
    write_result(config.output, command_line("library", config), figures, load_average_before=load)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig))
