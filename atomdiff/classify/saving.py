"""Save a trained classifier, and load it again bit for bit."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from safetensors.torch import save_file
from transformers.utils import IMAGE_PROCESSOR_NAME

from atomdiff.classify.model import hash_base, in_base, load_model, norm_statistics, open_model
from atomdiff.concepts import peft_folder
from atomdiff.concepts.concept_file import read_tensors
from atomdiff.training.method import ADAPTER_NAME
from atomdiff.tuner.adapter_state import peft_tensors
from atomdiff.tuner.attach import attach_peft
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import list_some

HEAD_FILE = "head.safetensors"
METADATA_FILE = "classifier.json"
_COMPONENT = "model"


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

    Full tuning gives a model folder of transformers. Else the adapter is written as PEFT writes it; the head, with the
    statistics of batch norms if they were updated, and the metadata of the base (base_model, revision,
    base_sha256) stand beside it.

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
    if not (folder / METADATA_FILE).is_file():
        raise UserError(f"{folder}: no classifier in it; expected {METADATA_FILE} or a model's config.json")
    metadata = _read_metadata(folder / METADATA_FILE)
    base = pretrained_model_name_or_path or metadata["base_model"]
    revision = None if pretrained_model_name_or_path else metadata["revision"]
    model = open_model(base, metadata["classes"], revision=revision)
    if hash_base(model) != metadata["base_sha256"]:
        raise UserError(
            f"{folder}: the weights of {base!r} are not those that it was trained on; give a copy of "
            f"{metadata['base_model']!r} as it was then by pretrained_model_name_or_path"
        )
    head = read_tensors(folder / HEAD_FILE)
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


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy the folder again") from error
    expected = {"base_model", "revision", "base_sha256", "classes"}
    if not isinstance(metadata, dict) or not metadata.keys() >= expected:
        raise UserError(f"{file}: expected {', '.join(sorted(expected))} in it; copy the folder again")
    return metadata
