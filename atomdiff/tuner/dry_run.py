"""Try an adapter config from a file on a model without memory, before it is believed: it may ask for any amount."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from atomdiff.tuner.coefficient_cache import CoefficientCache
from atomdiff.utils.untrusted import MAX_TENSOR_ELEMENTS

_FACTORIES = (
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.zeros,
)
_CONTAINERS = (dict, set, OrderedDict, CoefficientCache)  # what modules keep about themselves
_Module = TypeVar("_Module", bound=nn.Module)
_MOVES = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda)


class DryRun(TorchFunctionMode):
    """Within, and in this thread alone, an adapter can be added that takes no memory and no random numbers.

    With `values` tensors are made as they are asked for, for methods that look at the values in them.

    Raises:
        ValueError: a tensor is larger than any that an adapter has.
    """

    def __init__(self, values: bool = False) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            generator = {"generator": None} if "generator" in kwargs else {}
            made = func(*args, **{**kwargs, **generator, "device": "meta"})
            if made.numel() > MAX_TENSOR_ELEMENTS:
                raise ValueError(
                    f"its settings ask for a tensor {tuple(made.shape)}, expected at most "
                    f"{MAX_TENSOR_ELEMENTS:,} elements: check its rank, or copy or download it again"
                )
            if not self.values:
                return made
        if func in _MOVES and args[0].is_meta:  # which nothing can leave
            arguments = [*args[1:], *kwargs.values()]
            return args[0].to(next((each for each in arguments if isinstance(each, torch.dtype)), args[0].dtype))
        return func(*args, **kwargs)


def copy_structure(model: _Module) -> _Module:
    """A copy of a model's modules for adapters to be added, merged or taken out, which the model never notices.

    It shares the memory of all tensors, and is not meant to be called.
    """
    return _copied(model, {})


def _copied(module: Any, copies: dict[int, Any]) -> Any:
    if id(module) not in copies:
        copies[id(module)] = made = object.__new__(type(module))
        for key, value in vars(module).items():  # the dictionaries of parameters and modules among them
            if type(value) is list:  # of modules that are merged into this one, among others
                vars(made)[key] = [_copied(each, copies) if isinstance(each, nn.Module) else each for each in value]
            else:
                vars(made)[key] = copy.copy(value) if type(value) in _CONTAINERS else value
        for key, child in module._modules.items():
            made._modules[key] = None if child is None else _copied(child, copies)
        for key, parameter in module._parameters.items():
            if type(parameter) is nn.Parameter:  # with a requires_grad of its own
                alias = copies.setdefault(id(parameter), nn.Parameter(parameter.detach(), parameter.requires_grad))
                made._parameters[key] = alias
    return copies[id(module)]
