"""Calls of diffusers and transformers on a model that act otherwise while concepts are loaded into it."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.placeholder_tokens import bare_tokenizer, without_words
from atomdiff.tuner import adapter_state, merging
from atomdiff.tuner.removable import why_not_removable
from atomdiff.utils.errors import UserError


class _Call:
    """A method of one model in place of its class's, with the same signature; copies of the model have their own."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner, self.name, self.function = owner, name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.owner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """Pipelines look at what a model's `save_pretrained` takes."""
        return inspect.signature(getattr(type(self.owner), self.name).__get__(self.owner))


def adopt(part: Any) -> None:
    """Let calls of a model or tokenizer do as for a LoRA, or the right thing, while concepts are loaded."""
    release(part)
    calls = _CALLS if isinstance(part, nn.Module) else {"save_pretrained": save_tokenizer}
    for name, function in calls.items():
        if hasattr(type(part), name):
            vars(part)[name] = _Call(part, name, function)


def release(part: Any) -> None:
    """Give a model or tokenizer its own calls back."""
    for name in _CALLS:
        if isinstance(vars(part).get(name), _Call):
            del vars(part)[name]


@contextmanager
def as_they_are(parts: Iterable[Any]) -> Iterator[None]:
    """Within, models and tokenizers have their own calls."""
    adopted = [part for part in parts if part is not None and any(isinstance(c, _Call) for c in vars(part).values())]
    for part in adopted:
        release(part)
    try:
        yield
    finally:
        for part in adopted:
            adopt(part)


def set_adapters(model: Any, adapter_names: str | list[str], weights: Any = None) -> None:
    """As diffusers': nested blocks mean the same as in `set_active`, for all layers of a block.

    Raises:
        UserError: there is not one weight each, or the model has no such block.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    given = weights if isinstance(weights, list) else [weights] * len(names)
    if len(given) != len(names):
        raise UserError(f"found {len(given)} weights for the adapters {names}: give one each")
    strengths = {
        name: AdapterWeight.read(
            1.0 if weight is None else {"blocks": weight} if isinstance(weight, Mapping) else weight
        )
        for name, weight in zip(names, given, strict=True)
    }
    for strength in strengths.values():
        strength.check(type(model).__name__, [path for path, _ in model.named_modules()])
    for path, layer in adapter_state.layers_by_path(model).items():
        layer.set_adapter(names)
        for name, strength in strengths.items():
            layer.set_scale(name, strength.at(path, None))


def save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Write the base, with the keys and values that it has without concepts."""
    names = ", ".join(map(repr, adapter_state.adapter_configs(model)))
    warnings.warn(
        f"the folder has the base only, not the concepts that are loaded ({names or 'trigger words'}): "
        "`atomdiff export --to pipeline` writes both",
        stacklevel=3,
    )
    return type(model).save_pretrained(bare(model), save_directory, *args, **kwargs)


def bare(model: Any) -> Any:
    """A copy of a model that shares its tensors, without adapters, merged weights and trigger words.

    Raises:
        UserError: weights are on the meta device.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"weights of this {type(model).__name__} are offloaded, and cannot be saved with concepts loaded: unload "
            "them before, or write a pipeline with them by `atomdiff export --to pipeline`"
        )
    memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    for each in (*hooks, *vars(model).values()):
        if isinstance(each, _Call) or not isinstance(each, (dict, nn.Module, str, int, float, bool, type(None))):
            memo.setdefault(id(each), each)
    memo.pop(id(getattr(model, "config", None)), None)
    copied = copy.deepcopy(model, memo)
    release(copied)
    if adapter_state.adapter_layers(copied):  # else what was fused stays, as for a LoRA
        merging.strip_adapters(copied)
    without_words(copied)
    return copied


def save_tokenizer(tokenizer: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Write a tokenizer as it is without trigger words."""
    return type(tokenizer).save_pretrained(bare_tokenizer(tokenizer), save_directory, *args, **kwargs)


def add_adapter(model: Any, adapter_config: Any, *args: Any, **kwargs: Any) -> None:
    """As diffusers' and transformers'; what the adapter is merged into is kept, so that it comes back exactly.

    Raises:
        UserError: the adapter's settings change the base itself, which unloading the concepts could not undo.
    """
    if change := why_not_removable(adapter_config):
        raise UserError(f"this adapter cannot be taken out again beside concepts: {change}")
    type(model).add_adapter(model, adapter_config, *args, **kwargs)
    merging.keep_when_merged(model)


def fuse_lora(model: Any, *args: Any, **kwargs: Any) -> Any:
    """As diffusers'; what adapters of others are fused into is kept, too, so that it comes back exactly."""
    merging.keep_when_merged(model)
    return type(model).fuse_lora(model, *args, **kwargs)


def fuse_qkv_projections(model: Any) -> None:
    """As diffusers', unless concepts adapt what would be fused.

    Raises:
        UserError: they do.
    """
    paths = [path for path in adapter_state.layers_by_path(model) if _PROJECTION.search(path)]
    if paths:
        raise UserError(
            f"fuse_qkv_projections copies weights that concepts adapt ({paths[0]} and {len(paths) - 1} more), and the "
            "copies would not follow: unload the concepts first, or do without"
        )
    type(model).fuse_qkv_projections(model)


_PROJECTION = re.compile(r"\.(to_[qkv]|add_[qkv]_proj)(\.|$)")
_CALLS: dict[str, Callable[..., Any]] = {
    "set_adapters": set_adapters,
    "save_pretrained": save_pretrained,
    "add_adapter": add_adapter,
    "fuse_lora": fuse_lora,
    "fuse_qkv_projections": fuse_qkv_projections,
}
