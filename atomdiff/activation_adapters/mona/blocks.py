"""The blocks that Mona adapts: where its adapters stand in each, and how tokens lie in an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from einops import rearrange
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from atomdiff.activation_adapters.layer import ActivationLayer
from atomdiff.tuner.slots import replace_children

AFTER_BLOCK, AFTER_ATTENTION, AFTER_MLP = "after_block", "after_attention", "after_mlp"


@dataclass(frozen=True)
class TokenLayout:
    """How tokens lie in an image."""

    height: int
    """In tokens."""
    width: int
    """In tokens."""
    prefix: int = 0
    """Tokens before those of the image, such as a class token; no adapter sees them."""

    def residual(self, slot: nn.Module | None, tokens: Tensor) -> Tensor | None:
        """What the adapters of a slot add to tokens (batch, count, d); None: nothing.

        Raises:
            ValueError: the tokens do not lie so.
        """
        if not _acts(slot):
            return None
        count = tokens.shape[1]
        if count != self.prefix + self.height * self.width:
            before = f"{self.prefix} + " if self.prefix else ""
            raise ValueError(
                f"Mona found {count} tokens and expected {before}{self.height} x {self.width}: give images of the size "
                "that the model is configured for, or leave the block out by exclude_modules"
            )
        images = rearrange(tokens[:, self.prefix :], "b (h w) d -> b d h w", h=self.height)
        added: Tensor = cast(Any, slot).residual(images)
        return functional.pad(rearrange(added, "b d h w -> b (h w) d"), (0, 0, self.prefix, 0))

    def add(self, slot: nn.Module | None, tokens: Tensor) -> Tensor:
        """Tokens (batch, count, d) with what the adapters of a slot add to them."""
        added = self.residual(slot, tokens)
        return tokens if added is None else tokens + added


@dataclass(frozen=True)
class Block:
    """A kind of block."""

    slots: Callable[[Any], dict[str, int]]
    """Its slots, with the number of channels that adapters find there."""
    run: Callable[..., Any]
    """Its forward with slots, see `slots.add_slot`."""
    why_not: Callable[[Any], str] = lambda block: ""
    """Why this block cannot be adapted; empty: it can."""
    prefix: int | None = None
    """Tokens before those of the image, of blocks whose layout follows from the model's settings alone."""

    def layout(self, model: Any) -> TokenLayout | None:
        """The layout of tokens by the settings of a model; None: a call says it."""
        if self.prefix is None:
            return None
        (height, width), (rows, columns) = _pair(model.config.image_size), _pair(model.config.patch_size)
        return TokenLayout(height // rows, width // columns, self.prefix)


def find_block(module: nn.Module) -> Block | None:
    """The kind of block that a module is; None: none that Mona knows."""
    kind = type(module)
    return _BLOCKS.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}")


