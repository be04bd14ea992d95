"""Tensors of one layer of a LoRA, LoCon, LoHa, LoKr, DoRA or difference -> the two factors of a plain LoRA."""

from __future__ import annotations

import re
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from atomdiff.tuner.base_weight import BaseWeight

_MAGNITUDE = re.compile(r"dora_scale|lora_magnitude_vector(?:\.weight)?")
_LARGEST_CORE = 4096  # ranks of a Tucker decomposition
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}

Layer = dict[str, Tensor]  # by kind: up, down, alpha, hada_w1_a, ...


def lora_factors(layer: Layer, base: nn.Module, scale: float | None) -> tuple[Tensor, Tensor] | None:
    """Return down (r, in, ...) and up (out, r, 1, ...), scaled, whose product is a layer's delta; None: it is zero.

    Raises:
        ValueError, RuntimeError, LookupError: the tensors do not fit the weight's shape, or are incomplete.
    """
    shape = tuple(cast(Tensor, base.weight).shape)
    if odd := [kind for kind, tensor in layer.items() if kind != "alpha" and not tensor.is_floating_point()]:
        raise ValueError(f"found {layer[odd[0]].dtype} in {odd[0]}")
    magnitudes = [
        tensor if kind == "dora_scale" else tensor.reshape(-1, 1)  # PEFT has only those of outputs
        for kind, tensor in layer.items()
        if _MAGNITUDE.fullmatch(kind)
    ]
    layer = {kind: tensor for kind, tensor in layer.items() if not _MAGNITUDE.fullmatch(kind)}
    up, down = _up_and_down(layer, shape, scale)
    if magnitudes:
        up, down = _exact_factors(_dora_delta(BaseWeight(base).read().detach(), up @ down, magnitudes[0]), shape)
    if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
        raise ValueError("its values are too large")
    ones = [1] * (len(shape) - 2)
    return (down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *ones)) if up.any() and down.any() else None


def _up_and_down(layer: Layer, shape: tuple[int, ...], scale: float | None) -> tuple[Tensor, Tensor]:
    """Return up (out, r) and down (r, in * ...), scaled."""
    if layer.keys() >= {"up", "down"} and "lora_mid" not in layer:
        up, down = layer["up"].flatten(1), layer["down"]
        _check_factors(up, down, shape)
        return up * (scale if scale is not None else _alpha_over_rank(layer, len(down))), down.flatten(1)
    if layer.keys() >= _LOHA:
        return _loha_factors(layer, shape)
    return _exact_factors(_delta(layer, shape), shape)


