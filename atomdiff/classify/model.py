"""A classifier of transformers with a head for these classes and an adapter; saved, and loaded again bit for bit."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from atomdiff.concepts import peft_folder
from atomdiff.concepts.concept_file import read_tensors
from atomdiff.training.method import ADAPTER_NAME
from atomdiff.tuner.adapter_state import peft_tensors
from atomdiff.tuner.attach import attach_peft
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError
from atomdiff.utils.seeds import derive_seed
from atomdiff.utils.untrusted import list_some

HEAD_FILE, FACTS_FILE = "head.safetensors", "classifier.json"
_COMPONENT = "model"
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
    labels = {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "weights"))
        model = _load(name, revision, from_scratch, labels)
        if model.base_model is model or not head_parameters(model):
            raise UserError(f"{name}: {type(model).__name__} does not tell its head from the rest; use another model")
        for path, module in model.named_modules():
            if not in_base(model, path) and isinstance(module, (nn.Linear, nn.Conv2d)):
                module.reset_parameters()  # a base with as many classes would bring its own
    return model.requires_grad_(False)


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


def hash_base(model: Any) -> str:
    """Return a SHA-256 of the base's parameters and buffers, without the head; before an adapter is added."""
    digest = hashlib.sha256()
    for path, tensor in model.state_dict().items():
        if in_base(model, path):
            digest.update(path.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_processor(name: str, model: Any, *, revision: str | None = None, resolution: int | None = None) -> Any:
    """Open the base's own preprocessing; without one, pictures are made squares with values from -1 to 1.

    The side is then that of the model's config, or else 224 pixels; below 384, what a square does not hold is cut off.

    Args:
        name: Folder or Hub id of the base.
        model: The base.
        revision: Of a base on the Hub.
        resolution: Side in pixels, in place of that.

    Raises:
        UserError: The base's folder has a preprocessing that cannot be used.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", revision=revision)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if (file := Path(name) / IMAGE_PROCESSOR_NAME).is_file():
            raise UserError(f"{file}: cannot be used ({_one_line(error)}); mend it, or remove it") from error
        own = getattr(model.config, "image_size", None)
        side = resolution or (own if isinstance(own, int) else _IMAGENET_SIDE)
        return ConvNextImageProcessorPil(size={"shortest_edge": side}, crop_pct=1.0)
    if resolution is None:
        return processor
    square = {"height": resolution, "width": resolution}
    size = {"shortest_edge": resolution} if "shortest_edge" in processor.to_dict()["size"] else square
    return type(processor).from_dict({**processor.to_dict(), "size": size, "crop_size": square})


def check_place(folder: Path, read: Iterable[str]) -> None:
    """Refuse a folder for `save_classifier` that holds something else than a classifier, or what the run reads.

    Args:
        folder: What will be replaced.
        read: Files and folders that the run reads.

    Raises:
        UserError: It is such a folder.
    """
    if inside := [path for path in read if Path(path).resolve().is_relative_to(folder.resolve())]:
        raise UserError(f"{folder}: would be replaced, but holds {inside[0]!r}; name another output_dir")
    foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / IMAGE_PROCESSOR_NAME).is_file()
    if foreign or folder.is_file():
        raise UserError(f"{folder}: would be replaced, but is no classifier; move it away, or name another output_dir")


def save_classifier(
    folder: Path,
    model: Any,
    processor: Any,
    method: PeftConfig | str | None,
    base: dict[str, str | None],
    updates_batch_norm: bool,
) -> None:
    """Write what was trained, in place of what the folder holds.

    Full tuning gives a model folder of transformers. Else the adapter is written as PEFT writes it; the head, with the
    statistics of batch norms if they were updated, and the facts of the base stand beside it.

    Args:
        folder: Where to.
        model: With its adapter.
        processor: Its image processor.
        method: From `read_method`.
        base: Facts by which the base is found and known again: base_model, revision, base_sha256.
        updates_batch_norm: Whether the statistics of batch norms belong to what was trained.

    Raises:
        WriteError: It cannot be written; what the folder holds is as it was.
    """
    with new_folder(folder) as unfinished:
        processor.save_pretrained(unfinished)
        if method is None:
            model.save_pretrained(unfinished)
        else:
            _write_changes(unfinished, model, method, base, updates_batch_norm)


def _write_changes(
    folder: Path, model: Any, method: PeftConfig | str, base: dict[str, str | None], updates_batch_norm: bool
) -> None:
    """Write what distinguishes the classifier from its base."""
    if isinstance(method, PeftConfig):
        adapter = {_COMPONENT: (method, peft_tensors(model, ADAPTER_NAME))}
        peft_folder.write(folder, adapter, {}, denoiser=_COMPONENT)
    head = {path: tensor for path, tensor in model.state_dict().items() if not in_base(model, path)}
    if updates_batch_norm:
        head |= norm_statistics(model)
    save_file({path: tensor.cpu().contiguous() for path, tensor in head.items()}, folder / HEAD_FILE)
    classes = [model.config.id2label[number] for number in range(model.config.num_labels)]
    facts = json.dumps({**base, "classes": classes}, indent=1, ensure_ascii=False)
    (folder / FACTS_FILE).write_text(facts + "\n", encoding="utf-8")


def load_classifier(folder: str | Path, pretrained_model_name_or_path: str | None = None) -> Any:
    """Load a trained classifier: the same logits as when it was saved.

    Its image processor is `AutoImageProcessor.from_pretrained(folder)`.

    Args:
        folder: The folder `classifier` of a run.
        pretrained_model_name_or_path: The base, if it is not where it was.

    Returns:
        A model of transformers in evaluation mode, its classes in `model.config.id2label`.

    Raises:
        UserError: The folder holds no classifier or a damaged one, or the base is another one than it was trained on.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return _load(str(folder)).eval()
    if not (folder / FACTS_FILE).is_file():
        raise UserError(f"{folder}: no classifier in it; expected {FACTS_FILE} or a model's config.json")
    facts = _read_facts(folder / FACTS_FILE)
    base = pretrained_model_name_or_path or facts["base_model"]
    revision = None if pretrained_model_name_or_path else facts["revision"]
    model = open_model(base, facts["classes"], revision=revision)
    if hash_base(model) != facts["base_sha256"]:
        raise UserError(
            f"{folder}: the weights of {base!r} are not those that it was trained on; name a copy of "
            f"{facts['base_model']!r} as it was then with pretrained_model_name_or_path"
        )
    head = read_tensors(folder / HEAD_FILE)[0]
    if (folder / CONFIG_NAME).is_file():
        adapter, tensors = peft_folder.read(folder, [_COMPONENT], _COMPONENT)[0][_COMPONENT]
        try:
            attach_peft(model, adapter, tensors, ADAPTER_NAME)
        except ValueError as error:
            raise UserError(f"{folder}: the adapter does not fit the base: {error}; copy the folder again") from error
    own = model.state_dict()
    needed = {path for path in own if not in_base(model, path)}
    if any(in_base(model, path) for path in head):
        needed |= norm_statistics(model).keys()
    shared = needed & head.keys()
    if wrong := sorted((needed ^ head.keys()) | {path for path in shared if own[path].shape != head[path].shape}):
        raise UserError(
            f"{folder / HEAD_FILE}: {list_some(wrong)} missing, unknown or of another shape; it is not the head of "
            "this classifier: copy the folder again"
        )
    model.load_state_dict(head, strict=False)
    return model.eval()


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy the folder again") from error
    expected = {"base_model", "revision", "base_sha256", "classes"}
    if not isinstance(facts, dict) or not facts.keys() >= expected:
        raise UserError(f"{file}: expected {', '.join(sorted(expected))} in it; copy the folder again")
    return facts


def _load(
    name: str, revision: str | None = None, from_scratch: bool = False, labels: dict[str, Any] | None = None
) -> Any:
    """Load a model in float32; if `labels` are given, with a random head for them."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **(labels or {}))
        if from_scratch:
            return AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        options = {"revision": revision, "config": config, "ignore_mismatched_sizes": True, "dtype": torch.float32}
        with _quiet():  # it would report the new head, in many lines
            model, found = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # a damaged file raises whatever its parser raises
        expected = "neither a folder with an image classifier nor one from the Hub"
        raise UserError(f"{name!r}: {expected} ({_one_line(error)})") from error
    new = {*found["missing_keys"], *(path for path, *_ in found["mismatched_keys"])}
    # Norms and biases that a base does without start from ones and zeros; all else would be random.
    random = {path for path, tensor in model.named_parameters() if path in new and tensor.ndim > 1}
    if lost := sorted(path for path in random if labels is None or in_base(model, path)):
        raise UserError(
            f"{name}: its weights lack {list_some(lost)} in the shape that config.json says; use a whole model"
        )
    return model


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
