"""Open the diffusers pipeline that a user has named: a folder, a Hub id, or one checkpoint file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from atomdiff.bases.find import BASES, known_bases
from atomdiff.pipelines.config import BaseModelConfig
from atomdiff.utils.assets import find_asset
from atomdiff.utils.errors import UserError

_SINGLE_FILES = (".safetensors", ".ckpt")
_HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}  # what safetensors calls a dtype
_LONGEST_PROMPT = 10**6  # tokens; transformers makes an empty tokenizer without a limit where its files are missing
_DAMAGED_FOLDER_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError)
_DESCRIBE = "name a pipeline of its architecture, a folder or a Hub id, with single_file_config"


def open_pipeline(
    name: str,
    dtype: torch.dtype | None = torch.float32,
    *,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
    **parts: Any,
) -> Any:
    """Load a diffusers pipeline.

    Args:
        name: a folder, a Hub id, or a checkpoint file in the layout of the original code, .safetensors or .ckpt. Of a
            .ckpt only tensors are unpickled.
        dtype: precision of its weights; None: as they are stored. Weights stored so are read from their file where and
            when they are needed, and take no memory before.
        revision: on the Hub.
        variant: of its files, such as fp16.
        single_file_config: folder or Hub id of a pipeline whose configs describe the checkpoint file; None: the one
            that diffusers knows for it, on the Hub.
        **parts: of the pipeline that are there already and not to be loaded, and options of its class.

    Raises:
        UserError: it is not there, or cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    name = find_asset(name)
    if is_single_file(name):
        return _open_single_file(name, dtype, single_file_config, parts)
    try:
        loaded_as = dtype or _stored_dtypes(name, revision, variant)
        pipe = DiffusionPipeline.from_pretrained(name, revision=revision, variant=variant, dtype=loaded_as, **parts)
    except _DAMAGED_FOLDER_ERRORS as error:
        raise _cannot_load(name, error) from error
    for part, tokenizer in pipe.components.items():
        if part.startswith("tokenizer") and getattr(tokenizer, "model_max_length", 0) > _LONGEST_PROMPT:
            raise UserError(f"the pipeline {name!r} lacks files of its {part}, or they are damaged: copy it again")
    if part := _part_without_weights(pipe):
        raise UserError(f"the pipeline {name!r} lacks weights of its {part}: copy it again, or save it anew")
    return pipe


def pipeline_class(name: str, *, revision: str | None = None, single_file_config: str | None = None) -> str:
    """Return the name of the class of a pipeline, which `open_pipeline` would load, without loading its weights.

    Raises:
        UserError: it is not there, or it is a checkpoint file of an unknown architecture, or cannot be read.
    """
    from diffusers import DiffusionPipeline

    name = find_asset(name)
    if is_single_file(name):
        if single_file_config is None:
            return _class_of_file(name)
        name = single_file_config
    try:
        return str(DiffusionPipeline.load_config(name, revision=revision)["_class_name"])
    except _DAMAGED_FOLDER_ERRORS as error:
        raise _cannot_load(name, error) from error


def open_base(
    config: BaseModelConfig,
    dtype: torch.dtype | None = torch.float32,
    field: str = "pretrained_model_name_or_path",
) -> Any:
    """Open the base model of a command, in a precision as for `open_pipeline`.

    Raises:
        UserError: it cannot be loaded, or does not generate images from text alone with a known base; `field` is what
            messages call its name.
    """
    import diffusers

    name = config.pretrained_model_name_or_path
    if not is_single_file(name):  # of these only those that are known are opened
        kind = pipeline_class(name, revision=config.revision)
        found = getattr(diffusers, kind, None)
        if found is None or not any(base.generates_from_text(found) for base in BASES):
            expected = f"a pipeline of {known_bases()}, from text to images"
            raise UserError(f"{field}={name!r}: found a {kind}; expected {expected}")
    options = {"revision": config.revision, "variant": config.variant, "single_file_config": config.single_file_config}
    return open_pipeline(name, dtype, **options)


def is_single_file(name: str) -> bool:
    """Return whether a name is that of a checkpoint file, here or as an address on the Hub."""
    return name.endswith(_SINGLE_FILES) and not os.path.isdir(name)


def _stored_dtypes(name: str, revision: str | None, variant: str | None) -> dict[str, torch.dtype]:
    """Return the dtype of each model in the folder of a pipeline, downloaded where it has to be."""
    from diffusers import DiffusionPipeline

    folder = Path(name)
    if not folder.is_dir():
        folder = Path(DiffusionPipeline.download(name, revision=revision, variant=variant))
    dtypes = {part.name: stored_dtype(part, variant) for part in folder.iterdir() if part.is_dir()}
    return {"default": torch.float32, **dtypes}


def stored_dtype(path: Path, variant: str | None = None) -> torch.dtype:
    """Return the dtype of the tensors in a safetensors file or a model's folder; float32 where they differ."""
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
    mark = re.compile(rf"\.{re.escape(variant or '')}[.-]")  # of a whole file, or of one of several
    of_variant = [file for file in files if variant and mark.search(file.name)]
    dtypes = set()
    try:
        for file in of_variant or [file for file in files if file == path or "." not in file.stem]:
            with safe_open(file, framework="pt") as opened:
                dtypes |= {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    except SafetensorError:  # said where the file is loaded
        return torch.float32
    floating = {dtype for dtype in dtypes if "F" in dtype}
    return _HALVES[floating.pop()] if len(floating) == 1 and floating <= _HALVES.keys() else torch.float32


def _open_single_file(name: str, dtype: torch.dtype | None, config: str | None, parts: dict[str, Any]) -> Any:
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    kind = pipeline_class(name, single_file_config=config)
    lacks = f"the checkpoint {name!r} lacks weights of a {kind}: it is damaged, or of another architecture; {_DESCRIBE}"
    try:
        if dtype is None:
            is_here = name.endswith(".safetensors") and Path(name).is_file()
            dtype = stored_dtype(Path(name)) if is_here else torch.float32
        pipe = getattr(diffusers, kind).from_single_file(name, config=config, dtype=dtype, **parts)
    except NotImplementedError as error:  # of weights that have no numbers
        raise UserError(lacks) from error
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SingleFileComponentError) as error:
        # Which of them depends on where diffusers meets the first tensor that does not fit.
        raise _cannot_load(name, error, f" as a {kind}", _DESCRIBE) from error
    if _part_without_weights(pipe):
        raise UserError(lacks)
    return pipe


def _part_without_weights(pipe: Any) -> str | None:
    """Return the name of a model some of whose weights were not in the files, if there is one."""
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    lacking = (name for name, model in models.items() if any(weight.is_meta for weight in model.parameters()))
    return next(lacking, None)


def _class_of_file(name: str) -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

    try:
        kind = infer_diffusers_model_type(load_single_file_checkpoint(name))
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error
    base = next((base for base in BASES if kind in base.checkpoint_types), None)
    if base is None:
        raise UserError(f"the checkpoint {name!r} is a {kind}: expected {known_bases()}")
    return base.pipeline_class


def _cannot_load(name: str, error: Exception, what: str = "", advice: str = "") -> UserError:
    found = "exists, but" if os.path.exists(name) else "is not a folder or file here, and as a Hub id"
    if name.endswith(".ckpt"):
        advice = (
            f"of a .ckpt only tensors are read, as other contents could run code: convert it to .safetensors; {advice}"
        )
    reason = " ".join(str(error).split())
    return UserError(f"the pipeline {name!r} {found} cannot be loaded{what} ({reason}); {advice}".rstrip("; "))
