"""Images as people have them: their pixels are read whatever is beside them, and the true reason is told if not."""

import os
import struct
import warnings

import pytest
from PIL import Image, PngImagePlugin

from atomdiff.data.image_files import list_images, open_upright
from atomdiff.data.images import read_images
from atomdiff.utils.errors import UserError

BROKEN = b"Exif\0\0bad header"
HUGE = b"\0" * 2_000_000


@pytest.fixture
def image():
    """Red, with a green corner."""
    image = Image.new("RGB", (32, 24), "red")
    image.paste("green", (0, 0, 16, 12))
    return image


def text(kind, value, **options):
    info = PngImagePlugin.PngInfo()
    getattr(info, kind)("parameters", value, **options)
    return {"pnginfo": info}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {"exif": BROKEN}),
        ("a.webp", {"exif": BROKEN, "lossless": True}),
        ("a.jpg", {"exif": BROKEN, "dpi": (300, 300)}),
        ("a.png", text("add_text", "a" * 2_000_000, zip=True)),
        ("a.png", text("add_itxt", "a" * 2_000_000, zip=True)),
        ("a.png", {"icc_profile": HUGE}),
    ],
)
def test_what_is_beside_the_pixels_may_be_damaged_or_huge(tmp_path, image, name, options):
    image.save(tmp_path / name, **options)
    with pytest.warns(UserWarning, match=f"{name}: .*(EXIF|texts and profiles)"):
        (read,) = read_images(tmp_path, minimum_side=1)
    assert read.rgb.getpixel((2, 2))[0] < 20 and read.rgb.getpixel((30, 20))[0] > 235


def test_an_orientation_is_applied_although_other_texts_are_too_large(tmp_path, image):
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif, **text("add_text", "a" * 2_000_000, zip=True))
    with pytest.warns(UserWarning, match="a.png: read without its texts"):
        turned = open_upright(tmp_path / "a.png")
    assert turned.size == (24, 32) and turned.getpixel((20, 2)) == (0, 128, 0)


def test_an_orientation_is_applied_although_other_tags_are_broken(tmp_path, image):
    tags = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHII", 0x9C9B, 99, 4, 0xFFFFFF)
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + tags + b"\0\0\0\0")
    assert open_upright(tmp_path / "a.jpg").size == (24, 32)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(tmp_path, image, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        assert open_upright(tmp_path / "a.png").tobytes() == ImageOps.exif_transpose(opened).tobytes()


def test_more_pixels_than_pillow_opens_are_told_as_such(tmp_path, image, monkeypatch):
    image.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"a.png \(768 pixels, more than the 200 that Pillow opens: make it smaller"):
        read_images(tmp_path, minimum_side=1)


def test_the_true_reason_is_told(tmp_path, image):
    image.save(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:-30])
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(UserError) as error:
        read_images(tmp_path, minimum_side=1)
    for reason in (
        "cut.png (image file is truncated",
        "empty.png (empty)",
        "page.jpg (no jpg nor any other image that Pillow knows)",
        "phone.HEIC (Pillow cannot read .heic here: save it as JPEG or PNG)",
        "gone.png (no such file or directory, where its link leads)",
        "loop.png (too many levels of symbolic links",
    ):
        assert reason in str(error.value)
    assert "good.png" not in str(error.value)


def test_folders_and_pipes_named_like_images_are_not_read(tmp_path, image):
    image.save(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    os.mkfifo(tmp_path / "c.png")
    with pytest.warns(UserWarning, match="not read, as they are folders: b.png"):
        assert [file.name for file in list_images(tmp_path)] == ["a.png"]


def test_of_several_images_in_a_file_the_first_is_used_and_that_is_told(tmp_path, image):
    image.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (32, 24), "blue")])
    with pytest.warns(UserWarning, match="a.gif: has 2 images, of which the first is used"):
        assert open_upright(tmp_path / "a.gif").convert("RGB").getpixel((30, 20)) == (255, 0, 0)


def test_an_image_in_order_warns_of_nothing(tmp_path, image):
    image.save(tmp_path / "a.png", exif=Image.Exif(), icc_profile=b"\0" * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_upright(tmp_path / "a.png")


def test_names_are_sorted_alike_in_every_unicode_form(tmp_path, image):
    for name in ("e\u0301.png", "\u00e8.png", "f.png", "\u00ea.png"):
        image.save(tmp_path / name)
    names = [file.name for file in list_images(tmp_path)]
    assert names == ["f.png", "\u00e8.png", "e\u0301.png", "\u00ea.png"]
