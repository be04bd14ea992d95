"""Overrides of methods of diffusers and transformers, in models and tokenizers while concepts are loaded."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.hooks import ReplacedMethod, replace_methods, restore_methods
from atomdiff.pipelines.tokenizers import original_tokenizer
from atomdiff.pipelines.vocabulary_link import strip_tokens
from atomdiff.tuner import adapter_state, checks, merging, weight_access
from atomdiff.tuner.removable import why_not_removable
from atomdiff.utils.errors import UserError, warn


def add(part: Any) -> None:
    """Override methods of a model or tokenizer, so that they do with concepts as with a LoRA."""
    replace_methods(part, _METHODS if isinstance(part, nn.Module) else {"save_pretrained": save_tokenizer})


def remove(part: Any) -> None:
    """Give a model or tokenizer its own methods back."""
    restore_methods(part, _METHODS)


@contextmanager
def without_overrides(parts: Iterable[Any]) -> Iterator[None]:
    """Within, models and tokenizers have their own methods."""
    overridden = [
        part
        for part in parts
        if part is not None and any(isinstance(vars(part).get(name), ReplacedMethod) for name in _METHODS)
    ]
    for part in overridden:
        remove(part)
    try:
        yield
    finally:
        for part in overridden:
            add(part)


def set_adapters(model: Any, adapter_names: str | list[str], weights: Any = None) -> None:
    """As diffusers': nested blocks mean the same as in `set_active`, for all layers of a block.

    Raises:
        UserError: there is not one weight each, the model has no such block, or a DoRA cannot act beside atoms.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    given = weights if isinstance(weights, list) else [weights] * len(names)
    if len(given) != len(names):
        raise UserError(f"found {len(given)} weights for the adapters {names}: give one each")
    adapter_weights = {
        name: AdapterWeight.read(1.0 if value is None else {"blocks": value} if isinstance(value, Mapping) else value)
        for name, value in zip(names, given, strict=True)
    }
    for weight in adapter_weights.values():
        weight.check(type(model).__name__, [path for path, _ in model.named_modules()])
    _check_unmerged_dora(model, {name for name, weight in adapter_weights.items() if weight.weight})
    for path, layer in adapter_state.adapter_layers(model).items():
        layer.set_adapter(names)
        for name, weight in adapter_weights.items():
            layer.set_scale(name, weight.at(path, None))


def set_adapter(model: Any, adapter_name: str | list[str]) -> None:
    """As diffusers' and transformers'.

    Raises:
        UserError: a DoRA cannot act beside atoms.
    """
    _check_unmerged_dora(model, {adapter_name} if isinstance(adapter_name, str) else set(adapter_name))
    type(model).set_adapter(model, adapter_name)


def _check_unmerged_dora(model: nn.Module, names: set[str]) -> None:
    """Refuse DoRA on layers that atoms change: unmerged, it uses the norm of the weight without them."""
    atoms = [layer for layer in adapter_state.atom_layers(model).values() if names & layer.scaling.keys()]
    changed = {layer.get_base_layer() for layer in atoms}
    for path, layer in adapter_state.adapter_layers(model).items():
        dora = {name for name, used in getattr(layer, "use_dora", {}).items() if used and name in names}
        if dora and layer.get_base_layer() in changed:
            raise UserError(
                f"{min(dora)!r} is a LoRA with use_dora, and atoms change the weight of {path}: unmerged, it uses the "
                "norm of the weight without them; merge both with atomdiff.set_active(pipe, [...])"
            )


def save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Write the base, with the keys and values that it has without concepts."""
    names = ", ".join(map(repr, adapter_state.adapter_configs(model)))
    warn(
        f"the folder has the base only, not the concepts that are loaded ({names or 'trigger words'}): "
        "`atomdiff export --to pipeline` writes both"
    )
    return type(model).save_pretrained(bare(model), save_directory, *args, **kwargs)


def bare(model: Any) -> Any:
    """A copy of a model that shares its tensors, without adapters, merged weights and trigger words.

    Raises:
        UserError: weights are offloaded.
    """
    on_disk = any(weight_access.group_on_disk(module) is not None for module in model.modules())
    if on_disk or any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"weights of this {type(model).__name__} are offloaded, and cannot be saved with concepts loaded: unload "
            "them before, or write a pipeline with them by `atomdiff export --to pipeline`"
        )
    memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    for each in (*hooks, *vars(model).values()):
        if isinstance(each, ReplacedMethod) or not isinstance(
            each, (dict, nn.Module, str, int, float, bool, type(None))
        ):
            memo.setdefault(id(each), each)
    memo.pop(id(getattr(model, "config", None)), None)
    copied = copy.deepcopy(model, memo)
    remove(copied)
    if adapter_state.adapter_layers(copied):  # else what was fused stays, as for a LoRA
        merging.strip_adapters(copied)
    strip_tokens(copied)
    return copied


def save_tokenizer(tokenizer: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Write a tokenizer as it is without trigger words."""
    return type(tokenizer).save_pretrained(original_tokenizer(tokenizer), save_directory, *args, **kwargs)


def add_adapter(model: Any, adapter_config: Any, *args: Any, **kwargs: Any) -> None:
    """As diffusers' and transformers'; what the adapter is merged into is kept, so that it comes back exactly.

    Raises:
        UserError: the adapter's settings change the base itself, which unloading the concepts could not undo.
    """
    if change := why_not_removable(adapter_config):
        raise UserError(f"this adapter cannot be removed exactly again, as it must be beside concepts: {change}")
    type(model).add_adapter(model, adapter_config, *args, **kwargs)
    merging.keep_when_merged(model)


def fuse_lora(model: Any, *args: Any, **kwargs: Any) -> Any:
    """As diffusers'; what adapters of others are fused into is kept, too, so that it comes back exactly.

    Raises:
        UserError: a weight cannot be changed.
    """
    checks.check_writable(model)
    merging.keep_when_merged(model)
    return type(model).fuse_lora(model, *args, **kwargs)


def fuse_qkv_projections(model: Any) -> None:
    """As diffusers', unless concepts adapt what would be fused.

    Raises:
        UserError: they do.
    """
    paths = [path for path in adapter_state.adapter_layers(model) if _PROJECTION.search(path)]
    if paths:
        raise UserError(
            f"fuse_qkv_projections copies weights that concepts adapt ({paths[0]} and {len(paths) - 1} more), and the "
            "copies would not follow: unload the concepts first, or do without"
        )
    type(model).fuse_qkv_projections(model)


_PROJECTION = re.compile(r"\.(to_[qkv]|add_[qkv]_proj)(\.|$)")
_METHODS: dict[str, Callable[..., Any]] = {
    "set_adapter": set_adapter,
    "set_adapters": set_adapters,
    "save_pretrained": save_pretrained,
    "add_adapter": add_adapter,
    "fuse_lora": fuse_lora,
    "fuse_qkv_projections": fuse_qkv_projections,
}
