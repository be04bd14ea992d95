import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from atomdiff.data.images import (
    bucket_turn,
    derive_seed,
    ensure_class_pictures,
    read_photos,
    sample_order,
    to_rgb,
)
from atomdiff.utils.errors import UserError


def ramp(width=40, height=32):
    """A grey ramp from 0 to 255, left to right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))


def assert_close(picture, expected, tolerance=2):
    difference = np.asarray(picture, dtype=float) - np.asarray(expected, dtype=float)
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "PA"]
)
def test_every_mode_becomes_rgb(mode):
    colours = Image.merge("RGB", [ramp(), ramp().rotate(180), Image.new("L", (40, 32), 90)])
    if mode == "LAB":
        picture = Image.new("LAB", (40, 32), (255, 128, 128))  # L = 100, a = b = 0
        expected = Image.new("RGB", (40, 32), "white")
    elif mode in ("La", "PA"):
        picture = ramp().convert("LA").convert(mode)
        expected = ramp().convert("RGB")
    else:
        picture = colours.convert(mode)
        expected = picture.convert("RGB")
    assert to_rgb(picture).mode == "RGB"
    assert_close(to_rgb(picture), expected)


@pytest.mark.parametrize(
    ("dtype", "top"),
    [("<u2", 65535), (">u2", 65535), ("int32", 255), ("int32", 65535), ("float32", 1.0), ("float32", 255)],
)
def test_wide_values_are_scaled_not_clipped(dtype, top):
    values = np.tile(np.linspace(0, top, 40), (32, 1)).astype(dtype)
    if dtype == ">u2":
        picture = Image.frombytes("I;16B", (40, 32), values.tobytes())
    else:
        picture = Image.fromarray(values)
    assert_close(to_rgb(picture), ramp().convert("RGB"))


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    for picture in (clear, clear.convert("LA"), palette):
        assert to_rgb(picture).getpixel((1, 1)) == (255, 255, 255)


def test_alpha_channels_are_kept_with_the_photo(tmp_path):
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
    found = {photo.name: photo.alpha for photo in read_photos(tmp_path, minimum_side=1)}
    assert [name for name, alpha in found.items() if alpha is None] == ["solid.png", "wide.png", "without.png"]
    assert_close(found["half.png"], ramp(), tolerance=0)
    assert_close(found["grey.png"], ramp(), tolerance=0)
    assert found["palette.png"].getextrema() == (0, 0)


def test_photos_come_upright_by_name_with_their_captions(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    ramp().save(tmp_path / "b.JPG", format="jpeg", exif=exif, quality=100)
    ramp().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("\ufeffa photo of sks mug in a café \n", encoding="utf-8")
    (tmp_path / ".hidden.png").write_text("no picture")
    first, second = read_photos(tmp_path, minimum_side=32)
    assert (first.name, first.caption) == ("a.png", "a photo of sks mug in a café")
    assert (second.name, second.caption) == ("b.JPG", None)
    assert_close(second.picture, ramp().rotate(-90, expand=True).convert("RGB"), tolerance=4)


def test_one_error_names_every_bad_file(tmp_path):
    ramp().save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "phone.HEIC").write_text("what Pillow does not read")
    (tmp_path / "empty.png").touch()
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    ramp(9, 50).save(tmp_path / "small.png")
    with pytest.raises(UserError) as error:
        read_photos(tmp_path, minimum_side=32)
    assert str(error.value) == (
        f"{tmp_path}: cannot be read: cut.png (image file is truncated), empty.png (empty), "
        "phone.HEIC (Pillow cannot read .heic here: save it as JPEG or PNG), "
        "text.jpg (no jpg nor any other image that Pillow knows); "
        "shorter side under 32 pixels: small.png (9x50). Replace or remove them"
    )


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_photos(tmp_path / "nowhere", minimum_side=1)
    (tmp_path / "readme.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"no picture in it; expected files such as photo.jpg or photo.png$"):
        read_photos(tmp_path, minimum_side=1)
    (tmp_path / "10_sks mug").mkdir()
    ramp().save(tmp_path / "10_sks mug" / "a.png")
    with pytest.raises(UserError, match="found some in its folder 10_sks mug: name that"):
        read_photos(tmp_path, minimum_side=1)


def fake_pictures(seeds, made=None):
    if made is not None:
        made.append(list(seeds))
    return [Image.new("RGB", (8, 8), (seed, len(seeds), 0)) for seed in seeds]


def contents(folder: Path):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_class_pictures_are_made_once(tmp_path):
    made = []
    for _ in range(2):
        ensure_class_pictures(tmp_path, 5, 2, {"prompt": "a mug"}, lambda seeds: fake_pictures(seeds, made))
    assert made == [[0, 1], [2, 3], [4]]
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_an_interrupted_set_is_completed_with_the_same_pictures(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ensure_class_pictures(whole, 5, 2, {"prompt": "a mug"}, fake_pictures)

    def stop(seeds):
        if seeds[0] == 2:
            raise KeyboardInterrupt
        return fake_pictures(seeds)

    with pytest.raises(KeyboardInterrupt):
        ensure_class_pictures(stopped, 5, 2, {"prompt": "a mug"}, stop)
    (stopped / "class-00001.png").unlink()
    ensure_class_pictures(stopped, 5, 2, {"prompt": "a mug"}, fake_pictures)
    assert contents(whole) == contents(stopped)


def test_processes_share_the_work(tmp_path):
    for rank in range(3):
        ensure_class_pictures(tmp_path, 7, 2, {}, fake_pictures, share=(rank, 3))
        assert len(list(tmp_path.glob("*.png"))) == [3, 5, 7][rank]


def test_two_runs_share_the_work_in_one_folder(tmp_path):
    made = []

    def slow(seeds):
        if not made:  # another run does the rest in the meantime
            made.append(list(seeds))
            ensure_class_pictures(tmp_path, 5, 2, {"prompt": "a mug"}, lambda seeds: fake_pictures(seeds, made))
        return fake_pictures(seeds)

    ensure_class_pictures(tmp_path, 5, 2, {"prompt": "a mug"}, slow)
    assert made == [[0, 1], [0, 1], [2, 3], [4]]
    assert len(list(tmp_path.iterdir())) == 6


def test_a_damaged_record_blocks_no_class_pictures(tmp_path):
    made = []
    ensure_class_pictures(tmp_path, 1, 2, {"prompt": "a mug"}, fake_pictures)
    whole = (tmp_path / "class_images.json").read_bytes()
    (tmp_path / "class_images.json").write_bytes(b"")
    with pytest.warns(UserWarning, match="class_images.json: damaged; the class images beside it are taken"):
        ensure_class_pictures(tmp_path, 1, 2, {"prompt": "a mug"}, lambda seeds: fake_pictures(seeds, made))
    assert not made and (tmp_path / "class_images.json").read_bytes() == whole


def test_class_pictures_of_another_prompt_are_refused(tmp_path):
    ensure_class_pictures(tmp_path, 1, 2, {"prompt": "a mug"}, fake_pictures)
    with pytest.raises(UserError, match="prompt 'a mug', now 'a cat'"):
        ensure_class_pictures(tmp_path, 1, 2, {"prompt": "a cat"}, fake_pictures)


def test_pictures_that_lie_there_already_count(tmp_path):
    made = []
    for name in ("one.png", "two.jpg"):
        ramp().save(tmp_path / name)
    ensure_class_pictures(tmp_path, 3, 2, {}, lambda seeds: fake_pictures(seeds, made))
    assert made == [[0]]


def test_enough_pictures_of_somebody_else_serve_every_base(tmp_path):
    ramp().save(tmp_path / "one.png")
    for base in ("this", "that"):
        ensure_class_pictures(tmp_path, 1, 2, {"unet": base}, fake_pictures)
    assert [file.name for file in tmp_path.iterdir()] == ["one.png"]


def test_who_removes_the_record_keeps_the_pictures(tmp_path):
    made = []
    ensure_class_pictures(tmp_path, 2, 2, {"base": "this"}, lambda seeds: fake_pictures(seeds, made))
    with pytest.raises(UserError, match="base 'this', now not noted; unet not noted, now 'that'.*class_images.json in"):
        ensure_class_pictures(tmp_path, 2, 2, {"unet": "that"}, fake_pictures)
    (tmp_path / "class_images.json").unlink()
    ensure_class_pictures(tmp_path, 2, 2, {"unet": "that"}, lambda seeds: fake_pictures(seeds, made))
    assert made == [[0, 1]]


@settings(deadline=None)
@given(count=st.integers(1, 9), sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8), seed=st.integers(0, 3))
def test_the_order_holds_each_sample_once_in_every_round(count, sizes, seed):
    ends = list(itertools.accumulate(sizes))
    stream = [
        sample for size, end in zip(sizes, ends, strict=True) for sample in sample_order(count, end - size, size, seed)
    ]
    assert stream == sample_order(count, 0, len(stream), seed)
    for first in range(0, len(stream) - count + 1, count):
        assert sorted(stream[first : first + count]) == list(range(count))


def test_rounds_are_shuffled_differently():
    rounds = {tuple(sample_order(8, 8 * number, 8, seed)) for number in range(4) for seed in range(2)}
    assert len(rounds) == 8


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 3))
def test_every_bucket_takes_the_turns_that_its_samples_are_due(counts, seed):
    turns = [bucket_turn(number, counts, seed) for number in range(3 * sum(counts))]
    for bucket, count in enumerate(counts):
        assert [turn for of, turn in turns if of == bucket] == list(range(3 * count))
        for first in range(0, len(turns), sum(counts)):
            assert sum(of == bucket for of, _ in turns[first : first + sum(counts)]) == count


def test_one_bucket_takes_every_turn_and_several_are_mixed():
    assert [bucket_turn(number, [5], 0) for number in range(12)] == [(0, number) for number in range(12)]
    rounds = {tuple(bucket_turn(number, [4, 4], seed)[0] for number in range(8)) for seed in range(4)}
    assert len(rounds) == 4


def test_seeds_differ_by_path_and_stay_what_they_are():
    seeds = {
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, "batch", 1),
        derive_seed(0, "batch", 2),
        derive_seed(0, "b", 1),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "batch", 1) == derive_seed(0, "batch", 1)
