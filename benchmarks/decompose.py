"""Seconds to decompose every convolution kernel of a UNet of Stable Diffusion 1.5's size, and how good the fits are.

    python -m benchmarks.decompose

Compared are `svd` (atoms only: they need no coefficients), `sparse` (atoms learned and every row encoded) and the
recipe that the paper describes (arXiv 2403.00269), written from that description in plain batched torch: a random
dictionary, 10 rounds of 20 ISTA steps over all rows and a least-squares update of the dictionary. The recipe is timed
on some of the layers and its time scaled by rows. The weights are those of untrained layers; the quality is also
measured on trained layers, those of the toybox's base.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from atomdiff.atoms.basis import svd_atoms
from atomdiff.atoms.sparse import sparse_atoms, sparse_coefficients, sparse_quality
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result
from benchmarks.timing import seconds

ROOT = Path(__file__).parents[1]
DICTIONARY_STEPS, CODE_STEPS = 10, 20
KERNELS_AS_ROWS = "o i k l -> (o i) (k l)"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    num_atoms: int = 9
    """Atoms a layer."""
    sparsity: float = 1e-3
    """Weight of the L1 norm."""
    svd_repeats: int = 5
    """Times the whole UNet is decomposed by `svd`."""
    sparse_repeats: int = 3
    """Times the whole UNet is decomposed by `sparse`."""
    recipe_layers: tuple[str, ...] = (
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.1.resnets.1.conv1",
        "down_blocks.2.resnets.1.conv1",
    )
    """Layers on which the paper's recipe is timed: 320, 640 and 1280 channels in and out."""
    quality_layers: tuple[str, ...] = (
        "sd15:down_blocks.1.resnets.0.conv1",
        "sd15:up_blocks.3.resnets.0.conv1",
        "toybox:down_blocks.0.resnets.0.conv1",
        "toybox:mid_block.resnets.0.conv1",
        "toybox:up_blocks.1.resnets.0.conv1",
    )
    """Layers on which the quality is compared: of the untrained SD 1.5 UNet and of the toybox's trained one."""
    output: str = "benchmarks/results/decompose.json"
    """The result file."""


def untrained_kernels() -> dict[str, Tensor]:
    """Rows (blocks, k * l) of each convolution larger than 1x1 in a UNet of SD 1.5's size, as torch initializes it."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
    shapes = {n: m.weight.shape for n, m in unet.named_modules() if isinstance(m, torch.nn.Conv2d)}
    generator = torch.Generator().manual_seed(0)
    kernels = {}
    for name, shape in shapes.items():
        if shape[2:].numel() > 1:
            weight = torch.nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5, generator=generator)
            kernels[name] = rearrange(weight, KERNELS_AS_ROWS)
    return kernels


def trained_kernels() -> dict[str, Tensor]:
    """The same of the toybox's base."""
    weights = load_file(ROOT / "samples" / "toybox-sd" / "unet" / "diffusion_pytorch_model.safetensors")
    return {
        name.removesuffix(".weight"): rearrange(weight.float(), KERNELS_AS_ROWS)
        for name, weight in weights.items()
        if weight.ndim == 4 and weight.shape[2:].numel() > 1
    }