def _run_convolutional(block: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """A block whose output is an image of features."""
    return block.after_block(cls.forward(block, *args, **kwargs))


def _run_swin(block: Any, cls: Any, tokens: Tensor, input_dimensions: Any, *args: Any, **kwargs: Any) -> Any:
    layout = TokenLayout(*map(int, input_dimensions))
    call = partial(_call_branches, block, cls, _slot(block, AFTER_ATTENTION), layout, "layernorm_after", "dropout")
    output, *others = call(tokens, input_dimensions, *args, **kwargs)
    return (layout.add(_slot(block, AFTER_MLP), output), *others)


def _run_vit(block: Any, cls: Any, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    slots = _slot(block, AFTER_ATTENTION), _slot(block, AFTER_MLP)
    layout = next((cast(Any, slot).layout for slot in slots if _acts(slot)), None)
    if layout is None:
        return cls.forward(block, tokens, *args, **kwargs)
    call = partial(_call_branches, block, cls, slots[0], layout, "layernorm_after", "dropout")
    return layout.add(slots[1], call(tokens, *args, **kwargs))


def _run_transformer(block: Any, cls: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A transformer of a UNet, which takes an image, and calls its own blocks with the image's pixels as tokens."""
    layout = TokenLayout(*hidden_states.shape[-2:])
    slots = [
        (_slot(block, f"{AFTER_ATTENTION}_{i}"), _slot(block, f"{AFTER_MLP}_{i}"))
        for i in range(len(block.transformer_blocks))
    ]
    if not any(_acts(slot) for pair in slots for slot in pair):
        return cls.forward(block, hidden_states, *args, **kwargs)
    inner = [
        partial(_run_basic_block, each, *pair, layout)  # so that gradient checkpointing runs all of it again
        for each, pair in zip(block.transformer_blocks, slots, strict=True)
    ]
    return cls.forward(replace_children(block, cls, transformer_blocks=inner), hidden_states, *args, **kwargs)


def _run_basic_block(
    block: Any, after_attention: Any, after_mlp: Any, layout: TokenLayout, *args: Any, **kwargs: Any
) -> Tensor:
    norm, last = ("norm3", "ff") if block.attn2 is None else ("norm2", "attn2")
    output = _call_branches(block, None, after_attention, layout, norm, last, *args, **kwargs)
    return layout.add(after_mlp, output)


def _call_branches(
    block: Any,
    cls: Any,
    slot: nn.Module | None,
    layout: TokenLayout,
    norm: str,
    last: str,
    tokens: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The output of a block of residual branches with a slot after the first of them.

    The norm of the second branch gets the sum that the slot follows. What the slot adds goes through this norm, and is
    added once more to the result of the branch, which the block adds to the sum.

    Args:
        block: the block.
        cls: the class whose forward is called; None: the block is called, with its hooks.
        slot: that after the first branch.
        layout: how tokens lie in an image.
        norm: name of the second branch's norm.
        last: name of the second branch's last child, which may be called before the norm, too.
        tokens: (batch, count, d).
        *args: further arguments of the block.
        **kwargs: further keywords of the block.
    """
    calls: list[Tensor] = []  # of the norm
    waiting: list[Tensor] = []
    own = dict(block._modules)

    def enter(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        added = cast(Tensor, layout.residual(slot, x))
        calls.append(added)
        waiting.append(added)
        return own[norm](x + added, *args, **kwargs)

    def leave(*args: Any, **kwargs: Any) -> Any:
        output = own[last](*args, **kwargs)
        return output + waiting.pop() if waiting else output

    changing = _acts(slot)
    if changing:
        block = replace_children(block, cls or type(block), **{norm: enter, last: leave})
    output = block(tokens, *args, **kwargs) if cls is None else cls.forward(block, tokens, *args, **kwargs)
    if changing and (waiting or len(calls) != 1):
        raise RuntimeError(
            f"Mona cannot act in this {type(block).__name__}: its forward did not call {norm} and then {last}; leave "
            "it out by exclude_modules"
        )
    return output


def _acts(slot: nn.Module | None) -> bool:
    return isinstance(slot, ActivationLayer) and slot.acts


def _slot(block: nn.Module, name: str) -> nn.Module | None:
    return block._modules.get(name)


def _bare(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _after_branches(block: Any) -> dict[str, int]:
    channels = _bare(block.layernorm_after).normalized_shape[0]
    return {AFTER_ATTENTION: channels, AFTER_MLP: channels}


def _after_inner_branches(block: Any) -> dict[str, int]:
    names = (AFTER_ATTENTION, AFTER_MLP)
    return {f"{name}_{i}": each.dim for i, each in enumerate(block.transformer_blocks) for name in names}


def _why_no_transformer(block: Any) -> str:
    if not block.is_input_continuous:
        return "its input is no image of features"
    norms = {getattr(each, "norm_type", type(each).__name__) for each in block.transformer_blocks}
    return "" if norms == {"layer_norm"} else f"its blocks have the norms {sorted(norms)}, expected 'layer_norm'"


_RESNET = Block(lambda block: {AFTER_BLOCK: _bare(block.layer[-1].normalization).num_features}, _run_convolutional)
_CONVNEXT = Block(lambda block: {AFTER_BLOCK: _bare(block.dwconv).out_channels}, _run_convolutional)
_BLOCKS = {
    "diffusers.ResnetBlock2D": Block(lambda block: {AFTER_BLOCK: block.out_channels}, _run_convolutional),
    "diffusers.Transformer2DModel": Block(_after_inner_branches, _run_transformer, _why_no_transformer),
    "transformers.ResNetBasicLayer": _RESNET,
    "transformers.ResNetBottleNeckLayer": _RESNET,
    "transformers.ConvNextLayer": _CONVNEXT,
    "transformers.ConvNextV2Layer": _CONVNEXT,
    "transformers.SwinLayer": Block(_after_branches, _run_swin),
    "transformers.ViTLayer": Block(_after_branches, _run_vit, prefix=1),
    "transformers.DeiTLayer": Block(_after_branches, _run_vit, prefix=2),
}
KNOWN_BLOCKS = tuple(name.partition(".")[2] for name in _BLOCKS)
