"""Calls of a module with a weight that is passed to it, so that no other thread sees a change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

PLAIN_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_TRANSPOSED = {3: functional.conv_transpose1d, 4: functional.conv_transpose2d, 5: functional.conv_transpose3d}
_PRODUCTS = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, *_TRANSPOSED.values())


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for a tensor's device."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def is_plain(module: nn.Module, kinds: Sequence[type[nn.Module]] = PLAIN_LAYERS) -> bool:
    """Whether a call of the module does what PyTorch's own layer of one of these kinds does, and nothing more."""
    return type(module) in kinds and not _is_managed(module)


def _is_managed(module: nn.Module) -> bool:
    """Whether hooks or a forward of the instance act around the forward of its class, and may move its weight."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in vars(module) or any(hooks)


def call(module: Any, weight: Tensor, bias: Tensor | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the output of a module that `is_plain` with these parameters in place of its own.

    Args:
        module: gives stride, padding and all else.
        weight: (out, in/groups, ...), or (in, out/groups, ...) of a transposed convolution.
        bias: (out,).
        x: what the module takes.
        *args: further arguments of its forward.
        **kwargs: further keywords of its forward.
    """
    if isinstance(module, _ConvTransposeNd):
        return _call_transposed(module, weight, bias, x, *args, **kwargs)
    if args or kwargs:
        raise TypeError(f"{type(module).__name__} takes one tensor, found also: {[*args, *kwargs]}")
    if isinstance(module, _ConvNd):
        return cast(Any, module)._conv_forward(x, weight, bias)  # type: ignore[no-any-return]
    return functional.linear(x, weight, bias)


def _call_transposed(
    module: Any, weight: Tensor, bias: Tensor | None, x: Tensor, output_size: list[int] | None = None
) -> Tensor:
    axes = weight.ndim - 2
    settings = module.stride, module.padding, module.kernel_size, axes, module.dilation
    padding = module._output_padding(x, output_size, *settings)
    convolve = _TRANSPOSED[weight.ndim]
    return convolve(x, weight, bias, module.stride, module.padding, padding, module.groups, module.dilation)


class SubstituteWeight(TorchFunctionMode):
    """A `with` block in which functions that are given a module's weight compute with another one, in this thread.

    For modules that are not plain: with a forward of their own, hooks, layers of other methods around them. The weight
    is looked up at the time, so that it is the real one also where hooks bring it from elsewhere for the time of a call
    (offloading, casting, sharding).

    Args:
        module: the innermost one, which has the weight.
        adapt: weight as it is found -> the one to compute with.
        per_sample: None, or what computes a product whose weight has a leading axis of samples: (function of x and one
            sample's weight, x, weights) -> output.
    """

    def __init__(
        self,
        module: nn.Module,
        adapt: Callable[[Tensor], Tensor],
        per_sample: Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.module, self.adapt, self.per_sample = module, adapt, per_sample
        self.managed = not isinstance(module, PLAIN_LAYERS) or _is_managed(module)
        self.needs_grad = torch.is_grad_enabled()
        self.adapted: Tensor | None = None
        self.was_used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, weight = kwargs or {}, getattr(self.module, "weight", None)  # sharding takes it away meanwhile
        values = [*args, *kwargs.values()]
        if weight is None or not any(_holds(value, weight) for value in values) or self._leaves_alone(func):
            return func(*args, **kwargs)
        if self.adapted is None:
            self.adapted = self.adapt(cast(Tensor, weight))
        self.was_used = self.was_used or torch.is_grad_enabled() or not self.needs_grad
        if self.per_sample is None:
            args = tuple(_replaced(value, weight, self.adapted) for value in args)
            kwargs = {key: _replaced(value, weight, self.adapted) for key, value in kwargs.items()}
            return func(*args, **kwargs)
        if func not in _PRODUCTS or len(args) < 2 or args[1] is not weight:
            raise RuntimeError(
                f"{self._name()} uses its weight in {func.__name__}, where samples cannot have their own"
            )
        return self.per_sample(
            lambda x, sample_weight: func(x, sample_weight, *args[2:], **kwargs), args[0], self.adapted
        )

    def _leaves_alone(self, func: Any) -> bool:
        """What writes into the weight, or where others act around the forward, all that may only move it."""
        return func not in _PRODUCTS if self.managed else _writes(func.__name__)

    def check(self) -> None:
        """Check, after a call, that the weight has acted.

        Raises:
            RuntimeError: it has not, or nothing could learn through it.
        """
        if not self.was_used:
            raise RuntimeError(
                f"{self._name()} does not compute with its weight by PyTorch's differentiable functions, so that "
                "adapters cannot act in its call: merge them, or leave the layer out of target_modules"
            )

    def _name(self) -> str:
        return f"the forward of a {type(self.module).__name__}"


def _writes(name: str) -> bool:
    return name in ("__set__", "__delete__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))


def _holds(value: Any, weight: Any) -> bool:
    return value is weight or (isinstance(value, (list, tuple)) and any(_holds(each, weight) for each in value))


def _replaced(value: Any, weight: Any, other: Tensor) -> Any:
    if value is weight:
        return other
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(each, weight, other) for each in value)
    return value


def without_autocast(tensor: Tensor) -> Any:
    """Within, no autocast on a tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast(tensor) else nullcontext()
