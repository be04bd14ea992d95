import itertools
import json

import pytest
from PIL import Image

from atomdiff.data.captions import tag_orders
from atomdiff.data.images import read_images
from atomdiff.utils.errors import UserError


def test_few_tags_come_in_all_orders():
    expected = {", ".join(order) for order in itertools.permutations(["sks mug", "red", "on a table"])}
    orders = tag_orders("sks mug, red,on a table", 0, seed=0)
    assert set(orders) == expected and len(orders) == 6


def test_many_tags_come_in_sixteen_orders_drawn_from_the_seed():
    caption = ", ".join("abcdefgh")
    orders = tag_orders(caption, 2, seed=0)
    assert len(orders) == 16 == len(set(orders))
    for order in orders:
        assert order.startswith("a, b, ") and sorted(order.split(", ")) == list("abcdefgh")
    assert orders == tag_orders(caption, 2, seed=0) != tag_orders(caption, 2, seed=1)
    assert len({order.split(", ")[2] for order in orders}) > 3


@pytest.mark.parametrize("caption", ["a photo of sks mug", "sks mug,", "sks, mug", ""])
def test_captions_without_tags_to_move_stay_as_they_are(caption):
    assert tag_orders(caption, 1, seed=0) == (caption,)


def test_tags_that_are_alike_make_no_new_order():
    assert tag_orders("a, a", 0, seed=0) == ("a, a",)
    assert set(tag_orders("a, a, b", 0, seed=0)) == {"a, a, b", "a, b, a", "b, a, a"}


@pytest.fixture
def folder(tmp_path):
    """Three images."""
    for name in ("01.png", "02.JPG", "caf\u00e9.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="png")
    return tmp_path


def captions(folder):
    return {image.name: image.caption for image in read_images(folder, minimum_side=1) if image.caption}


@pytest.mark.parametrize("name", ["01.txt", "01.TXT", "01.caption", "01.Caption", "01.png.txt", "01.png.caption"])
def test_a_caption_is_read_under_each_usual_name(folder, name):
    (folder / name).write_text(" a red mug \n", encoding="utf-16")
    assert captions(folder) == {"01.png": "a red mug"}


def test_names_are_compared_in_one_unicode_form(folder):
    (folder / "cafe\u0301.txt").write_text("a cup")
    assert captions(folder) == {"caf\u00e9.png": "a cup"}


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_tables_of_image_folders_are_read(folder, column):
    rows = [{"file_name": "01.png", column: "a mug"}, {"file_name": "./cafe\u0301.png", column: "a cup"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert captions(folder) == {"01.png": "a mug", "caf\u00e9.png": "a cup"}
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text(f'file_name,{column}\n02.JPG,"a mug, red"\n')
    assert captions(folder) == {"02.JPG": "a mug, red"}
    (folder / "metadata.csv").write_text(f'file_name,{column}\n02.JPG,"a mug,\r\nred"\n01.png,a cup\n')
    assert captions(folder) == {"02.JPG": "a mug,\nred", "01.png": "a cup"}


def test_equal_captions_may_stand_twice_and_empty_ones_count_nothing(folder):
    (folder / "01.txt").write_text("a mug\n")
    (folder / "01.caption").write_text("a mug")
    (folder / "01.png.txt").write_text("  \n")
    assert captions(folder) == {"01.png": "a mug"}


def test_captions_that_differ_are_refused(folder):
    (folder / "01.txt").write_text("a mug")
    (folder / "metadata.jsonl").write_text('{"file_name": "01.png", "text": "a cup"}')
    with pytest.raises(UserError, match="01.png has one caption in 01.txt and another in metadata.jsonl; keep one"):
        captions(folder)


@pytest.mark.parametrize("name", ["03.txt", "captions.json", "01_png.caption", "metadata.parquet"])
def test_what_is_not_read_is_named(folder, name):
    (folder / name).write_bytes(b"caf\xe9")
    with pytest.warns(UserWarning, match=f"not read, as no caption of an image: {name}"):
        assert captions(folder) == {}


def test_lines_of_a_table_without_an_image_are_counted(folder):
    rows = [{"file_name": name, "text": "a mug"} for name in ("01.png", "03.png", "other/01.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="2 lines of metadata.jsonl"):
        assert captions(folder) == {"01.png": "a mug"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("01.txt", "café".encode("cp1252"), "01.txt: not text in UTF-8"),
        ("metadata.jsonl", b'{"file_name": "01.png", "text": "a"}\n{', "line 2 is not JSON"),
        (
            "metadata.jsonl",
            b'{"file_name": "01.png", "label": 3}',
            "line 1 has file_name, label; expected file_name, and",
        ),
        ("metadata.csv", b"image,text\n01.png,a", "line 2 has image, text; expected file_name"),
        ("metadata.csv", b"file_name,text\n01.png,'" + b"a" * 200_000, "is not CSV .field larger"),
    ],
)
def test_captions_that_cannot_be_read_are_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        captions(folder)


def test_a_table_that_is_nested_too_deeply_is_named(folder):
    (folder / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match="line 1 is not JSON"):
        captions(folder)