def recipe(rows: Tensor, num_atoms: int, sparsity: float) -> tuple[Tensor, Tensor]:
    """The paper's recipe: dictionary D (m, d) and coefficients A (blocks, m)."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(num_atoms, rows.shape[1], generator=generator))
    coefficients = torch.zeros(len(rows), num_atoms)
    for step in range(DICTIONARY_STEPS):
        if step:
            damping = 1e-6 * coefficients.square().sum(dim=0).max() * torch.eye(num_atoms)
            atoms = torch.linalg.solve(coefficients.T @ coefficients + damping, coefficients.T @ rows)
            atoms = torch.nn.functional.normalize(atoms)
        lipschitz = torch.linalg.eigvalsh(atoms @ atoms.T)[-1]
        for _ in range(CODE_STEPS):
            slope = (coefficients @ atoms - rows) @ atoms.T
            coefficients = torch.nn.functional.softshrink(coefficients - slope / lipschitz, float(sparsity / lipschitz))
    return atoms, coefficients


def timings(kernels: dict[str, Tensor], config: BenchmarkConfig) -> dict[str, Any]:
    """Medians over the repeats, each over all layers, and the single measurements."""
    m, sparsity = config.num_atoms, config.sparsity
    sampled = [kernels[name] for name in config.recipe_layers]
    share = sum(map(len, sampled)) / sum(map(len, kernels.values()))
    atoms = {name: sparse_atoms(rows, m, sparsity) for name, rows in kernels.items()}  # also warms up

    def all_layers(repeats: int, work: Callable[[str, Tensor], object]) -> list[float]:
        return [round(seconds(lambda: [work(name, rows) for name, rows in kernels.items()]), 3) for _ in range(repeats)]

    svd = all_layers(config.svd_repeats, lambda name, rows: svd_atoms(rows, m))
    fit = all_layers(config.sparse_repeats, lambda name, rows: sparse_atoms(rows, m, sparsity))
    encode = all_layers(config.sparse_repeats, lambda name, rows: sparse_coefficients(rows, atoms[name], sparsity))
    subset = seconds(lambda: [recipe(rows, m, sparsity) for rows in sampled])
    svd_median, fit_median, encode_median = map(statistics.median, (svd, fit, encode))
    sparse, scaled = fit_median + encode_median, subset / share
    return {
        "layers": len(kernels),
        "rows": sum(map(len, kernels.values())),
        "svd_seconds": round(svd_median, 2),
        "sparse_seconds": round(sparse, 2),
        "sparse_atoms_seconds": round(fit_median, 2),
        "sparse_codes_seconds": round(encode_median, 2),
        "recipe_layers": list(config.recipe_layers),
        "recipe_share_of_rows": round(share, 4),
        "recipe_seconds_measured": round(subset, 2),
        "recipe_seconds_scaled_by_rows": round(scaled, 1),
        "recipe_over_sparse": round(scaled / sparse, 1),
        "sparse_over_svd": round(sparse / svd_median, 1),
        "svd_repeats": svd,
        "sparse_atoms_repeats": fit,
        "sparse_codes_repeats": encode,
    }


def qualities(rows: Tensor, config: BenchmarkConfig) -> Iterator[tuple[str, dict[str, float]]]:
    """Objective (mean over rows), relative error and zeros of each way, on one layer."""
    m, sparsity = config.num_atoms, config.sparsity
    learned, plain = sparse_atoms(rows, m, sparsity), svd_atoms(rows, m)
    pairs = {
        "sparse": (learned, sparse_coefficients(rows, learned, sparsity)),
        "recipe": recipe(rows, m, sparsity),
        "svd atoms, sparse coefficients": (plain, sparse_coefficients(rows, plain, sparsity)),
        "svd": (plain, rows @ plain.T),
    }
    for name, (atoms, coefficients) in pairs.items():
        quality = sparse_quality(rows, atoms, coefficients, sparsity)
        yield (
            name,
            {
                "objective": float(f"{quality.objective:.5g}"),
                "relative_error": float(f"{quality.relative_error:.4g}"),
                "zero_fraction": round(quality.zero_fraction, 4),
            },
        )


def main(config: BenchmarkConfig) -> None:
    """Measure and write the result file."""
    quiet_libraries()
    load = round(os.getloadavg()[0], 2)
    kernels = untrained_kernels()
    layers = {f"sd15:{name}": rows for name, rows in kernels.items()}
    layers |= {f"toybox:{name}": rows for name, rows in trained_kernels().items()}
    quality = {name: dict(qualities(layers[name], config)) for name in config.quality_layers}
    for name, ways in quality.items():
        print(name, *(f"\n  {way}: {figures}" for way, figures in ways.items()), flush=True)
    figures = timings(kernels, config)
    command = command_line("decompose", config)
    write_result(config.output, command, figures, quality=quality, load_average_before=load)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig))
