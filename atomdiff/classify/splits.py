"""The images of a run: which of them belong to which class and split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from atomdiff.data.image_files import list_images
from atomdiff.data.images import read_image
from atomdiff.utils.errors import UserError
from atomdiff.utils.names import normalize_name
from atomdiff.utils.progress import ProgressBar
from atomdiff.utils.seeds import derive_seed

_SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class LabeledFiles:
    """Image files and the index of each one's class."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Splits:
    """The images of a run."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of their indices."""
    train: LabeledFiles
    validation: LabeledFiles
    test: LabeledFiles | None


def read_splits(folder: str | Path, validation_share: float, test_share: float, seed: int) -> Splits:
    """Find the images in `folder/<class>/`, or in `folder/<split>/<class>/` with train, validation (val) and test.

    Without splits, `validation_share` and `test_share` of each class are chosen by the seed. With them, only a missing
    validation is chosen, from train; a missing test stays missing.

    Raises:
        UserError: The folder does not look like that, has fewer than two classes, an empty class, images deeper
            inside one, a class that train lacks, or a class too small to be split; or images cannot be read.
    """
    folder = Path(folder)
    folders = _split_folders(folder)
    if not folders:
        classes = _read_classes(folder)
        held_out = _hold_out(classes, {"test": test_share, "validation": validation_share}, seed)
    else:
        classes = _read_classes(folders["train"])
        held_out = {
            split: _read_classes(folders[split], classes) for split in ("validation", "test") if split in folders
        }
        if "validation" not in folders:
            held_out |= _hold_out(classes, {"validation": validation_share}, seed)
    chosen = {file for split in held_out.values() for files in split.values() for file in files}
    train = {name: [file for file in files if file not in chosen] for name, files in classes.items()}
    names = tuple(classes)
    splits = {split: _label(files, names) for split, files in {"train": train, **held_out}.items()}
    _refuse_unreadable([file for split in splits.values() for file in split.files], folder)
    test = splits.get("test")
    return Splits(names, splits["train"], splits["validation"], test if test and len(test) else None)


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folder of each split, or none if the subfolders are classes (one of which may well be called train)."""
    if not folder.is_dir():
        raise UserError(f"train_data_dir={str(folder)!r}: no such folder; expected one with a subfolder for each class")
    if not (folder / "train").is_dir() or not _sub_folders(folder / "train"):
        return {}
    folders: dict[str, Path] = {}
    for path in _sub_folders(folder):
        split = _SPLIT_NAMES.get(path.name)
        if split is None or split in folders:
            expected = "train, validation (or val) and test, each once"
            raise UserError(f"{path}: not a split of the images; beside {folder / 'train'} stand only {expected}")
        folders[split] = path
    return folders


def _sub_folders(folder: Path) -> list[Path]:
    # __MACOSX and the like are no classes; but a single underscore may well begin the name of one.
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _read_classes(folder: Path, known: Mapping[str, object] | None = None) -> dict[str, list[Path]]:
    """List the images of every class, in the order of the names; all names must be `known` ones, if given."""
    folders: dict[str, Path] = {}
    for path in _sub_folders(folder):
        if (other := folders.setdefault(normalize_name(path.name), path)) is not path:
            found = f"{other.name!a} and {path.name!a} are the same name in two forms of Unicode"
            raise UserError(f"{folder}: {found}; put the images into one folder")
    classes = {name: list_images(path) for name, path in folders.items()}
    if known is None and len(classes) < 2:
        names = ", ".join(classes) or "none"
        raise UserError(
            f"{folder}: found {len(classes)} subfolders ({names}); expected one for each of several classes"
        )
    if deeper := [path for each in _sub_folders(folder) for path in _sub_folders(each) if list_images(path)]:
        expected = "a class's images directly in its folder, and splits called train, validation (or val) and test"
        raise UserError(f"{deeper[0]}: images are too deep inside and would be skipped; expected {expected}")
    if empty := [name for name, files in classes.items() if not files]:
        raise UserError(f"{folder}: no image in {', '.join(empty)}; add some, or remove the folder")
    if unknown := [name for name in classes if known is not None and name not in known]:
        raise UserError(f"{folder}: {', '.join(unknown)} not among the classes to train on ({', '.join(known or {})})")
    if not classes:
        raise UserError(f"{folder}: no subfolder in it; expected one for each class, or no folder {folder.name} at all")
    return classes


def _hold_out(
    classes: Mapping[str, list[Path]], shares: Mapping[str, float], seed: int
) -> dict[str, dict[str, list[Path]]]:
    """Choose a share of each class for every split: rounded, but at least one image unless the share is 0."""
    chosen: dict[str, dict[str, list[Path]]] = {split: {} for split in shares}
    for name, files in classes.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, "split", name))
        order = [files[index] for index in torch.randperm(len(files), generator=generator).tolist()]
        counts = {split: max(1, round(share * len(files))) if share else 0 for split, share in shares.items()}
        if sum(counts.values()) >= len(files):
            parts = ", ".join(f"{count} for {split}" for split, count in counts.items())
            raise UserError(f"{files[0].parent}: {len(files)} images, {parts}: none is left to train on; add some")
        for split, count in counts.items():
            chosen[split][name], order = order[:count], order[count:]
    return chosen


def _label(classes: Mapping[str, Sequence[Path]], names: Sequence[str]) -> LabeledFiles:
    pairs = [(file, names.index(name)) for name, files in classes.items() for file in files]
    return LabeledFiles(tuple(file for file, _ in pairs), tuple(label for _, label in pairs))


def _refuse_unreadable(files: Sequence[Path], folder: Path) -> None:
    """Read every image once, so that damaged ones are reported before the run and not in the middle of it."""
    unreadable = []
    for file in ProgressBar(files, "checking images", unit="images", disable=len(files) < 2000, leave=False):
        try:
            read_image(file)
        except UserError as error:
            unreadable.append(f"{file.relative_to(folder)} ({error})")
    if unreadable:
        shown = ", ".join(unreadable[:10]) + (f" and {len(unreadable) - 10} more" if len(unreadable) > 10 else "")
        raise UserError(f"{folder}: cannot be read: {shown}. Replace or remove them")