def _check_factors(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> None:
    if up.shape != (shape[0], len(down)) or not _has_inputs(down, shape):
        raise ValueError(f"found {tuple(up.shape)} x {tuple(down.shape)} for {shape} here")


def _has_inputs(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor has the input axes of a weight of this shape, flattened or not."""
    inputs = prod(shape[1:])
    return tensor[:1].numel() == inputs and tensor.shape[1] in (shape[1], inputs)


def _loha_factors(layer: Layer, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the factors of a LoHa: two products, of matrices or Tucker's, multiplied element by element."""
    sides = [(layer[f"hada_w{n}_a"], layer[f"hada_w{n}_b"].flatten(1), layer.get(f"hada_t{n}")) for n in (1, 2)]
    scale = _alpha_over_rank(layer, len(layer["hada_w1_b"]))
    products = [(a, b) for a, b, core in sides if core is None]
    for a, b in products:
        _check_factors(a, b, shape)
    if len(products) == 2 and prod(len(b) for _, b in products) < min(shape[0], prod(shape[1:])):
        (a_1, b_1), (a_2, b_2) = products  # the product of two sums is the sum of all products
        up = torch.einsum("oi,oj->oij", a_1, a_2).flatten(1)
        down = torch.einsum("ix,jx->ijx", b_1, b_2).flatten(0, 1)
        return up * scale, down
    first, second = (a @ b if core is None else _tucker(core, a, b, shape).flatten(1) for a, b, core in sides)
    if first.shape != second.shape:  # else their product could take more memory than the file and the weight
        raise ValueError(f"found {tuple(first.shape)} and {tuple(second.shape)} for {shape} here")
    return _exact_factors(scale * first * second, shape)


def _exact_factors(delta: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return two factors of the delta of a weight of this shape, one of which is the identity."""
    if delta.shape[0] != shape[0] or not _has_inputs(delta, shape):
        raise ValueError(f"found {tuple(delta.shape)} for {shape} here")
    delta = delta.flatten(1)
    out, inputs = delta.shape
    return (torch.eye(out), delta) if out <= inputs else (delta, torch.eye(inputs))


def _dora_delta(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Return the delta weight (out, in * ...) of a DoRA (arXiv 2402.09353) from the delta of its LoRA.

    Magnitudes are per output or, in files of LyCORIS, per input: (1, in, ...).
    """
    weight = weight.to(delta)
    adapted = weight + delta.reshape(weight.shape)
    by_inputs = len(magnitude) == 1 < len(weight)
    if magnitude.numel() != weight.shape[by_inputs]:
        raise ValueError(f"found magnitudes {tuple(magnitude.shape)} for {tuple(weight.shape)} here")
    others = [axis for axis in range(weight.ndim) if axis != by_inputs]
    sizes = torch.linalg.vector_norm(adapted, dim=others, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (magnitude.reshape(sizes.shape) / sizes * adapted - weight).flatten(1)


def _delta(layer: Layer, shape: tuple[int, ...]) -> Tensor:
    """Return the delta of a weight of this shape from the factors of LyCORIS (arXiv 2309.14859)."""
    if "diff" in layer:
        return layer["diff"]
    if layer.keys() >= {"up", "down", "lora_mid"}:
        down, up = layer["down"].flatten(1), layer["up"].flatten(1)
        return _alpha_over_rank(layer, len(down)) * _tucker(layer["lora_mid"], up.T, down, shape)
    if any(kind.startswith("lokr_w1") for kind in layer) and any(kind.startswith("lokr_w2") for kind in layer):
        first, second, ranks = *(_lokr_side(layer, side, shape) for side in ("1", "2")), _lokr_ranks(layer)
        if first.numel() * second.numel() != prod(shape):
            raise ValueError(f"found {tuple(first.shape)} and {tuple(second.shape)} for {shape} here")
        first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
        return (_alpha_over_rank(layer, ranks[0]) if ranks else 1.0) * torch.kron(first, second)
    raise ValueError(f"found {', '.join(sorted(layer))}, expected all tensors of a LoRA, LoHa, LoKr or difference")


def _lokr_side(layer: Layer, side: str, shape: tuple[int, ...]) -> Tensor:
    if (factor := layer.get(f"lokr_w{side}")) is not None:
        return factor
    a, b = layer[f"lokr_w{side}_a"], layer[f"lokr_w{side}_b"]
    if "lokr_t2" in layer and side == "2":
        return _tucker(layer["lokr_t2"], a, b, shape)
    return _checked_product(a, b, shape)


def _lokr_ranks(layer: Layer) -> list[int]:
    return [len(layer[key]) for key in ("lokr_w1_b", "lokr_w2_b") if key in layer]


def _checked_product(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    if a.shape[0] * b.shape[1] > prod(shape):
        raise ValueError(f"found {tuple(a.shape)} x {tuple(b.shape)} for {shape} here")
    return a @ b


def _tucker(core: Tensor, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the Tucker product of core (i, j, k, l), a (i, out), b (j, in): (out, in, k, l)."""
    if max(core.shape[:2]) > _LARGEST_CORE or a.shape[1] * b.shape[1] * prod(core.shape[2:]) > prod(shape):
        raise ValueError(f"found {tuple(core.shape)}, {tuple(a.shape)}, {tuple(b.shape)} for {shape} here")
    return torch.einsum("ij..., ip, jr -> pr...", core, a, b).contiguous()


def _alpha_over_rank(layer: Layer, rank: int) -> float:
    """Return the scale that programs multiply a LoRA by: alpha / rank."""
    return float(layer["alpha"]) / rank if "alpha" in layer else 1.0
