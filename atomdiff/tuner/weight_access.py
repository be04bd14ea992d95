"""Read and write weights where accelerate and diffusers keep them: offloaded, cast for storage, fused, quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

_OWN_TENSORS = ("torch", "torch.nn.parameter", "torch.distributed.tensor", "torch.distributed.tensor._api")
_HOLDERS = (nn.ParameterDict, BufferDict)
FLOAT8 = {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}
_FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What `named_modules` gives, in a fraction of its time, without those that only hold the tensors of adapters."""
    modules, seen, waiting = [], set(), [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen or type(module) in _HOLDERS:
            continue
        seen.add(module)
        modules.append((path, module))
        if module._modules:
            prefix = path and f"{path}."
            waiting += [
                (prefix + name, child) for name, child in reversed(module._modules.items()) if child is not None
            ]
    return modules


def read(module: nn.Module, name: str = "weight", tensor: Tensor | None = None) -> Tensor:
    """A parameter of a module as its forward computes with it, wherever it is kept between calls.

    Accelerate's offloading (to the CPU or to disk) has it in a map of weights, diffusers' group offloading in the CPU's
    memory or in a file; layerwise casting keeps it in a smaller dtype. `tensor` is what the module has under that name,
    where that is no attribute.
    """
    value: Tensor = getattr(module, name) if tensor is None else tensor
    if not _is_hooked(module):
        return value
    if value.is_meta and (hook := _offload_hook(module)) is not None:
        value = hook.weights_map[name]
    elif (group := group_on_disk(module)) is not None:
        value = _read_group(group, value)
    return as_computed(module, value)


def as_computed(module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor in the dtype that a module's forward casts its parameters to."""
    casting = _diffusers_hook(module, "layerwise_casting")
    return tensor if casting is None else tensor.to(casting.compute_dtype)


def memory(module: nn.Module, name: str = "weight") -> Tensor:
    """The memory of a module's parameter, which its calls read from.

    Raises:
        ValueError: it is on a disk.
    """
    tensor: Tensor = getattr(module, name)
    if _is_on_disk(module):
        raise ValueError(f"the {name} is offloaded to disk, where it cannot be changed: keep it in memory")
    hook = _offload_hook(module)
    return hook.weights_map[name] if tensor.is_meta and hook is not None else tensor


@contextmanager
def loaded_in_module(module: nn.Module) -> Iterator[None]:
    """Have the parameters of a module that accelerate offloads in it meanwhile, so that others can take their place."""
    hook, offload = vars(module).get("_hf_hook"), _offload_hook(module)
    if offload is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    try:
        yield
    finally:
        offload.weights_map = None  # the hook makes another, of what is there now
        add_hook_to_module(module, hook)


def why_not_adapted(module: nn.Module) -> str:
    """Why a weight of a floating-point dtype cannot be adapted at all; empty: it can, once it has values."""
    weight: Any = module.weight
    if type(weight).__module__ not in _OWN_TENSORS:
        return f"it is quantized ({type(weight).__module__}.{type(weight).__name__})"
    if weight.dtype in FLOAT8 and _diffusers_hook(module, "layerwise_casting") is None:
        return f"it is {weight.dtype}, in which nothing can be computed; use enable_layerwise_casting"
    return ""


def why_not_read(module: nn.Module) -> str:
    """Why the values of a module's weight cannot be had; empty: they can."""
    weight: Any = getattr(module, "weight", None)
    if weight is None:
        return "it has none of its own"
    if weight.is_meta and _offload_hook(module) is None:
        return "it is on the meta device, without values"
    return why_not_adapted(module)


def why_not_written(module: nn.Module, exactly: bool = False) -> str:
    """Why a weight cannot be changed in place so that calls of its module follow; empty: it can.

    `exactly`: what is written was there before, so that a small dtype can hold it.
    """
    if reason := why_not_read(module):
        return reason
    weight: Any = module.weight
    if weight.dtype in FLOAT8 and not exactly:
        return f"it is stored in {weight.dtype}, to which a merged weight would be rounded"
    return "it is offloaded to disk" if _is_on_disk(module) else ""


def fused_parent(model: nn.Module, path: str) -> str:
    """Path of the attention that computes with a fused copy of a layer's weight; empty: there is none."""
    parent, _, name = path.rpartition(".")
    return parent if name in _FUSED and is_fused(model.get_submodule(parent)) else ""


def is_fused(attention: Any) -> bool:
    """Whether an attention computes with a copy of its projections' weights.

    The one of UNets says so by its processor: `unfuse_qkv_projections` leaves all else.
    """
    if getattr(attention, "fused_projections", False) is not True:
        return False
    return hasattr(attention, "unfuse_projections") or type(attention.processor).__name__.startswith("Fused")


def forget_buffer(module: nn.Module, name: str) -> None:
    """Let accelerate not look for a buffer that is taken away when its hook is removed."""
    if (hook := _offload_hook(module)) is not None:
        hook.original_devices.pop(name, None)


def put_in_memory(copied: nn.Module) -> None:
    """Give a copy of a model that shares its tensors those that `read` gives; no module is offloaded or cast any more.

    What keeps tensors without values, or on a disk, has to be ruled out before (`checks.check_in_reach`).
    """
    for module in copied.modules():
        if not _is_hooked(module):
            continue
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                value = read(module, name, tensor).detach()
                module._parameters[name] = nn.Parameter(value, tensor.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = read(module, name, buffer)
        for name in ("_hf_hook", "_diffusers_hook", "forward", "_old_forward"):
            vars(module).pop(name, None)


def comes_per_call(module: nn.Module) -> bool:
    """Whether a module's weight comes for the time of its calls, as another tensor each time."""
    return is_offloaded(module) or _diffusers_hook(module, "layerwise_casting") is not None


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's parameters come to the GPU for the time of its calls alone."""
    return _offload_hook(module) is not None or _diffusers_hook(module, "group_offloading") is not None


def has_stream(module: nn.Module) -> bool:
    """Whether diffusers offloads a module in a group with a stream, which knows only the tensors it was made with."""
    hook = _diffusers_hook(module, "group_offloading")
    return hook is not None and hook.group.stream is not None


def _is_on_disk(module: nn.Module) -> bool:
    hook = _offload_hook(module)
    if hook is not None and module.weight.is_meta:  # type: ignore[union-attr]
        return hook.weights_map["weight"] is not hook.weights_map["weight"]
    return group_on_disk(module) is not None


def _is_hooked(module: nn.Module) -> bool:
    state = vars(module)
    return "_hf_hook" in state or "_diffusers_hook" in state


def _offload_hook(module: nn.Module) -> Any:
    """Accelerate's hook that has a module's parameters in a map, among several; None: there is none."""
    hook = vars(module).get("_hf_hook")
    for each in (hook, *getattr(hook, "hooks", ())):
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            return each
    return None


def _diffusers_hook(module: nn.Module, name: str) -> Any:
    registry = vars(module).get("_diffusers_hook")
    return None if registry is None else registry.get_hook(name)


def group_on_disk(module: nn.Module) -> Any:
    """The group in which diffusers offloads a module to disk; None: there is none."""
    hook = _diffusers_hook(module, "group_offloading")
    return hook.group if hook is not None and hook.group.offload_to_disk_path is not None else None


def _read_group(group: Any, tensor: Tensor) -> Tensor:
    from safetensors import safe_open

    if tensor not in group.tensor_to_key or not group._is_offloaded_to_disk:
        return tensor
    with safe_open(group.safetensors_file_path, framework="pt") as opened:
        stored: Tensor = opened.get_tensor(group.tensor_to_key[tensor])
    return stored.clone()
