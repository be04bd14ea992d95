"""The batches of a run's steps: each is a function of the seed and of its number alone."""

import torch

from atomdiff.training.dataset import Batch
from atomdiff.training.noise import NoisyLatents
from atomdiff.training.run import Run
from atomdiff.utils.seeds import derive_seed


def batch_seed(run: Run, position: int) -> int:
    """Return the seed of all that is random in a batch, by its position among those of all processes."""
    return derive_seed(run.config.seed, "batch", position, 0)


def sample_batch(run: Run, position: int, generator: torch.Generator) -> tuple[Batch, NoisyLatents]:
    """Return a batch and its noise, on the CPU.

    Args:
        run: The run.
        position: Of the batch, among those of all processes.
        generator: Seeded with `batch_seed`.
    """
    batch = run.dataset.sample(position, run.config.train_batch_size, run.config.seed, generator)
    return batch, run.diffusion.sample(batch.latents, generator)


def batches_of(run: Run, step: int) -> range:
    """Return the numbers of a step's batches, counted on each process."""
    parts = run.config.gradient_accumulation_steps
    return range((step - 1) * parts, step * parts)


def name_images(run: Run, numbers: range) -> list[str]:
    """Return the images of the batches of these numbers on all processes, each with its timestep."""
    processes, named = run.accelerator.num_processes, []
    for position in range(numbers.start * processes, numbers.stop * processes):
        batch, noised = sample_batch(run, position, torch.Generator().manual_seed(batch_seed(run, position)))
        timesteps = noised.timesteps.tolist()
        named += [f"{name} at timestep {round(t)}" for name, t in zip(batch.images, timesteps, strict=True)]
    return named
