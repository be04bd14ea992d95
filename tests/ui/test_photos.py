"""What the page says of photos before a run."""

import warnings

import pytest
from PIL import Image

from atomdiff.data.image_files import open_upright
from atomdiff.ui import photos
from atomdiff.ui.photos import look_at_photo
from atomdiff.ui.recipes import training_side


@pytest.fixture
def photo(tmp_path):
    """Writes an image of a size, turned by EXIF where asked, and looks at it."""

    def look(size, resolution=64, orientation=1):
        file, exif = tmp_path / "photo.jpg", Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", size, (10, 20, 30)).save(file, exif=exif)
        return look_at_photo(file, resolution)

    return look


def test_nothing_is_said_of_a_square_photo(photo):
    assert photo((64, 64)).note == ""
    assert photo((64, 66)).can_be_used


def test_turned_and_cropped_photos_are_named(photo):
    turned = photo((120, 64), orientation=6)
    assert turned.thumbnail.size == (64, 120)
    assert turned.note == "turned upright, as the camera noted; not square (64x120): trained in square crops"


def test_small_photos_are_enlarged_or_refused_as_training_does(photo):
    assert photo((40, 40)).note == "small: enlarged to 64 pixels"
    refused = photo((31, 90))
    assert not refused.can_be_used
    assert "31 pixels on its shorter side; expected at least 32" in refused.note
    assert photo((31, 31), resolution=None).note == ""


def test_a_photo_with_a_huge_color_profile_is_taken_with_a_note(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png", icc_profile=b"\0" * 2_000_000)
    photo = look_at_photo(tmp_path / "photo.png", 64)
    assert photo.can_be_used
    assert photo.note.startswith("read without its texts and profiles")


def test_warnings_of_others_are_no_notes(photo, monkeypatch):
    def warn_and_open(file):
        warnings.warn("of another thread", stacklevel=1)
        return open_upright(file)

    monkeypatch.setattr(photos, "open_upright", warn_and_open)
    assert photo((64, 64)).note == ""


def test_photos_are_judged_by_the_resolution_of_training(tmp_path, tiny_pipe_folder):
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    options = {"pretrained_model_name_or_path": str(tiny_pipe_folder)}  # of 32 pixels

    def note(**others):
        return look_at_photo(tmp_path / "photo.png", training_side({**options, **others})).note

    assert note() == ""
    assert note(resolution=64) == "small: enlarged to 64 pixels"
    assert "expected at least 256" in note(resolution=512, pretrained_model_name_or_path="somebody/base")


def test_files_that_are_no_images_are_refused(tmp_path):
    (tmp_path / "photo.png").write_text("hello")
    photo = look_at_photo(tmp_path / "photo.png", 64)
    assert not photo.can_be_used
    assert photo.note.startswith("cannot be used: no png")
