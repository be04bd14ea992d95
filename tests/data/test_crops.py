import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from atomdiff.data.crops import make_crops


def ramp(width=40, height=32):
    """A grey ramp from 0 to 255, left to right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))


def mean(image):
    return np.asarray(image).mean()


def test_squares_are_cut_along_the_longer_side():
    wide = ramp(96, 32).convert("RGB")
    assert [crop.image.size for crop in make_crops(wide, (16, 16), center_crop=True)] == [(16, 16)]
    left, middle, right = (mean(crop.image) for crop in make_crops(wide, (16, 16), center_crop=False))
    np.testing.assert_allclose([left, middle, right], [255 / 6, 255 / 2, 255 * 5 / 6], atol=3)
    upper, *_, lower = make_crops(wide.rotate(-90, expand=True), (16, 16), center_crop=False)
    assert mean(upper.image) < 50 < 200 < mean(lower.image)


def test_an_image_shaped_like_its_bucket_is_seen_whole():
    (crop,) = make_crops(ramp(96, 48).convert("RGB"), (16, 32), center_crop=False)
    np.testing.assert_allclose(np.asarray(crop.image)[5, [0, -1], 0], [0, 255], atol=8)
    assert crop.time_ids == (48, 96, 0, 0, 16, 32)


def test_square_images_have_one_view_and_its_mirror_image():
    crop, mirrored = make_crops(ramp(31, 31).convert("RGB"), (16, 16), center_crop=False, random_flip=True)
    assert np.array_equal(np.asarray(crop.image)[:, ::-1], mirrored.image)


def test_sizes_and_corners_are_those_of_the_image_mirrored_before_it_is_cut():
    wide = ramp(100, 40).convert("RGB")
    seen = make_crops(wide, (20, 30), center_crop=False, random_flip=True)
    assert [crop.time_ids for crop in seen[:3]] == [(40, 100, 0, left, 20, 30) for left in (0, 10, 20)]
    turned = make_crops(wide.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (20, 30), center_crop=False)
    expected = {crop.time_ids: np.asarray(crop.image).astype(int) for crop in turned}
    assert len(seen) == 6
    for crop in seen[3:]:
        np.testing.assert_allclose(crop.image, expected[crop.time_ids], atol=1)


def test_masks_are_cut_and_mirrored_with_the_image():
    wide = ramp(64, 16)
    for crop in make_crops(wide.convert("RGB"), (16, 16), center_crop=False, random_flip=True, mask=wide):
        np.testing.assert_allclose(np.asarray(crop.image)[..., 0].astype(int), crop.mask, atol=1)


@settings(deadline=None)
@given(
    width=st.integers(8, 60),
    height=st.integers(8, 60),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    center=st.booleans(),
)
def test_views_always_have_their_size_and_lie_in_the_image(width, height, size, center):
    for crop in make_crops(ramp(width, height).convert("RGB"), size, center, random_flip=True):
        assert (crop.image.height, crop.image.width) == size == crop.time_ids[4:]
        assert crop.time_ids[:2] == (height, width) and min(crop.time_ids[2:4]) >= 0
