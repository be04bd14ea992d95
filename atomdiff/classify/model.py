"""An image classifier of transformers with a new head, and its preprocessing."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from atomdiff.classify.head import head_of, labels_of, new_head, put_head
from atomdiff.tuner.adapter_state import adapter_layers, base_state_dict, belongs_to_adapter, module_path
from atomdiff.utils.errors import UserError
from atomdiff.utils.seeds import derive_seed, fork_rng
from atomdiff.utils.untrusted import list_some

_IMAGENET_SIDE = 224


def open_model(
    name: str, classes: Sequence[str], *, revision: str | None = None, from_scratch: bool = False, seed: int = 0
) -> Any:
    """Open a base with a new head for these classes; in float32, all frozen.

    Args:
        name: Folder or Hub id of an image classifier.
        classes: Names of the classes.
        revision: Of a base on the Hub.
        from_scratch: Random weights everywhere.
        seed: Of the random weights.

    Raises:
        UserError: There is no such base, it lacks weights, or it is no image classifier with a head of its own.
    """
    with fork_rng():
        torch.manual_seed(derive_seed(seed, "weights"))
        model, random = _load(name, revision, from_scratch, labels_of(classes))
        _refuse_random(name, [path for path in random if in_base(model, path)])
        check_splittable(model)
        if not head_parameters(model):
            raise _cannot_be_split(model)
        for path, module in model.named_modules():
            if not in_base(model, path) and isinstance(module, (nn.Linear, nn.Conv2d)):
                module.reset_parameters()  # a base with as many classes would bring its own
    return model.requires_grad_(False)


def open_base(name: str, *, revision: str | None = None) -> Any:
    """Open an image classifier of transformers, to load patches into; in float32, all frozen, in evaluation mode.

    A base that was saved without a head gets none: its logits are its features until a patch is active.

    Args:
        name: Folder or Hub id of the base.
        revision: Of a base on the Hub.

    Raises:
        UserError: There is no such base, it lacks weights, or cannot be split into head and base.
    """
    with fork_rng():
        model, random = _load(name, revision)
    _refuse_random(name, [path for path in random if in_base(model, path)])
    check_splittable(model)
    if random:
        put_head(model, new_head(model, ()))
    return model.requires_grad_(False).eval()


def check_splittable(model: Any) -> None:
    """Refuse a model that is no image classifier of transformers with a head beside its base.

    Raises:
        UserError: It is such a model.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model or not head_of(model).modules:
        raise _cannot_be_split(model)


def _cannot_be_split(model: Any) -> UserError:
    kind = type(model).__name__
    return UserError(f"{kind} cannot be split into head and base; use another image classifier of transformers")


def in_base(model: Any, path: str) -> bool:
    """Tell whether a module, parameter or buffer of this path belongs to the base and not to the head."""
    return not path or path == model.base_model_prefix or path.startswith(f"{model.base_model_prefix}.")


def head_parameters(model: Any) -> list[nn.Parameter]:
    """List the parameters of the head: all that stands outside the base model."""
    return [parameter for path, parameter in model.named_parameters() if not in_base(model, path)]


def norm_statistics(model: Any) -> dict[str, Tensor]:
    """Collect the running statistics of batch norms, by path."""
    return {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    }


def base_norms(model: Any) -> dict[str, _BatchNorm]:
    """Collect the batch norms of the base, by path without adapters; adapters may have some of their own."""
    layers = adapter_layers(model)
    return {
        module_path(path): module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and in_base(model, path) and not belongs_to_adapter(path, layers)
    }


def base_statistics(model: Any) -> dict[str, Tensor]:
    """Collect the running statistics of the base's batch norms, by path without adapters; the tensors themselves."""
    norms = base_norms(model).items()
    return {f"{path}.{name}": buffer for path, norm in norms for name, buffer in norm.named_buffers(recurse=False)}


def hash_base(model: Any) -> str:
    """Return a SHA-256 of the base's parameters and buffers, without head and adapters."""
    digest = hashlib.sha256()
    for path, tensor in base_state_dict(model).items():
        if in_base(model, path):
            digest.update(path.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_processor(name: str, model: Any, *, revision: str | None = None, resolution: int | None = None) -> Any:
    """Open the base's own preprocessing; without one, images are made squares with values from -1 to 1.

    The side is then that of the model's config, or else 224 pixels; below 384, what a square does not hold is cut off.
    A resolution replaces the side.

    Raises:
        UserError: The base's folder has a preprocessing that cannot be used.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", revision=revision)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if (file := Path(name) / IMAGE_PROCESSOR_NAME).is_file():
            raise UserError(f"{file}: cannot be used ({_one_line(error)}); repair or remove it") from error
        own = getattr(model.config, "image_size", None)
        side = resolution or (own if isinstance(own, int) else _IMAGENET_SIDE)
        return ConvNextImageProcessorPil(size={"shortest_edge": side}, crop_pct=1.0)
    if resolution is None:
        return processor
    square = {"height": resolution, "width": resolution}
    size = {"shortest_edge": resolution} if "shortest_edge" in processor.to_dict()["size"] else square
    return type(processor).from_dict({**processor.to_dict(), "size": size, "crop_size": square})


def load_model(name: str) -> Any:
    """Load a whole classifier in float32."""
    model, random = _load(name)
    _refuse_random(name, random)
    return model


def _load(
    name: str, revision: str | None = None, from_scratch: bool = False, labels: dict[str, Any] | None = None
) -> tuple[Any, list[str]]:
    """Load a model in float32; if `labels` are given, with a head for them. Also tell which weights are random."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **(labels or {}))
        if from_scratch:
            return AutoModelForImageClassification.from_config(config, dtype=torch.float32), []
        options = {"revision": revision, "config": config, "ignore_mismatched_sizes": True, "dtype": torch.float32}
        with _quiet():  # it would report the new head, in many lines
            model, loading = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # a damaged file raises whatever its parser raises
        expected = "neither a folder with an image classifier nor one from the Hub"
        raise UserError(f"{name!r}: {expected} ({_one_line(error)})") from error
    new = {*loading["missing_keys"], *(path for path, *_ in loading["mismatched_keys"])}
    # Norms and biases that a base does without start from ones and zeros; all else would be random.
    return model, sorted(path for path, tensor in model.named_parameters() if path in new and tensor.ndim > 1)


def _refuse_random(name: str, random: list[str]) -> None:
    if random:
        raise UserError(
            f"{name}: its weights lack {list_some(random)} in the shape that config.json says; use a complete model"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
