"""Images side by side on one sheet, with labels beside the rows and above the columns."""

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SHEET_PIXELS = 40_000_000  # for all images together; those that need more are enlarged less, or made smaller
_COMFORTABLE_SIDE = 192  # pixels; smaller images are enlarged to about this
_LABEL_WIDTH = 160  # pixels; what a label beside a row may take at least
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def make_image_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    *,
    scale: float | None = None,
) -> Image.Image:
    """Put rows of images on a white sheet with word-wrapped labels.

    Rows may differ in length, None leaves a place empty, and images smaller than the largest are centered in theirs.

    Args:
        rows: the images, of any mode.
        row_labels: one a row, or none at all.
        column_labels: one a column, or none at all.
        scale: factor by which every image is enlarged; by default the whole one that brings small ones to about 192
            pixels, or less than 1 where all images together would take more than SHEET_PIXELS.

    Returns:
        An RGB image.

    Raises:
        ValueError: there is no image at all, or the number of labels is wrong.
    """
    images = [image for row in rows for image in row if image is not None]
    columns = max(map(len, rows), default=0)
    if not images:
        raise ValueError("found no image to put on the sheet; give at least one")
    for name, labels, count in (("row", row_labels, len(rows)), ("column", column_labels, columns)):
        if labels and len(labels) != count:
            raise ValueError(f"found {len(labels)} {name} labels for {count} {name}s; give one each, or none")

    largest = max(image.width for image in images), max(image.height for image in images)
    scale = scale or _scale(largest, len(images), len(rows) * columns)
    width, height = (max(1, round(scale * side)) for side in largest)
    gap, size = max(width // 32, 4), min(max(width // 12, 12), 28)
    font = ImageFont.load_default(size)
    line = round(1.3 * size)
    beside = [_wrap(label, font, max(width, _LABEL_WIDTH), height // line) for label in row_labels]
    above = [_wrap(label, font, width) for label in column_labels]
    left = 2 * gap + round(max((font.getlength(text) + 2 * gap for lines in beside for text in lines), default=0))
    top = 2 * gap + max((len(lines) * line + gap for lines in above if lines), default=0)

    sheet = Image.new("RGB", (left + columns * (width + gap) + gap, top + len(rows) * (height + gap) + gap), _PAPER)
    pen = ImageDraw.Draw(sheet)
    style: dict[str, Any] = {"fill": _INK, "font": font, "spacing": line - size}
    for column, lines in enumerate(above):
        x = left + column * (width + gap) + width / 2
        pen.multiline_text((x, top - gap), "\n".join(lines), anchor="md", align="center", **style)
    for row, lines in enumerate(beside):
        y = top + row * (height + gap) + height / 2
        pen.multiline_text((2 * gap, y), "\n".join(lines), anchor="lm", **style)
    for row, contents in enumerate(rows):
        for column, image in enumerate(contents):
            if image is not None:
                sides = [max(1, round(scale * side)) for side in image.size]
                large = image.convert("RGB").resize(sides, Image.Resampling.LANCZOS)
                x, y = left + column * (width + gap), top + row * (height + gap)
                sheet.paste(large, (x + (width - large.width) // 2, y + (height - large.height) // 2))
    return sheet


def _scale(largest: tuple[int, int], images: int, places: int) -> float:
    """Return the factor for images of up to these sides, in so many places on the sheet."""
    pixels = places * largest[0] * largest[1]
    if pixels > SHEET_PIXELS:
        return math.sqrt(SHEET_PIXELS / pixels)
    return max(1, round(min(_COMFORTABLE_SIDE, math.isqrt(SHEET_PIXELS // images)) / max(largest)))


def _wrap(text: str, font: Font, width: int, most: int | None = None) -> list[str]:
    """Break text at spaces, and within words longer than a line, into at most `most` lines of `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if most is None or len(lines) <= most:
        return lines
    return [*lines[: max(most, 1) - 1], lines[max(most, 1) - 1][:-1] + "…"]
