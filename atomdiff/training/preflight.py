"""Preflight: what all runs of a command read and write is checked before the first of them begins."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from atomdiff.data.image_files import list_images
from atomdiff.data.images import CaptionedImage, read_images
from atomdiff.data.masks import read_masks
from atomdiff.evaluate.encoders import check_encoder
from atomdiff.training.class_images import RECORD_FILE, is_generated
from atomdiff.training.config import Subject, TrainConfig
from atomdiff.training.evaluation import FOLDER
from atomdiff.training.fingerprint import image_key
from atomdiff.training.preservation import preservation_prompt
from atomdiff.training.saving import result_path
from atomdiff.training.training_images import check_prompts, choose_held_out
from atomdiff.training.warm_start import check_init_from
from atomdiff.tuner.read_config import adapts_nothing, read_adapter
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import check_writable, refuse_overlap


def check_runs(runs: Sequence[TrainConfig]) -> None:
    """Read all images, captions and masks of the runs, and try whether their results can be written.

    Raises:
        UserError: Something cannot be read or written, or a folder would be both; nothing has been changed.
    """
    for run in runs:
        adapter = read_adapter(run.adapter)
        if adapts_nothing(adapter) and not (run.train_token or run.train_text_encoder):
            raise UserError(f"adapter={run.adapter!r}: trains nothing; expected train_token=True, or another adapter")
        result = result_path(adapter, Path(run.output_dir) / run.name)
        check_init_from(run, adapter)
        if run.init_from is not None:
            refuse_overlap({"the result": result}, {"init_from": run.init_from}, inside=False)
        _check_folders(run, runs, result)
        for encoder in run.evaluate_with:
            check_encoder(encoder)
    for run in runs:
        texts = _check_images(run)
        if run.train_token:
            check_prompts(run.subjects, texts)
        for text in texts if run.preservation != "none" else ():
            preservation_prompt(run.preservation, run.subjects, text)
    for run in runs:
        check_writable(Path(run.output_dir), f"output_dir={run.output_dir!r}", f"{run.name}.atoms.safetensors")
        if run.cache_dir is not None:
            check_writable(Path(run.cache_dir), f"cache_dir={run.cache_dir!r}")


def _check_folders(run: TrainConfig, runs: Sequence[TrainConfig], result: Path) -> None:
    """Check that nothing of a run is written to what any of the runs reads."""
    output = Path(run.output_dir)
    writes = {
        "output_dir": output,
        "the folder of validation images": output / "validation",
        "logging_dir": output / run.logging_dir,
        "the cache": run.cache_folder,
        "the folder of the evaluation": output / FOLDER,
    }
    images = {
        _named("instance_data_dir", subject, runs): Path(subject.instance_data_dir)
        for each in runs
        for subject in each.subjects
    }
    images |= {
        _named("validation_data_dir", subject, runs): Path(subject.validation_data_dir)
        for each in runs
        for subject in each.subjects
        if subject.validation_data_dir
    }
    images |= {f"{name} (its masks)": folder / "mask" for name, folder in images.items()}
    with_class_images = run.subjects if run.with_prior_preservation else ()
    folders = {_named("class_data_dir", subject, runs): run.class_folder(subject) for subject in with_class_images}
    refuse_overlap(writes | folders | {"the result": result}, images, inside=False)
    refuse_overlap(writes, folders, inside=False)
    bases = {"the base": run.pretrained_model_name_or_path, "the VAE": run.pretrained_vae_model_name_or_path or ""}
    refuse_overlap(writes | folders, {name: path for name, path in bases.items() if path})
    if result.exists() and result.is_dir() == (result.suffix == ".safetensors"):
        raise UserError(f"output_dir={run.output_dir!r}: {result} is in the way; remove it, or name another folder")


def _named(field: str, subject: Subject, runs: Sequence[TrainConfig]) -> str:
    several = sum(len(run.subjects) for run in runs) > 1
    return f"{field} of {subject.name}" if several else field


def _check_images(run: TrainConfig) -> list[str]:
    """Read all images of a run, and return the prompts of the instance images that are trained on."""
    checked = [_check_subject(run, subject) for subject in run.subjects]
    if run.masked_loss and not any(masked for _, masked in checked):
        folder = Path(run.subjects[0].instance_data_dir) / "mask"
        found = "masked_loss=True: no image that is trained on has a mask"
        raise UserError(f"{found}; expected masks in {folder}, named like the images, or images with an alpha channel")
    return [text for texts, _ in checked for text in texts]


def _check_subject(run: TrainConfig, subject: Subject) -> tuple[list[str], bool]:
    """Read all files of a subject.

    Returns:
        The prompts of its instance images that are trained on, and whether one of these has a mask.
    """
    images, masks = _read_folder(run, Path(subject.instance_data_dir))
    chosen = choose_held_out(len(images), run.validation_split, run.seed, subject)
    held_out, folder = [images[index] for index in sorted(chosen)], subject.instance_data_dir
    if subject.validation_data_dir:
        folder = subject.validation_data_dir
        held_out, _ = _read_folder(run, Path(folder))
    trained_on = [image for index, image in enumerate(images) if index not in chosen]
    known = {image_key(image.rgb): image.name for image in trained_on} if held_out else {}
    for image in held_out:
        if name := known.get(image_key(image.rgb)):
            found = f"{image.name} is {name} of {subject.instance_data_dir}, too"
            raise UserError(f"{folder}: {found}; remove one: held-out images are not trained on")
    class_folder = run.class_folder(subject)
    if run.with_prior_preservation and class_folder.is_dir():
        foreign = [file for file in list_images(class_folder) if not is_generated(file)]
        if foreign:
            read_images(class_folder, minimum_side=1, limit=run.num_class_images)
    texts = [subject.fill(image.caption or subject.instance_prompt) for image in trained_on]
    return texts, any(mask is not None for index, mask in enumerate(masks) if index not in chosen)


def _read_folder(run: TrainConfig, folder: Path) -> tuple[list[CaptionedImage], list[Image.Image | None]]:
    """Read a folder of images of a subject, with their masks if the run uses them."""
    side = None if run.aspect_ratio_buckets else run.resolution  # None: the base has a say in what is too small
    images = read_images(folder, minimum_side=1 if side is None else side // 2)
    if (folder / RECORD_FILE).is_file():
        found = f"holds class images that were generated there ({RECORD_FILE})"
        raise UserError(f"{folder}: {found}; remove them and that file, or they would be trained on as instance images")
    return images, read_masks(folder, images) if run.masked_loss else []
