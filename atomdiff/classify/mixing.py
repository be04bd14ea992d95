"""Mixed batches: every sample of a batch has a patch of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atomdiff.classify.head import head_of, like_base
from atomdiff.classify.model import base_norms
from atomdiff.classify.patches import Patches, check_known, find_patches, set_active
from atomdiff.tuner.adapter_state import adapter_configs, adapter_layers, can_mix
from atomdiff.tuner.mixed_batch import BatchLayout
from atomdiff.utils.errors import UserError

_NO_ADAPTER = "__base__"  # as PEFT calls it


@contextmanager
def mixed_batch(model: Any, samples: Sequence[str | None]) -> Iterator[None]:
    """Within, each sample of a batch is classified by a patch of its own: adapter, head, batch norms' statistics.

    `logits` are (samples, most classes of any of these patches); after the classes of its own patch a sample has -inf,
    so that argmax and softmax are right. The patch that was active is so again afterwards. One thread at a time may
    call the model.

    Args:
        model: a model with patches, in evaluation mode.
        samples: for each sample of the batch the name of its patch, or None for the base with its own head.

    Raises:
        UserError: there is no such patch, or its adapter cannot act by sample; or, in the model's call, the batch has
            not as many samples, or labels to compute a loss of.
    """
    if isinstance(samples, str) or not samples:
        raise UserError(f"found the samples {samples!r}; give a list: for each a patch's name, or None for the base")
    patches = find_patches(model)
    with ExitStack() as undo:
        undo.callback(set_active, model, patches.active)
        undo.callback(setattr, patches, "mixing", False)
        set_active(model, None)
        _check(model, patches, samples)
        patches.mixing = True
        undo.callback(model.register_forward_pre_hook(partial(_check_call, len(samples)), with_kwargs=True).remove)
        for module, hook in (*_head_hooks(model, patches, samples), *_norm_hooks(model, patches, samples)):
            undo.callback(module.register_forward_hook(hook).remove)
        for layer in adapter_layers(model).values():
            if can_mix(layer):
                undo.callback(setattr, layer, "mixed_batch", None)
                weights = [{name: 1.0} if name is not None and name in layer.scaling else {} for name in samples]
                layer.mix(BatchLayout(len(samples), images=None), weights)
            elif set(samples) & set(layer._all_available_adapter_names()):
                layer._disable_adapters = False
                undo.callback(layer.register_forward_pre_hook(partial(_choose, samples), with_kwargs=True).remove)
        yield


def _check(model: Any, patches: Patches, samples: Sequence[str | None]) -> None:
    """Refuse what cannot be mixed."""
    if model.training:
        raise UserError("the model is in training mode, where batch norms mix the samples: call model.eval() first")
    if None in samples and not head_of(model).classes:
        raise UserError("the base has no head of its own, so that None gives no classes: give each sample a patch")
    for name in {name for name in samples if name is not None}:
        check_known(model, patches, name)
        layers = adapter_layers(model, name).values()
        if not all(_acts_by_sample(layer, name) for layer in layers):
            method = adapter_configs(model)[name].peft_type.value
            raise UserError(
                f"{name!r} is a {method} adapter, which PEFT cannot give to some samples of a batch: classify its "
                "images in a batch of their own, by set_active"
            )


def _acts_by_sample(layer: Any, name: str) -> bool:
    if can_mix(layer):
        return True
    return hasattr(layer, "_mixed_batch_forward") and not getattr(layer, "use_dora", {}).get(name)


def _check_call(samples: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    batch = next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), 0)
    if batch != samples:
        raise UserError(f"found a batch of {batch} for {samples} samples of mixed_batch; give one image a sample")
    if kwargs.get("labels") is not None:
        raise UserError("a mixed batch has no loss, as its samples have different classes: leave out labels")


def _choose(
    samples: Sequence[str | None], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tell a layer of PEFT the adapter of each image, or of each window of an image."""
    repeats = len(args[0]) // len(samples)
    own = layer._all_available_adapter_names()
    names = [name if name in own else _NO_ADAPTER for name in samples for _ in range(repeats)]
    return args, {**kwargs, "adapter_names": names}


_Hooks = Iterator[tuple[nn.Module, Callable[..., Tensor]]]


def _head_hooks(model: Any, patches: Patches, samples: Sequence[str | None]) -> _Hooks:
    """Let the parts of the base's head give what those of the samples' heads give."""
    heads = {name: patches.loaded[name].head.modules for name in samples if name is not None}
    for part, module in head_of(model).modules.items():
        parts = {name: like_base(model, head[part]) for name, head in heads.items()}
        yield module, partial(_call_by_sample, samples, parts)


def _call_by_sample(
    samples: Sequence[str | None], parts: Mapping[str, nn.Module], _: nn.Module, args: tuple[Tensor], output: Tensor
) -> Tensor:
    (x,) = args
    outputs: dict[str | None, tuple[Tensor, Tensor]] = {}
    for name in dict.fromkeys(samples):
        index = torch.tensor([number for number, each in enumerate(samples) if each == name], device=x.device)
        own: Tensor = output[index] if name is None else parts[name](x[index])
        outputs[name] = index, own
    width = max(own.shape[-1] for _, own in outputs.values())
    mixed = output.new_full((len(samples), *output.shape[1:-1], width), -torch.inf)
    for index, own in outputs.values():
        mixed[index, ..., : own.shape[-1]] = own
    return mixed


def _norm_hooks(model: Any, patches: Patches, samples: Sequence[str | None]) -> _Hooks:
    """Let the base's batch norms normalize each sample by its own running statistics, where patches have some."""
    own = [patches.loaded[name].statistics if name is not None else {} for name in samples]
    for path, norm in base_norms(model).items():
        if any(f"{path}.running_mean" in statistics for statistics in own):
            buffers = dict(norm.named_buffers(recurse=False))
            mean, variance = (
                torch.stack([statistics.get(f"{path}.{name}", buffers[name]).to(buffers[name]) for statistics in own])
                for name in ("running_mean", "running_var")
            )
            yield norm, partial(_normalize_by_sample, mean, variance)


def _normalize_by_sample(mean: Tensor, variance: Tensor, norm: Any, args: tuple[Tensor], _: Tensor) -> Tensor:
    """Normalize x (samples * images, channels, ...) by statistics (samples, channels), all channels side by side."""
    (x,) = args
    images = len(x) // len(mean)
    mean, variance = (each.repeat_interleave(images, dim=0).flatten() for each in (mean, variance))
    weight, bias = (None if each is None else each.repeat(len(x)) for each in (norm.weight, norm.bias))
    side_by_side = x.reshape(1, -1, *x.shape[2:])  # (1, samples * images * channels, ...)
    return F.batch_norm(side_by_side, mean, variance, weight, bias, False, 0.0, norm.eps).reshape(x.shape)
