import numpy as np
import pytest
import torch
from PIL import Image

from atomdiff.data.images import read_images
from atomdiff.data.masks import loss_weights, read_masks
from atomdiff.utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mask").mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (40, 20), "red").save(tmp_path / name)
    return tmp_path


def left_half(size=(40, 20), mode="L", white=255):
    mask = Image.new("L", size, 0)
    mask.paste(white, (0, 0, size[0] // 2, size[1]))
    return mask.convert(mode)


def masks_of(folder):
    images = read_images(folder, minimum_side=1)
    return {image.name: mask for image, mask in zip(images, read_masks(folder, images), strict=True)}


def test_names_are_compared_in_one_unicode_form(folder):
    Image.new("RGB", (40, 20), "red").save(folder / "caf\u00e9.png")
    left_half().save(folder / "mask" / "cafe\u0301.png")
    assert masks_of(folder)["caf\u00e9.png"].tobytes() == left_half().tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "LA", "RGBA"])
def test_a_mask_is_an_image_of_that_name_in_the_folder_mask(folder, mode):
    left_half(mode=mode).save(folder / "mask" / "b.png")
    masks = masks_of(folder)
    assert masks["a.png"] is None
    assert np.array_equal(masks["b.jpg"], left_half())


def test_what_is_clear_in_a_mask_counts_as_black(folder):
    clear = Image.new("RGBA", (40, 20), "white")
    clear.putalpha(left_half())
    clear.save(folder / "mask" / "a.png")
    assert np.array_equal(masks_of(folder)["a.png"], left_half())


def test_alpha_channels_are_masks_where_there_is_no_other(folder):
    image = Image.new("RGBA", (40, 20), "red")
    image.putalpha(left_half())
    image.save(folder / "a.png")
    assert np.array_equal(masks_of(folder)["a.png"], left_half())
    Image.new("L", (40, 20), 255).save(folder / "mask" / "a.png")
    assert masks_of(folder)["a.png"].getextrema() == (255, 255)


def test_masks_of_turned_and_of_smaller_images_fit_the_upright_image(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (40, 20), "red").save(folder / "a.png", exif=exif)
    left_half((10, 20)).save(folder / "mask" / "a.png")
    assert np.array_equal(masks_of(folder)["a.png"], left_half((20, 40)))
    left_half((13, 6)).save(folder / "mask" / "b.webp", lossless=True)  # 40x20 is 13x6.5
    assert masks_of(folder)["b.jpg"].size == (40, 20)


def test_one_error_names_every_mask_that_cannot_be_used(folder):
    for name in ("c", "d", "e"):
        Image.new("RGB", (40, 20), "red").save(folder / f"{name}.png")
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(folder / "e.png")
    (folder / "mask" / "a.png").write_text("no image")
    left_half((20, 20)).save(folder / "mask" / "b.png")
    left_half(white=1).save(folder / "mask" / "c.png")
    for suffix in ("png", "bmp"):
        left_half().save(folder / "mask" / f"d.{suffix}")
    left_half().save(folder / "mask" / "other.png")
    with pytest.raises(UserError) as error:
        masks_of(folder)
    assert str(error.value) == (
        f"{folder}: masks that cannot be used: a second one of this name: d.png; no image of this name: other.png; "
        "cannot be read: a.png (no png nor any other image that Pillow knows); "
        "shaped unlike the image: b.png (20x20, its image 40x20); "
        "nowhere white: c.png, alpha channel of e.png. Replace or remove them"
    )


def test_weights_are_the_masks_mean_over_each_latent_pixel():
    random = np.random.default_rng(0)
    light = random.integers(0, 256, (24, 16), dtype=np.uint8)
    weights = loss_weights([Image.fromarray(light), None], (6, 4), unmasked_weight=0.25)
    share = light.reshape(6, 4, 4, 4).mean(axis=(1, 3)) / 255
    torch.testing.assert_close(weights[0, 0], torch.tensor(0.25 + 0.75 * share, dtype=torch.float32))
    assert torch.equal(weights[1], torch.ones(1, 6, 4))
