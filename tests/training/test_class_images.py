from pathlib import Path

import pytest
from PIL import Image

from atomdiff.training.class_images import ensure_class_images
from atomdiff.utils.errors import UserError


def fake_images(seeds, made=None):
    if made is not None:
        made.append(list(seeds))
    return [Image.new("RGB", (8, 8), (seed, len(seeds), 0)) for seed in seeds]


def contents(folder: Path):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_class_images_are_made_once(tmp_path):
    made = []
    for _ in range(2):
        ensure_class_images(tmp_path, 5, 2, {"prompt": "a mug"}, lambda seeds: fake_images(seeds, made))
    assert made == [[0, 1], [2, 3], [4]]
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_an_interrupted_set_is_completed_with_the_same_images(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ensure_class_images(whole, 5, 2, {"prompt": "a mug"}, fake_images)

    def stop(seeds):
        if seeds[0] == 2:
            raise KeyboardInterrupt
        return fake_images(seeds)

    with pytest.raises(KeyboardInterrupt):
        ensure_class_images(stopped, 5, 2, {"prompt": "a mug"}, stop)
    (stopped / "class-00001.png").unlink()
    ensure_class_images(stopped, 5, 2, {"prompt": "a mug"}, fake_images)
    assert contents(whole) == contents(stopped)


def test_processes_share_the_work(tmp_path):
    for rank in range(3):
        ensure_class_images(tmp_path, 7, 2, {}, fake_images, share=(rank, 3))
        assert len(list(tmp_path.glob("*.png"))) == [3, 5, 7][rank]


def test_two_runs_share_the_work_in_one_folder(tmp_path):
    made = []

    def slow(seeds):
        if not made:  # another run does the rest in the meantime
            made.append(list(seeds))
            ensure_class_images(tmp_path, 5, 2, {"prompt": "a mug"}, lambda seeds: fake_images(seeds, made))
        return fake_images(seeds)

    ensure_class_images(tmp_path, 5, 2, {"prompt": "a mug"}, slow)
    assert made == [[0, 1], [0, 1], [2, 3], [4]]
    assert len(list(tmp_path.iterdir())) == 6


def test_a_damaged_record_blocks_no_class_images(tmp_path):
    made = []
    ensure_class_images(tmp_path, 1, 2, {"prompt": "a mug"}, fake_images)
    whole = (tmp_path / "class_images.json").read_bytes()
    (tmp_path / "class_images.json").write_bytes(b"")
    with pytest.warns(UserWarning, match="class_images.json: damaged; the class images beside it are taken"):
        ensure_class_images(tmp_path, 1, 2, {"prompt": "a mug"}, lambda seeds: fake_images(seeds, made))
    assert not made and (tmp_path / "class_images.json").read_bytes() == whole


def test_class_images_of_another_prompt_are_refused(tmp_path):
    ensure_class_images(tmp_path, 1, 2, {"prompt": "a mug"}, fake_images)
    with pytest.raises(UserError, match="prompt 'a mug', now 'a cat'"):
        ensure_class_images(tmp_path, 1, 2, {"prompt": "a cat"}, fake_images)


def test_images_that_lie_there_already_count(tmp_path):
    made = []
    for name in ("one.png", "two.jpg"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    ensure_class_images(tmp_path, 3, 2, {}, lambda seeds: fake_images(seeds, made))
    assert made == [[0]]


def test_enough_images_of_somebody_else_serve_every_base(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    for base in ("this", "that"):
        ensure_class_images(tmp_path, 1, 2, {"unet": base}, fake_images)
    assert [file.name for file in tmp_path.iterdir()] == ["one.png"]


def test_who_removes_the_record_keeps_the_images(tmp_path):
    made = []
    ensure_class_images(tmp_path, 2, 2, {"base": "this"}, lambda seeds: fake_images(seeds, made))
    with pytest.raises(UserError, match="base 'this', now not noted; unet not noted, now 'that'.*class_images.json in"):
        ensure_class_images(tmp_path, 2, 2, {"unet": "that"}, fake_images)
    (tmp_path / "class_images.json").unlink()
    ensure_class_images(tmp_path, 2, 2, {"unet": "that"}, lambda seeds: fake_images(seeds, made))
    assert made == [[0, 1]]
