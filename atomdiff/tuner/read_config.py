"""The config of any PEFT method, read from a JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES

from atomdiff.tuner import AtomConfig
from atomdiff.tuner.removable import why_not_removable
from atomdiff.utils.assets import find_asset
from atomdiff.utils.errors import UserError
from atomdiff.utils.text_files import read_yaml

FULL = "FULL"
NONE = "NONE"


def read_adapter(adapter: str) -> PeftConfig | None:
    """Read what is to be trained: the config of a PEFT method, or None for the whole UNet.

    Args:
        adapter: "atoms", "full", "none", or a JSON file with `peft_type` and any fields of that method's config; the
            `peft_type` "FULL" stands for the whole UNet, "NONE" for nothing of it: atoms on no layers.

    Raises:
        UserError: No such file, no such method, a field that the method does not know or refuses, or one by which it
            changes the base itself.
    """
    if adapter == "atoms":
        return AtomConfig()
    fields = {"peft_type": adapter.upper()} if adapter in ("full", "none") else _read_json(Path(find_asset(adapter)))
    peft_type = fields.get("peft_type")
    if peft_type in (FULL, NONE):
        if len(fields) > 1:
            raise UserError(f"{adapter}: found {', '.join(sorted(fields))}; expected peft_type={peft_type!r} alone")
        return None if peft_type == FULL else AtomConfig(target_modules=DUMMY_TARGET_MODULES)
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        methods = ", ".join([FULL, NONE, *sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)])
        raise UserError(f"{adapter}: peft_type={peft_type!r}; expected one of {methods}")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    if unknown := unknown_fields(kind, fields):
        raise UserError(f"{adapter}: {unknown}")
    try:
        config: PeftConfig = kind(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{adapter}: {error}") from error
    if change := why_not_removable(config):
        raise UserError(f"{adapter}: {change}")
    return config


def unknown_fields(kind: type[PeftConfig], fields: Mapping[str, Any]) -> str:
    """Say which of some settings a method's config does not have, and which it has; empty: it has them all."""
    own = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(fields.keys() - own)
    names = ", ".join(sorted(own - {field.name for field in dataclasses.fields(PeftConfig)}))
    return f"{kind.__name__} has no field {', '.join(unknown)}; it has: {names}" if unknown else ""


def adapts_nothing(adapter: PeftConfig | None) -> bool:
    """Tell whether this is what `read_adapter` makes of "none"."""
    return isinstance(adapter, AtomConfig) and adapter.target_modules == DUMMY_TARGET_MODULES


def describe_adapter(adapter: PeftConfig | None) -> dict[str, Any]:
    """Return what `read_adapter` read as plain JSON values, the same for equal configs."""
    fields = {"peft_type": FULL} if adapter is None else adapter.to_dict()
    described: dict[str, Any] = json.loads(json.dumps(fields, default=sorted, sort_keys=True))
    return described


def _read_json(file: Path) -> dict[str, Any]:
    if not os.path.isfile(file):
        raise UserError(f'adapter={str(file)!r:.200}: no such file; expected a JSON file, "atoms", "full" or "none"')
    fields = read_yaml(file)
    if not isinstance(fields, dict):
        raise UserError(f"{file}: expected a JSON object with peft_type and the method's fields")
    return fields
