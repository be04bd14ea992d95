"""A fleet: the options of a training run, which all subjects of a table share, and how many workers train them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from atomdiff.training.config.train import TrainConfig
from atomdiff.utils.fields import ConfigGroup, ExistingPath, NeedsPackage, PositiveFloat, PositiveInt
from atomdiff.utils.paths import PathText


@dataclass(frozen=True, kw_only=True)
class FleetConfig(ConfigGroup):
    """Subjects and workers."""

    subjects: ExistingPath
    """Table of subjects: a CSV file with a header, or a YAML list of mappings. A column is an option of a training run;
    name and instance_data_dir are required. Empty cells mean the run's own value."""
    output_dir: PathText = "out/fleet"
    """Output folder: subjects/NAME for each subject, the library of all concepts, the report, and the state by which
    the same command goes on."""
    num_workers: PositiveInt | None = None
    """Workers that train at the same time, each with its own copy of the base. Default: one for each GPU; without GPUs
    one, or on a Ray cluster one for each CPU."""
    max_tries: PositiveInt = 2
    """How often a subject is tried in all by one command, on another worker if there is one."""
    worker_timeout: PositiveFloat | None = 1800.0
    """Seconds without a sign of life (a phase, a step, an image) after which a worker that trains is killed, and its
    subject goes to another one. The default is many times what a step of a large base takes. Without a limit (none), a
    worker that hangs keeps its subject for ever."""
    ray_address: Annotated[str, NeedsPackage("ray", "fleet")] | None = None
    """Ray cluster that the workers run on: "auto" for the one that this machine belongs to, ray://HOST:PORT, or "local"
    for a new one on this machine. All of its machines need the same paths. Default: processes of this machine."""


@dataclass(frozen=True, kw_only=True)
class FleetOptions(FleetConfig, TrainConfig):  # type: ignore[misc]
    """Train each subject of a table into a concept of its own, on several workers; takes all options of train.

    What a command line is parsed by: the values of `FleetConfig`, and those that a run is built from with each row.
    """
