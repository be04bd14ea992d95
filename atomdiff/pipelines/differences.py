"""What the adapters in a pipeline change, layer by layer, and the pipeline as it is without adapter layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from atomdiff.pipelines.hooks import MISSING, attributes_set
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.switch import merge, restore
from atomdiff.tuner import merging, weight_access
from atomdiff.tuner.dry_run import copy_structure
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

    Merges a copy of one layer at a time, in float32 also where the base is in half precision. A pipeline that is merged
    is restored first.

    Raises:
        UserError: an adapter cannot be merged, replaces whole modules, or changes something else than Linear and
            convolutions.
    """
    restore(pipe)
    for component, model in pipeline_models(pipe).items():
        _refuse_whole_modules(component, model)
        for path, layer in _outer_layers(model).items():
            base: Any = layer.get_base_layer()
            try:
                parameters = _differences(layer)
            except (ValueError, RuntimeError) as error:
                raise UserError(f"{component}.{path} cannot be merged, and so not exported: {error}") from error
            if not any(difference.any() for difference in parameters.values()):
                continue
            if not isinstance(base, PLAIN_LAYERS):
                raise UserError(
                    f"the concept changes {component}.{path}, a {type(base).__name__}, and other programs read changes "
                    "of Linear and convolutions only: use --to pipeline"
                )
            yield LayerDifference(component, path, base, parameters)


@contextmanager
def without_adapters(pipe: Any) -> Iterator[None]:
    """The pipeline merged, as if it had never had adapters; afterwards unmerged, with all of them."""
    layers = {}
    for component, model in pipeline_models(pipe).items():
        _refuse_whole_modules(component, model)
        layers[model] = _outer_layers(model)
    with ExitStack() as undo:
        undo.callback(restore, pipe)
        for model in layers:
            undo.enter_context(attributes_set(model, **dict.fromkeys(_PEFT_MARKS, MISSING)))
        merge(pipe)
        for model, outer in layers.items():
            for path, layer in outer.items():
                undo.callback(_put, model, path, layer)
                _put(model, path, layer.get_base_layer())
        yield


def _outer_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> adapter layer, for those that no other wraps."""
    layers: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not any(path.startswith(f"{outer}.") for outer in layers):
            layers[path] = module
    return layers


@torch.no_grad()
def _differences(layer: Any) -> dict[str, Tensor]:
    """Parameter name -> merged minus base, in float32."""
    layer = copy_structure(layer)
    base = layer.get_base_layer()
    before = {name: weight_access.read(base, name).detach().float() for name, _ in base.named_parameters(recurse=False)}
    for name, tensor in before.items():
        base._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=False)  # merging may write into it
    weight_access.remove_offload_hooks(base)
    merging.merge(layer)
    return {name: getattr(base, name).data - tensor for name, tensor in before.items()}


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _refuse_whole_modules(component: str, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise UserError(f"an adapter replaces {component}.{path} as a whole, which cannot be exported: remove it")
