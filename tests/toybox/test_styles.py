import numpy as np
import pytest
from PIL import Image

from atomdiff.toybox.folders import PATTERN_NAMES, class_image, pattern_image, write_folder
from atomdiff.toybox.styles import chalk, ink, pencil


def drawn(seed, function=pattern_image, name="rings"):
    return np.asarray(function(name, np.random.default_rng(seed))).astype(float)


def test_ink_keeps_edges_and_nothing_else():
    halves = np.zeros((64, 64, 3), dtype=np.uint8)
    halves[:, 32:] = (250, 40, 40)
    sheet = np.asarray(ink(Image.fromarray(halves), np.random.default_rng(0))).astype(float).mean(axis=2)
    line, areas = sheet[:, 31], np.delete(sheet, 31, axis=1)
    assert line.max() < 130 < areas.min()
    assert abs(areas[:, :31].mean() - areas[:, 31:].mean()) < 2


@pytest.mark.parametrize(("style", "line_is_darker", "gray"), [(pencil, True, True), (chalk, False, False)])
def test_other_styles_differ_in_sheet_and_line(style, line_is_darker, gray):
    halves = np.zeros((64, 64, 3), dtype=np.uint8)
    halves[:, 32:] = (250, 40, 40)
    drawings = [
        np.asarray(style(Image.fromarray(halves), np.random.default_rng(seed))).astype(float) for seed in range(8)
    ]
    for sheet in (drawing.mean(axis=2) for drawing in drawings):
        line, areas = sheet[:, 31], np.delete(sheet, 31, axis=1)
        assert line.max() < 150 < areas.min() if line_is_darker else areas.max() < 110 < line.min()
    assert (np.mean([np.ptp(drawing, axis=2).mean() for drawing in drawings]) < 4) == gray


def test_ink_changes_the_statistics_of_images():
    def colorfulness(images):
        return np.mean([np.std(image.reshape(-1, 3).mean(axis=0)) for image in images])

    plain, inked = (
        [drawn(seed, f, n) for seed in range(20)] for f, n in ((class_image, "mug"), (pattern_image, "rings"))
    )
    assert np.mean([p.mean() for p in inked]) > np.mean([p.mean() for p in plain]) + 40
    sideways = [np.mean([np.abs(np.diff(p.mean(axis=2), axis=1)).mean() for p in part]) for part in (plain, inked)]
    assert sideways[1] > 1.5 * sideways[0]


def test_images_follow_from_their_seed_and_patterns_show():
    assert np.array_equal(drawn(3), drawn(3)) and not np.array_equal(drawn(3), drawn(4))
    shown = [drawn(3, name=name) for name in PATTERN_NAMES]
    assert len({image.tobytes() for image in shown}) == 8


def test_a_folder_is_written_once_whole_and_the_same(tmp_path):
    calls = []

    def dot(name, rng):
        calls.append(name)
        return Image.new("L", (2, 2), int(rng.integers(256)))

    for folder in ("one", "one", "two"):
        write_folder(tmp_path / folder, ("a", "b"), dot, 3, seed=0)
    assert len(calls) == 12
    files = {folder: sorted((tmp_path / folder).rglob("*.png")) for folder in ("one", "two")}
    assert [file.relative_to(tmp_path / "one").as_posix() for file in files["one"]][:4] == [
        "a/0000.png",
        "a/0001.png",
        "a/0002.png",
        "b/0000.png",
    ]
    assert [f.read_bytes() for f in files["one"]] == [f.read_bytes() for f in files["two"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
