"""Coeff-Tuning: attention maps that are combinations of those of all heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from atomdiff.activation_adapters.config import ActivationConfig
from atomdiff.activation_adapters.layer import ActivationLayer
from atomdiff.activation_adapters.model import ActivationModel, device_of
from atomdiff.tuner.slots import add_slot, replace_children

_SLOT = "attention_maps"
_HEADS = {
    "diffusers.Attention": "heads",
    "transformers.CLIPAttention": "num_heads",
    "transformers.ViTAttention": "num_attention_heads",
    "transformers.DeiTAttention": "num_attention_heads",
}


@dataclass
class CoeffTuningConfig(ActivationConfig):
    """Coeff-Tuning: the attention map of head h becomes the sum over i of (alpha + I)[h, i] times that of head i.

    "Coeff-Tuning: A Graph Filter Subspace View for Tuning Attention-Based Large Models", arXiv 2503.18337.
    """

    METHOD: ClassVar[str] = "COEFF_TUNING"
    PRESET: ClassVar[str] = "attention"

    scale: float = field(
        default=1.0,
        metadata={
            "help": "Factor between the trained numbers and alpha. With AdamW it acts as one on their learning rate, "
            "for adapters of several methods that are trained at the rate of one."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields and bring them into the form that is stored."""
        super().__post_init__()
        if type(self.scale) not in (int, float) or not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale!r:.100}: expected a number above 0")


class HeadMixing(nn.Module):
    """The trained alpha / scale (heads, heads) of an attention; zero at first."""

    def __init__(self, heads: int, scale: float = 1.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(heads, heads))
        self.scale = scale

    def forward(self, weight: float | Tensor) -> Tensor:
        """Alpha times a weight, or weights (batch,): (1 or batch, heads, heads), which offloading leaves as it is."""
        if isinstance(weight, Tensor):
            return self.scale * weight.to(self.alpha).reshape(-1, 1, 1) * self.alpha
        return self.scale * weight * self.alpha[None]


class CoeffTuningLayer(ActivationLayer):
    """Mixes the attention maps of an attention, in a slot of which it stands."""

    adapter_layer_names = ("coeff_tuning_mixing",)

    def alpha(self, batch: int) -> Tensor | None:
        """The sum of the adapters' alphas, each times its weight: (1 or batch, heads, heads); None: there is none."""
        terms = [mixing(weight) for mixing, weight in self.weights(batch)]
        return sum(terms[1:], terms[0]) if terms else None


class CoeffTuningModel(ActivationModel):
    """Adds alphas to attentions; use it by `get_peft_model(model, CoeffTuningConfig())` or `add_adapter`."""

    prefix = "coeff_tuning_"
    tuner_layer_cls = CoeffTuningLayer

    def why_not(self, config: CoeffTuningConfig, module: nn.Module, model: nn.Module) -> str:
        """Why a module is no attention whose maps can be mixed; empty: it is."""
        known = ", ".join(name.partition(".")[2] for name in _HEADS)
        return "" if _heads(module) else f"it is a {type(module).__name__}, expected an attention ({known})"

    def add_to(
        self, config: CoeffTuningConfig, adapter_name: str, path: str, module: Any, parent: nn.Module
    ) -> list[CoeffTuningLayer]:
        """Add an alpha to an attention."""
        layer = add_slot(module, _SLOT, _run)
        if not isinstance(layer, CoeffTuningLayer):
            layer = CoeffTuningLayer(layer)
            module.add_module(_SLOT, layer)
        mixing = HeadMixing(_heads(module), config.scale)
        layer.add_adapter(adapter_name, mixing, device_of(module), config.inference_mode)
        return [layer]


def mixed_heads(alpha: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The sum over i of alpha[h, i] F_i V_h: what mixing attention maps F adds to each head's output.

    The maps are never kept: each is applied to the values of all heads, side by side, in one call.

    Args:
        alpha: (1 or batch, heads, heads).
        query: (batch, heads, queries, d).
        key: (batch, heads, keys, d).
        value: (batch, heads, keys, e).
        *args: further arguments of `scaled_dot_product_attention`.
        **kwargs: further keywords of it.

    Returns:
        (batch, heads, queries, e)
    """
    heads = value.shape[1]
    if not query.shape[1] == key.shape[1] == heads == alpha.shape[1]:
        raise ValueError(
            f"Coeff-Tuning found {query.shape[1]}, {key.shape[1]} and {heads} heads of queries, keys and values, and "
            f"expected {alpha.shape[1]} of each"
        )
    values = rearrange(value, "b j k e -> b 1 k (j e)").expand(-1, heads, -1, -1)
    outputs = scaled_dot_product_attention(query, key, values, *args, **kwargs)  # (batch, i, queries, (j e))
    outputs = rearrange(outputs, "b i n (j e) -> b i n j e", j=heads)
    alpha = alpha.to(outputs).expand(len(outputs), -1, -1)
    return einsum(alpha, outputs, "b h i, b i n h e -> b h n e")


class _MixHeads(TorchFunctionMode):
    """A `with` block in which the attention maps of an attention are mixed, in this thread."""

    def __init__(self, layer: CoeffTuningLayer) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is not scaled_dot_product_attention:
            return output
        self.calls += 1
        alpha = self.layer.alpha(len(output))
        return output if alpha is None else output + mixed_heads(alpha, *args, **kwargs)

    def mix_maps(self, get_maps: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Maps (batch * heads, queries, keys), as diffusers keeps them in its own attention, mixed."""
        maps = get_maps(*args, **kwargs)
        self.calls += 1
        heads = next(iter(self.layer.adapters.values())).alpha.shape[0]
        alpha = self.layer.alpha(len(maps) // heads)
        if alpha is None or len(maps) % heads:  # slices of them are refused later
            return maps
        by_head = rearrange(maps, "(b i) n k -> b i n k", i=heads)
        alpha = alpha.to(maps).expand(len(by_head), -1, -1)
        return maps + rearrange(einsum(alpha, by_head, "b h i, b i n k -> b h n k"), "b h n k -> (b h) n k")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled calls would pass the mode by
def _run(attention: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an attention with its maps mixed."""
    layer = attention.attention_maps
    if not isinstance(layer, CoeffTuningLayer) or not layer.acts:
        return cls.forward(attention, *args, **kwargs)
    copied = replace_children(attention, cls)
    with _MixHeads(layer) as mix:
        if hasattr(attention, "get_attention_scores"):
            vars(copied)["get_attention_scores"] = partial(mix.mix_maps, attention.get_attention_scores)
        output = cls.forward(copied, *args, **kwargs)
    if mix.calls != 1:
        processor = getattr(attention, "processor", None)
        how = f"the {type(processor).__name__} of this attention" if processor is not None else "this attention"
        raise ValueError(
            f"Coeff-Tuning mixes the maps of all heads where they are computed at once, and {how} computes them in "
            f"{mix.calls or 'no'} known call(s): use diffusers' AttnProcessor2_0 or AttnProcessor, or "
            "attn_implementation='sdpa' of transformers"
        )
    return output


def _heads(module: Any) -> int:
    """The number of heads of an attention; 0: it is none that is known."""
    kind = type(module)
    name = _HEADS.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}")
    return int(getattr(module, name)) if name else 0
