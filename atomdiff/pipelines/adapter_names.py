"""Names of adapters: those that a user gives are checked, those that a file's name gives are made to fit."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from itertools import chain, count

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from atomdiff.utils.errors import UserError


def given_name(name: str, models: Iterable[nn.Module], taken: Collection[str]) -> str:
    """Check the name that somebody gave for an adapter of these models, beside those that are `taken`.

    Raises:
        UserError: no adapter can have this name, or one has it.
    """
    if name in taken:  # many methods have modules by the name of an adapter, so that it is a layer's, too
        raise UserError(f"{name!r} is loaded already: choose another adapter_name, or unload it first")
    if not _can_be_name(name, _path_parts(models)):
        raise UserError(
            f"{name!r} cannot be an adapter name: use letters, digits, '_' and '-', and no name that a layer has"
        )
    return name


def derived_name(source_name: str, models: Iterable[nn.Module], taken: Collection[str]) -> str:
    """A name like that of a file, folder or repository up to its first dot; numbered where that cannot be one.

    "my mug.atoms.safetensors" gives "my_mug", and "train" gives "train_1".
    """
    stem = unicodedata.normalize("NFC", source_name).partition(".")[0]
    name, path_parts = re.sub(r"[^\w-]", "_", stem) or "concept", _path_parts(models)
    candidates = chain([name], (f"{name}_{number}" for number in count(1)))
    return next(name for name in candidates if name not in taken and _can_be_name(name, path_parts))


def _can_be_name(name: str, path_parts: Collection[str]) -> bool:
    """Whether PEFT can keep an adapter by this name: as an attribute, and as a part of its tensors' paths."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"[\w-]+", name) is not None
        and not any(hasattr(kind(), name) for kind in (nn.ParameterDict, nn.ModuleDict))
        and name not in path_parts
    )


def _path_parts(models: Iterable[nn.Module]) -> set[str]:
    """What stands between the dots in paths of tensors, those of adapters among them."""
    paths = {path for model in models for path, _ in model.named_modules()}
    for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values():
        layer = getattr(tuner, "tuner_layer_cls", BaseTunerLayer)
        paths.update((*layer.adapter_layer_names, *layer.other_param_names))
    return {"weight", "bias"}.union(*(path.split(".") for path in paths))
