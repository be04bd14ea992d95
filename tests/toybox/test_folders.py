import numpy as np
import pytest
from PIL import Image

from atomdiff.toybox.folders import write_folder
from atomdiff.utils.errors import UserError


def dot(name, rng):
    return Image.new("L", (2, 2), int(rng.integers(256)))


def names(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))


def test_what_a_stopped_call_left_is_not_mixed_in(tmp_path):
    def stop(name, rng):
        if name == "b":
            raise KeyboardInterrupt
        return dot(name, rng)

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "things", ("a", "b"), stop, 3, seed=0)
    write_folder(tmp_path / "things", ("a", "c"), dot, 2, seed=1)
    assert names(tmp_path / "things") == ["a/0000.png", "a/0001.png", "c/0000.png", "c/0001.png"]
    kept = np.asarray(Image.open(tmp_path / "things" / "a" / "0000.png"))
    assert np.array_equal(kept, np.asarray(dot("a", np.random.default_rng([1, 0, 0]))))


@pytest.mark.parametrize(("classes", "per_class"), [(("a", "b"), 3), (("a", "c"), 2), (("a",), 2)])
def test_a_folder_of_other_images_is_not_taken_for_these(tmp_path, classes, per_class):
    write_folder(tmp_path / "things", ("a", "b"), dot, 2, seed=0)
    with pytest.raises(UserError, match=f"things: holds 4 other images; expected {per_class} of each of a"):
        write_folder(tmp_path / "things", classes, dot, per_class, seed=0)
