"""Checks, before anything changes, that the weights and adapters of a model can be read, written and given back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from atomdiff.atoms.variants import TENSOR_NAMES
from atomdiff.tuner import weight_access
from atomdiff.tuner.adapter_state import adapter_layers, atom_layers, changes_weights, module_path
from atomdiff.tuner.base_weight import BaseWeight
from atomdiff.tuner.model import base_modules
from atomdiff.tuner.weight_access import group_on_disk, is_offloaded, walk, why_not_read, why_not_written
from atomdiff.utils.errors import UserError


def check_readable(model: nn.Module, paths: Iterable[str]) -> None:
    """Check that the weights of modules can be read where they are, and that calls use them.

    Raises:
        UserError: one cannot.
    """
    modules = dict(base_modules(model))
    _check(model, {path: modules[path] for path in paths if path in modules}, why_not_read, "adapt", "load")


def check_in_reach(model: nn.Module) -> None:
    """Check that all tensors of a model, those of adapters among them, can be read outside of calls.

    Raises:
        UserError: diffusers keeps some on disk, or some are on the meta device, without values.
    """
    for path, module in model.named_modules():
        reason = "they are offloaded to disk" if group_on_disk(module) is not None else ""
        if any(tensor is not None and tensor.is_meta for tensor in module._parameters.values()):
            reason = reason or ("" if is_offloaded(module) else "they are on the meta device, without values")
        if reason:
            where = module_path(path) or type(model).__name__
            raise UserError(
                f"cannot read the weights of {where}: {reason}; load the pipeline again, in memory and in full"
            )


def check_writable(model: nn.Module) -> None:
    """Check that the weights of all adapted layers can be changed in place.

    Raises:
        UserError: one cannot.
    """
    layers = {path: layer for path, layer in adapter_layers(model).items() if changes_weights(layer)}
    bases = {module_path(path): layer.get_base_layer() for path, layer in layers.items()}
    _check(model, bases, why_not_written, "change", "use concepts unmerged (pipe.set_adapters), or load")


def check_restorable(model: nn.Module) -> None:
    """Check that all weights that are merged can be given back.

    Raises:
        UserError: one cannot.
    """
    bases = {module_path(path): module for path, module in walk(model) if BaseWeight(module).is_kept}
    _check(model, bases, lambda module: why_not_written(module, exactly=True), "change", "load")


def check_extensible(model: nn.Module) -> None:
    """Check that tensors can be added to a model, and taken out again.

    Raises:
        UserError: diffusers offloads it with a stream, which fails on tensors that it does not know.
    """
    if any(weight_access.has_stream(module) for _, module in walk(model)):
        raise UserError(
            "the pipeline is offloaded in groups with a stream, which know only the tensors that it had then: load "
            "concepts before enable_group_offload(use_stream=True) and switch with set_active, or leave use_stream out"
        )


def check_in_memory(model: nn.Module) -> None:
    """Check that the tensors of atom adapters can be read outside of calls.

    Raises:
        UserError: diffusers keeps them on disk, together with the layers around.
    """
    groups = [group for _, module in walk(model) if (group := group_on_disk(module)) is not None]
    if not groups:
        return
    holders = {layer.tensors(kind) for layer in atom_layers(model).values() for kind in TENSOR_NAMES}
    tensors = [tensor for holder in holders for tensor in (*holder.parameters(), *holder.buffers())]
    if any(tensor in group.tensor_to_key for group in groups for tensor in tensors):
        raise UserError(
            "concepts that are offloaded to disk in groups of blocks cannot be mixed: "
            "use offload_type='leaf_level', or no offload_to_disk_path"
        )


def _check(
    model: nn.Module, modules: Mapping[str, nn.Module], why_not: Callable[[nn.Module], str], what: str, way_out: str
) -> None:
    """Refuse modules whose weights a fused copy takes the place of, or for which there is a reason why not."""
    on_disk = bool(modules) and any(group_on_disk(module) is not None for _, module in walk(model))
    for path, module in modules.items():
        if fused := weight_access.fused_parent(model, path):
            raise UserError(
                f"the projections of {fused} are fused, into a copy of their weights that no concept reaches: "
                "call unfuse_qkv_projections() first"
            )
        if reason := "it is offloaded to disk" if on_disk else why_not(module):
            raise UserError(
                f"cannot {what} the weight of {path}: {reason}; {way_out} the pipeline again, in memory and in full"
            )
        if (reader := BaseWeight(module).offloaded) is not None:
            reader.check()
