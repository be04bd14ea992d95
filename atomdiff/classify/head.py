"""The head of a classifier: all that stands outside of its base, with the names of its classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LABEL_FIELDS = ("id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class Head:
    """A head, of a model or ready to be put on one."""

    modules: Mapping[str, nn.Module]
    """Attribute of the model -> module."""
    labels: Mapping[str, Any]
    """What the model's config says of the classes, by field."""

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the logits."""
        return [label for _, label in sorted(self.labels["id2label"].items())]

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters and buffers by their paths in the model."""
        return {
            f"{name}.{key}": value for name, part in self.modules.items() for key, value in part.state_dict().items()
        }


def labels_of(classes: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """Return what a config says of these classes."""
    return {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}


def head_of(model: Any) -> Head:
    """Return the head that a model has now."""
    modules = {name: module for name, module in model.named_children() if name != model.base_model_prefix}
    return Head(modules, {field: getattr(model.config, field, None) for field in _LABEL_FIELDS})


def new_head(model: Any, classes: Sequence[str]) -> Head:
    """Return a head for these classes as a model of this kind has it, without memory for its tensors.

    Without classes it gives the features.
    """
    config = copy.deepcopy(model.config)
    for field, value in labels_of(classes).items():
        setattr(config, field, value)
    config.problem_type = None
    with torch.device("meta"):
        return head_of(type(model)(config))


def fill_head(head: Head, tensors: Mapping[str, Tensor]) -> None:
    """Give a new head its tensors, by their paths in the model."""
    for name, module in head.modules.items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        module.load_state_dict(own, assign=True)
        module.requires_grad_(False)


def put_head(model: Any, head: Head) -> None:
    """Give a model another head, on the device and in the dtype and mode of its base."""
    for name, module in head.modules.items():
        setattr(model, name, like_base(model, module))
    for field, value in head.labels.items():
        setattr(model.config, field, value)
    if hasattr(model, "num_labels"):
        model.num_labels = model.config.num_labels


def like_base(model: Any, module: nn.Module) -> nn.Module:
    """Move a part of a head to the device, dtype and mode of the base."""
    weight = next(parameter for parameter in model.base_model.parameters() if parameter.is_floating_point())
    return module.to(weight).train(model.training)
