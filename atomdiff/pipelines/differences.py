"""What the adapters in a pipeline change, layer by layer, and a copy of the pipeline with that merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from atomdiff.pipelines.models import locked, pipeline_models
from atomdiff.tuner import checks, merging
from atomdiff.tuner.base_weight import BaseWeight
from atomdiff.tuner.readable_copy import readable_copy
from atomdiff.tuner.slots import remove_empty_slots
from atomdiff.utils.errors import UserError
from atomdiff.utils.functional_call import PLAIN_LAYERS

_PEFT_MARKS = ("peft_config", "_hf_peft_config_loaded")  # a model that has these saves its adapters only


@dataclass(frozen=True)
class LayerDifference:
    """What the active concepts change in one layer, each times its weight."""

    component: str
    """`unet`, `text_encoder`, ..."""
    module: str
    """Path of the layer within it."""
    layer: nn.Module
    """The base layer."""
    parameters: dict[str, Tensor]
    """Difference of its `weight` (out, in/groups, ...), and `bias` (out,) where there is one; float32."""


def layer_differences(pipe: Any) -> Iterator[LayerDifference]:
    """What the active concepts of any PEFT method change, layer by layer; layers that stay as they are are left out.

    Merges a copy of one layer at a time, in float32 also where the base is in half precision; the pipeline stays as it
    is, merged or not.

    Raises:
        UserError: an adapter cannot be merged, replaces whole modules, changes something else than Linear and
            convolutions, or is out of reach.
    """
    for component, model in pipeline_models(pipe).items():
        _refuse_whole_modules(component, model)
        layers = _outer_layers(model)
        if layers:
            checks.check_in_reach(model)
        for path, layer in layers.items():
            before, merged = _merge(f"{component}.{path}", readable_copy(layer), torch.float32)
            parameters = {name: merged.get_parameter(name).data - tensor for name, tensor in before.items()}
            if not any(difference.any() for difference in parameters.values()):
                continue
            if not isinstance(merged, PLAIN_LAYERS):
                raise UserError(
                    f"the concept changes {component}.{path}, a {type(merged).__name__}, and other programs read "
                    "changes of Linear and convolutions only: use --to pipeline"
                )
            yield LayerDifference(component, path, layer.get_base_layer(), parameters)


def merged_copy(pipe: Any) -> Any:
    """Return a copy of a pipeline with the active adapters of any PEFT method merged, and no adapter layers.

    It shares all tensors but the merged ones with the pipeline, which stays as it is, also for other threads.

    Raises:
        UserError: an adapter cannot be merged, replaces whole modules, or is out of reach.
    """
    copied = copy.copy(pipe)
    with locked(pipe):
        for component, model in pipeline_models(pipe).items():
            _refuse_whole_modules(component, model)
            checks.check_writable(model)
            made = readable_copy(model)
            for path, layer in _outer_layers(made).items():
                _, base = _merge(f"{component}.{path}", layer)
                parent, _, child = path.rpartition(".")
                setattr(made.get_submodule(parent), child, base)
                remove_empty_slots(made.get_submodule(parent))
            for mark in _PEFT_MARKS:
                vars(made).pop(mark, None)
            if "config" in vars(made):  # of transformers, which `save_portable` changes for a while
                made.config = copy.copy(made.config)
            vars(copied)[component] = made
    return copied


def _outer_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> adapter layer, for those that no other wraps."""
    layers: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not any(path.startswith(f"{outer}.") for outer in layers):
            layers[path] = module
    return layers


@torch.no_grad()
def _merge(name: str, layer: Any, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], nn.Module]:
    """Merge the active adapters into a copied layer, which shares memory with the original until then.

    Returns:
        The parameters of the base layer before, and the base layer after, both in `dtype`; None: that of its calls.
    """
    base = layer.get_base_layer()
    for each, value in list(base.named_parameters(recurse=False)):
        base._parameters[each] = nn.Parameter(value.detach().to(dtype or value.dtype, copy=True), requires_grad=False)
    try:
        merging.restore(layer)
        before = {each: value.detach().clone() for each, value in base.named_parameters(recurse=False)}
        merging.merge(layer)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{name} cannot be merged, and so not exported: {error}") from error
    for each in before:
        BaseWeight(base).set_copy(None, each)
    return before, base


def _refuse_whole_modules(component: str, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise UserError(f"an adapter replaces {component}.{path} as a whole, which cannot be exported: remove it")
