"""What the JSON bodies of requests have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from atomdiff.utils.errors import UserError


class RequestBody(BaseModel):
    """Fields of a request; those that are null count as left out, as some clients send all, and others are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # it could be neither read nor sent back
            raise ValueError("found half of a character, as of an emoji that was cut; expected text") from error
        return {name: value for name, value in fields.items() if value is not None}


@contextmanager
def naming(**names: str) -> Iterator[None]:
    """Let errors of an `ImageRequest` name the fields that the client sent, field -> the client's name."""
    try:
        yield
    except UserError as error:
        field, _, rest = str(error).partition("=")
        if field not in names:
            raise
        raise UserError(f"{names[field]}={rest}") from error
