"""Filter atoms as a PEFT tuner."""

from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.layer import AtomLayer
from atomdiff.tuner.model import AtomModel
from atomdiff.tuner.peft_type import register

__all__ = ["AtomConfig", "AtomLayer", "AtomModel"]

register()
