"""The config of a training run: `TrainConfig`, made of groups of fields, each with its own checks."""

from atomdiff.training.config.subject import Subject
from atomdiff.training.config.train import TrainConfig, load_config

__all__ = ["Subject", "TrainConfig", "load_config"]
