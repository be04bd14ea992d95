"""Save a trained classifier, and load it again bit for bit."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors.torch import save_file
from transformers.utils import IMAGE_PROCESSOR_NAME

from atomdiff.classify.model import base_statistics, in_base, load_model, open_base
from atomdiff.classify.patch_folder import COMPONENT, HEAD_FILE, METADATA_FILE, read_patch
from atomdiff.classify.patches import add_patch
from atomdiff.concepts import peft_folder
from atomdiff.training.method import ADAPTER_NAME
from atomdiff.tuner.adapter_state import peft_tensors
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError


def check_result_folder(folder: Path, read: Iterable[str]) -> None:
    """Refuse a folder for `save_classifier` that holds something else than a classifier, or what the run reads.

    Raises:
        UserError: It is such a folder.
    """
    if inside := [path for path in read if Path(path).resolve().is_relative_to(folder.resolve())]:
        raise UserError(f"{folder}: would be replaced, but holds {inside[0]!r}; name another output_dir")
    foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / IMAGE_PROCESSOR_NAME).is_file()
    if foreign or folder.is_file():
        raise UserError(
            f"{folder}: would be replaced, but is not a classifier; move it away, or name another output_dir"
        )


def save_classifier(
    folder: Path,
    model: Any,
    processor: Any,
    method: PeftConfig | str | None,
    base: dict[str, str | None],
    updates_batch_norm: bool,
) -> None:
    """Write what was trained, in place of what the folder holds.

    Full tuning gives a model folder of transformers. Else the adapter is written as PEFT writes it, without the layers
    that its scores leave without an effect; the head, with the statistics of batch norms if they were updated, and the
    metadata of the base (base_model, revision, base_sha256) stand beside it.

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
        adapter = {COMPONENT: (method, peft_tensors(model, ADAPTER_NAME))}
        peft_folder.write(folder, adapter, {}, denoiser=COMPONENT)
    head = {path: tensor for path, tensor in model.state_dict().items() if not in_base(model, path)}
    if updates_batch_norm:
        head |= base_statistics(model)
    save_file({path: tensor.cpu().contiguous() for path, tensor in head.items()}, folder / HEAD_FILE)
    classes = [model.config.id2label[number] for number in range(model.config.num_labels)]
    metadata = json.dumps({**base, "classes": classes}, indent=1, ensure_ascii=False)
    (folder / METADATA_FILE).write_text(metadata + "\n", encoding="utf-8")


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
        return load_model(str(folder)).eval()
    saved = read_patch(folder)
    base, revision = pretrained_model_name_or_path, None
    if base is None:
        base, revision = saved.base_model, saved.revision
    model = open_base(base, revision=revision)
    add_patch(model, saved, ADAPTER_NAME)
    return model
