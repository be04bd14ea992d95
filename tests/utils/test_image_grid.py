"""The labelled sheet."""

import numpy as np
import pytest
from PIL import Image, ImageFont

import atomdiff.utils.image_grid
from atomdiff.utils.image_grid import _wrap, make_image_grid

RED, BLUE = (220, 20, 20), (20, 20, 220)


def image(color, side=64):
    return Image.new("RGB", (side, side), color)


def boxes(sheet, color):
    """The bounding box of all pixels of a color: left, top, right, bottom."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def ink(sheet):
    """Where something darker than paper stands that is no image."""
    pixels = np.asarray(sheet).astype(int)
    return (pixels.max(-1) - pixels.min(-1) < 5) & (pixels.max(-1) < 200)


def test_images_lie_in_rows_and_columns_and_small_ones_are_enlarged():
    sheet = make_image_grid([[image(RED), image(BLUE)], [image(BLUE)]])
    left, top, right, bottom = boxes(sheet, RED)
    assert (right - left, bottom - top) == (192, 192)
    blue = boxes(sheet, BLUE)
    assert blue[0] == left and blue[1] == top and blue[2] > right and blue[3] > bottom
    assert sheet.getpixel((0, 0)) == sheet.getpixel((sheet.width - 1, sheet.height - 1)) == (255, 255, 255)


def test_large_images_keep_their_pixels_and_scale_can_be_given():
    large = Image.effect_noise((256, 256), 80).convert("RGB")
    x, y = (np.asarray(make_image_grid([[large]]).size) - 256) // 2
    assert np.array_equal(np.asarray(make_image_grid([[large]]))[y : y + 256, x : x + 256], np.asarray(large))
    left, _, right, _ = boxes(make_image_grid([[image(RED)]], scale=5), RED)
    assert right - left == 320


def test_many_images_are_enlarged_less(monkeypatch):
    monkeypatch.setattr(atomdiff.utils.image_grid, "SHEET_PIXELS", 100_000)
    left, _, right, _ = boxes(make_image_grid([[image(RED, 16)] * 10] * 4), RED)
    assert right - left == 10 * 48 + 9 * 4
    assert make_image_grid([[image(RED, 16)]]).width > 192


def test_sheets_of_large_images_stay_within_bounds(monkeypatch):
    monkeypatch.setattr(atomdiff.utils.image_grid, "SHEET_PIXELS", 100_000)
    sheet = make_image_grid([[image(RED, 200)] * 3, [image(BLUE, 300)]])
    left, top, right, bottom = boxes(sheet, BLUE)
    assert abs((right - left) - (bottom - top)) <= 1 and 120 <= right - left <= 130  # 3 * 2 of them are 100,000 pixels
    assert sheet.width * sheet.height < 130_000


def test_labels_stand_beside_and_above_and_never_in_the_images():
    plain, labelled = (
        make_image_grid([[image(RED)] * 2] * 2),
        make_image_grid([[image(RED)] * 2] * 2, ["one", "two"], ["left", "right"]),
    )
    assert labelled.width > plain.width and labelled.height > plain.height
    left, top, *_ = boxes(labelled, RED)
    written = ink(labelled)
    assert written[:top, left:].any() and written[top:, :left].any()
    assert not written[top:, left:].any() and not written[:top, :left].any()


def test_a_long_label_stays_beside_its_own_row():
    sheet = make_image_grid([[image(RED)], [image(RED)]], ["a very long prompt about many things " * 30, ""])
    _, top, _, bottom = boxes(sheet, RED)
    written = np.nonzero(ink(sheet).any(1))[0]
    assert written.min() >= top and written.max() < (top + bottom) / 2


@pytest.mark.parametrize("text", ["a photo of a red striped mug on the beach", "x" * 80, "", "short " + "y" * 50])
def test_wrapped_lines_fit_and_lose_no_letter(text):
    font = ImageFont.load_default(16)
    lines = _wrap(text, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_none_leaves_a_place_empty_and_modes_and_sizes_may_differ():
    sheet = make_image_grid([[None, image(BLUE)], [Image.new("L", (32, 64), 0), None]])
    left, top, right, bottom = boxes(sheet, BLUE)
    assert right - left == 192 and left > sheet.width / 2 - 10 and top < 20
    black = boxes(sheet, (0, 0, 0))
    assert black[2] - black[0] == 96 and black[1] > bottom


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="no image"):
        make_image_grid([[None]])
    with pytest.raises(ValueError, match="2 row labels for 1 rows"):
        make_image_grid([[image(RED)]], ["a", "b"])
    with pytest.raises(ValueError, match="1 column labels for 2 columns"):
        make_image_grid([[image(RED)] * 2], [], ["a"])
