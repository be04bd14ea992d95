"""First look, then work: what all runs of a command read and write is checked before the first of them begins."""

from collections.abc import Sequence
from pathlib import Path

from atomdiff.data.image_files import list_images
from atomdiff.data.images import read_images
from atomdiff.data.masks import read_masks
from atomdiff.pipelines.prompt_syntax import has_word
from atomdiff.training.class_images import RECORD_FILE, is_generated
from atomdiff.training.config import Subject, TrainConfig
from atomdiff.training.method import place_for
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import check_writable, refuse_overlap


def look_first(runs: Sequence[TrainConfig]) -> None:
    """Read the photos, captions, masks and class images of all runs, and try whether their results can be written.

    Raises:
        UserError: Something cannot be read or written, or a folder would be both; nothing has been changed.
    """
    for run in runs:
        place = place_for(read_adapter(run.adapter), Path(run.output_dir) / run.name)
        _check_folders(run, runs, place)
    for run in runs:
        texts = [text for subject in run.subjects for text in _check_subject(run, subject)]
        if run.train_token:
            check_named(run, texts)
    for run in runs:
        check_writable(Path(run.output_dir), f"output_dir={run.output_dir!r}", f"{run.name}.atoms.safetensors")
        if run.cache_dir is not None:
            check_writable(Path(run.cache_dir), f"cache_dir={run.cache_dir!r}")


def _check_folders(run: TrainConfig, runs: Sequence[TrainConfig], place: Path) -> None:
    """Check that nothing of a run is written to what any of the runs reads."""
    output = Path(run.output_dir)
    writes = {
        "output_dir": output,
        "the folder of validation images": output / "validation",
        "logging_dir": output / run.logging_dir,
        "the cache": run.cache_folder,
    }
    photos = {
        _named("instance_data_dir", subject, runs): Path(subject.instance_data_dir)
        for each in runs
        for subject in each.subjects
    }
    photos |= {f"{name} (its masks)": folder / "mask" for name, folder in photos.items()}
    of_class = run.subjects if run.with_prior_preservation else ()
    folders = {_named("class_data_dir", subject, runs): run.class_folder(subject) for subject in of_class}
    refuse_overlap(writes | folders | {"the result": place}, photos, inside=False)
    refuse_overlap(writes, folders, inside=False)
    bases = {"the base": run.pretrained_model_name_or_path, "the VAE": run.pretrained_vae_model_name_or_path or ""}
    refuse_overlap(writes | folders, {name: path for name, path in bases.items() if path})
    if place.exists() and place.is_dir() == (place.suffix == ".safetensors"):
        raise UserError(f"output_dir={run.output_dir!r}: {place} is in the way; remove it, or name another folder")


def _named(field: str, subject: Subject, runs: Sequence[TrainConfig]) -> str:
    several = sum(len(run.subjects) for run in runs) > 1
    return f"{field} of {subject.name}" if several else field


def check_named(run: TrainConfig, texts: Sequence[str]) -> None:
    """Check that the photos' prompts name the trigger word of every subject.

    Raises:
        UserError: They do not.
    """
    for subject in run.subjects:
        if not any(has_word(text, subject.trigger_word) for text in texts):
            raise UserError(
                f"trigger_word={subject.trigger_word!r}: no prompt names it ({texts[0]!r}, ...), so its vector cannot "
                "be trained; write it into the prompts, or set train_token to false"
            )


def _check_subject(run: TrainConfig, subject: Subject) -> list[str]:
    """Read all files of a subject, and return the prompts of its photos."""
    folder = Path(subject.instance_data_dir)
    photos = read_images(folder, minimum_side=1 if run.resolution is None else run.resolution // 2)
    if (folder / RECORD_FILE).is_file():
        found = f"holds class images that were generated there ({RECORD_FILE})"
        raise UserError(f"{folder}: {found}; remove them and that file, or they would be trained on as photos")
    if run.masked_loss:
        read_masks(folder, photos)
    of_class = run.class_folder(subject)
    if run.with_prior_preservation and of_class.is_dir():
        foreign = [file for file in list_images(of_class) if not is_generated(file)]
        if foreign:
            read_images(of_class, minimum_side=1, limit=run.num_class_images)
    return [subject.fill(photo.caption or subject.instance_prompt) for photo in photos]
