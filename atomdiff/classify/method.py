"""What is trained of a classifier: its head, and an adapter, everything or nothing beside it."""

import copy
import re
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from atomdiff.activation_adapters import CombinedConfig
from atomdiff.classify.config import LINEAR, ClassifyConfig
from atomdiff.classify.model import head_parameters, in_base
from atomdiff.training.method import make_trainable
from atomdiff.tuner.read_config import adapts_nothing, read_adapter
from atomdiff.utils.errors import UserError


def read_method(config: ClassifyConfig) -> PeftConfig | str | None:
    """Read what is trained beside the head: a PEFT config, LINEAR for nothing, None for everything.

    Raises:
        UserError: The adapter cannot be read, or does not go with the rest of the config.
    """
    method = LINEAR if config.adapter == LINEAR else read_adapter(config.adapter)
    if isinstance(method, PeftConfig) and adapts_nothing(method):
        raise UserError(f'adapter={config.adapter!r}: expected adapter "linear", which trains the head alone')
    if config.from_scratch and method is not None:
        found = f"adapter={config.adapter!r}"
        raise UserError(f'{found}: from_scratch has random weights, which only adapter "full" trains and saves')
    return method


def exclude_head(method: PeftConfig | str | None, model: Any) -> PeftConfig | str | None:
    """Exclude the head from an adapter, or each of a combined one, unless it says itself what it excludes."""
    adapter, outside = copy.deepcopy(method), rf"(?!{re.escape(model.base_model_prefix)}\.).*"
    if isinstance(adapter, CombinedConfig):
        without = [fields for fields in adapter.methods if fields.get("exclude_modules") is None]
        for fields in without:
            fields["exclude_modules"] = outside
    elif isinstance(adapter, PeftConfig) and getattr(adapter, "exclude_modules", "") is None:
        adapter.exclude_modules = outside
    return adapter


def add_trainable(model: Any, method: PeftConfig | str | None, seed: int) -> None:
    """Add the adapter and make it and the head trainable; without adapter the head alone, or for None all.

    Raises:
        UserError: The adapter does not fit the model, or changes the head.
    """
    if not isinstance(method, str):
        make_trainable(model, method, seed)
    adapted = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if heads := [path for path in adapted if not in_base(model, path)]:
        raise UserError(f"the adapter targets the head ({heads[0]}), which is trained in any case: use exclude_modules")
    for parameter in head_parameters(model):
        parameter.requires_grad_(True)
