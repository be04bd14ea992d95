"""The contact sheet of a run: a row of validation images every few steps."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from atomdiff.utils.atomic import write_png
from atomdiff.utils.image_grid import make_image_grid

_ROW_FILE = re.compile(r"step-(\d+)-\d+\.png")


def extend_contact_sheet(output_dir: Path, step: int, images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Add a row to `contact_sheet.png`, one image a prompt; the images themselves go to `validation/`.

    Rows of this step and of later ones, left by a run that was stopped or by an earlier one, are replaced. Earlier rows
    may have more or fewer images, of other prompts; an image that cannot be read leaves its cell empty.
    """
    folder = output_dir / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    drop_rows(output_dir, step)
    rows: dict[int, list[Image.Image | None]] = {}
    for number, file in list_row_files(output_dir):
        rows.setdefault(number, []).append(_read_image(file))
    rows[step] = list(images)
    unknown = [""] * (max(map(len, rows.values())) - len(prompts))
    sheet = make_image_grid(list(rows.values()), [f"step {number}" for number in rows], [*prompts, *unknown])
    write_png(output_dir / "contact_sheet.png", sheet)
    for column, image in enumerate(images):  # after the sheet, so that who finds all of them has the row
        write_png(folder / f"step-{step:06d}-{column:02d}.png", image)


def drop_rows(output_dir: Path, step: int) -> None:
    """Remove the images of the rows of a step and of later ones."""
    for number, file in list_row_files(output_dir):
        if number >= step:
            file.unlink()


def list_row_files(output_dir: Path) -> list[tuple[int, Path]]:
    """List the images of the contact sheet with their steps, in order."""
    files = [(_ROW_FILE.fullmatch(file.name), file) for file in sorted((output_dir / "validation").glob("step-*.png"))]
    return [(int(match[1]), file) for match, file in files if match and file.is_file()]


def _read_image(file: Path) -> Image.Image | None:
    """Return an image and close its file; None, with a warning, if it cannot be read."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        warnings.warn(f"{file}: cannot be read ({error}); its cell of the contact sheet stays empty", stacklevel=1)
        return None


def row_files(output_dir: Path, step: int) -> list[Path]:
    """Return the files of a row of the contact sheet that are there."""
    return sorted(output_dir.glob(f"validation/step-{step:06d}-*.png"))
