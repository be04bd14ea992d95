import numpy as np
import pytest
from PIL import Image

from atomdiff.data.images import read_images, to_rgb
from atomdiff.utils.errors import UserError


def ramp(width=40, height=32):
    """A grey ramp from 0 to 255, left to right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))


def assert_close(image, expected, tolerance=2):
    difference = np.asarray(image, dtype=float) - np.asarray(expected, dtype=float)
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "PA"]
)
def test_every_mode_becomes_rgb(mode):
    colors = Image.merge("RGB", [ramp(), ramp().rotate(180), Image.new("L", (40, 32), 90)])
    if mode == "LAB":
        image = Image.new("LAB", (40, 32), (255, 128, 128))  # L = 100, a = b = 0
        expected = Image.new("RGB", (40, 32), "white")
    elif mode in ("La", "PA"):
        image = ramp().convert("LA").convert(mode)
        expected = ramp().convert("RGB")
    else:
        image = colors.convert(mode)
        expected = image.convert("RGB")
    assert to_rgb(image).mode == "RGB"
    assert_close(to_rgb(image), expected)


@pytest.mark.parametrize(
    ("dtype", "top"),
    [("<u2", 65535), (">u2", 65535), ("int32", 255), ("int32", 65535), ("float32", 1.0), ("float32", 255)],
)
def test_wide_values_are_scaled_not_clipped(dtype, top):
    values = np.tile(np.linspace(0, top, 40), (32, 1)).astype(dtype)
    if dtype == ">u2":
        image = Image.frombytes("I;16B", (40, 32), values.tobytes())
    else:
        image = Image.fromarray(values)
    assert_close(to_rgb(image), ramp().convert("RGB"))


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    for image in (clear, clear.convert("LA"), palette):
        assert to_rgb(image).getpixel((1, 1)) == (255, 255, 255)


def test_alpha_channels_are_kept_with_the_image(tmp_path):
    half = ramp().convert("RGBA")
    half.putalpha(ramp())
    half.save(tmp_path / "half.png")
    half.convert("LA").save(tmp_path / "grey.png")
    palette = Image.new("P", (40, 32), 0)
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png", transparency=0)
    ramp().convert("RGBA").save(tmp_path / "solid.png")
    ramp().save(tmp_path / "without.png")
    Image.fromarray(np.full((32, 40), 60000, dtype=np.uint16)).save(tmp_path / "wide.png", transparency=60000)
    found = {image.name: image.alpha for image in read_images(tmp_path, minimum_side=1)}
    assert [name for name, alpha in found.items() if alpha is None] == ["solid.png", "wide.png", "without.png"]
    assert_close(found["half.png"], ramp(), tolerance=0)
    assert_close(found["grey.png"], ramp(), tolerance=0)
    assert found["palette.png"].getextrema() == (0, 0)


def test_images_come_upright_by_name_with_their_captions(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    ramp().save(tmp_path / "b.JPG", format="jpeg", exif=exif, quality=100)
    ramp().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("\ufeffa photo of sks mug in a café \n", encoding="utf-8")
    (tmp_path / ".hidden.png").write_text("no image")
    first, second = read_images(tmp_path, minimum_side=32)
    assert (first.name, first.caption) == ("a.png", "a photo of sks mug in a café")
    assert (second.name, second.caption) == ("b.JPG", None)
    assert_close(second.rgb, ramp().rotate(-90, expand=True).convert("RGB"), tolerance=4)


def test_one_error_names_every_bad_file(tmp_path):
    ramp().save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "phone.HEIC").write_text("what Pillow does not read")
    (tmp_path / "empty.png").touch()
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    ramp(9, 50).save(tmp_path / "small.png")
    with pytest.raises(UserError) as error:
        read_images(tmp_path, minimum_side=32)
    assert str(error.value) == (
        f"{tmp_path}: cannot be read: cut.png (image file is truncated), empty.png (empty), "
        "phone.HEIC (Pillow cannot read .heic here: save it as JPEG or PNG), "
        "text.jpg (no jpg nor any other image that Pillow knows); "
        "shorter side under 32 pixels: small.png (9x50). Replace or remove them"
    )


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_images(tmp_path / "nowhere", minimum_side=1)
    (tmp_path / "readme.txt").write_text("no image")
    with pytest.raises(UserError, match=r"no image in it; expected files such as 01.jpg or 01.png$"):
        read_images(tmp_path, minimum_side=1)
    (tmp_path / "10_sks mug").mkdir()
    ramp().save(tmp_path / "10_sks mug" / "a.png")
    with pytest.raises(UserError, match="found some in its folder 10_sks mug: name that"):
        read_images(tmp_path, minimum_side=1)


def test_infinite_values_are_the_brightest_and_undefined_ones_black():
    values = np.array([[0, 0.5, 1, np.inf, -np.inf, np.nan]], dtype=np.float32)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 128, 255, 255, 0, 0]
