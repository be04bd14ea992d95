"""The library of the page: search, thumbnails, renaming, the trash."""

import base64
import io

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from atomdiff.ui import library as ui_library
from atomdiff.utils.errors import UserError
from tests.concepts.library_files import rewrite_metadata, write_concept

RED, BLUE = (250, 0, 0), (0, 0, 250)


@pytest.fixture
def mug(library):
    path = write_concept(library.folder, "mug", phrase="sks mug")
    Image.new("RGB", (300, 200), RED).save(library.folder / "mug.preview.png")
    library.refresh()
    return path


def names(infos):
    return [info.name for info in infos]


def test_search_looks_at_names_phrases_and_bases(library, mug):
    write_concept(library.folder, "robot", phrase="zwx robot", base_model="other/base")
    assert set(names(ui_library.search(library, ""))) == {"mug", "robot"}
    assert names(ui_library.search(library, "SKS mug")) == ["mug"]
    assert names(ui_library.search(library, "other robot")) == ["robot"]
    assert ui_library.search(library, "cat") == []


def test_thumbnails_come_from_beside_the_file_from_within_or_are_letters(library, mug):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), BLUE).save(data, format="png")
    inside = write_concept(library.folder, "inside")
    rewrite_metadata(
        inside, **{"modelspec.thumbnail": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"}
    )
    for name, text in {
        "text": "hello",
        "damaged": "data:image/png;base64,AAAA",
        "odd": "data:image/png;base64,é",
    }.items():
        rewrite_metadata(write_concept(library.folder, name), **{"modelspec.thumbnail": text})
    library.refresh()
    assert ui_library.thumbnail(library.info("mug")).getpixel((5, 5)) == RED
    assert ui_library.thumbnail(library.info("mug")).width == 256
    assert ui_library.thumbnail(library.info("inside")).getpixel((5, 5)) == BLUE
    letters = [ui_library.thumbnail(library.info(name)) for name in ("text", "damaged", "odd")]
    assert {image.size for image in letters} == {(256, 256)}
    assert all(len(image.getcolors()) > 1 for image in letters)  # something is drawn


def test_description_has_what_the_file_says(library, mug):
    rows = ui_library.describe(library.info("mug"))
    assert rows["trigger phrase"] == "sks mug"
    assert rows["base"] == "some/model"
    assert rows["size"] == f"{mug.stat().st_size / 1000:.1f} KB"
    assert "filter atoms" in rows["method"]


def test_a_result_is_added_under_a_free_name_with_its_image(library, mug, tmp_path):
    other = write_concept(tmp_path, "mug", phrase="zwx mug")
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8), BLUE).save(image)
    assert ui_library.add(library, other, image) == "mug-2"
    assert library.info("mug-2").trigger_phrase == "zwx mug"
    assert ui_library.thumbnail(library.info("mug-2")).getpixel((5, 5)) == BLUE


def test_a_result_that_is_there_already_is_not_added_again(library, mug):
    assert ui_library.add(library, mug, None) == "mug"
    assert list(library) == ["mug"]


def test_a_concept_is_pushed_with_its_thumbnail_and_a_token_that_is_given(hub_server, library, mug):
    options = {"license": " cc-by-4.0 ", "private": True}
    with pytest.raises(UserError, match="cannot push to ada/mug: .*hf auth login"):
        ui_library.push(library, "mug", "ada/mug", token="", **options)
    assert ui_library.push(library, "mug", "", token=" hf_writer ", **options) == f"{hub_server.url}/ada/mug"
    files = hub_server.files("ada/mug")
    assert files.keys() == {"README.md", "mug.atoms.safetensors", "images/00-mug-preview.png"}
    assert hub_server.repositories["ada/mug"]["private"] is True
    assert b"cc-by-4.0" in files["README.md"] and b"hf_writer" not in b"".join(files.values())


def test_renaming_takes_the_image_along(library, mug):
    assert ui_library.rename(library, "mug", "cup") == "cup"
    assert list(library) == ["cup"]
    assert ui_library.thumbnail(library.info("cup")).getpixel((5, 5)) == RED


@pytest.mark.parametrize("name", ["", "../cup", "a/b", ".cup", "x" * 101, "\u732b" * 100])
def test_names_that_cannot_be_file_names_are_refused(library, mug, name):
    with pytest.raises(UserError, match="expected letters"):
        ui_library.rename(library, "mug", name)
    assert list(library) == ["mug"]


@pytest.mark.parametrize("name", ["cup.atoms", "mug.safetensors", "cup.atoms.safetensors"])
def test_names_of_another_kind_of_file_are_refused(library, mug, name):
    with pytest.raises(UserError, match="expected it without .atoms or .safetensors at its end"):
        ui_library.rename(library, "mug", name)
    assert list(library) == ["mug"]


def test_a_name_that_is_taken_is_refused(library, mug):
    write_concept(library.folder, "cup")
    with pytest.raises(UserError, match="'cup' already"):
        ui_library.rename(library, "mug", "cup")
    Image.new("RGB", (8, 8), BLUE).save(library.folder / "jug.preview.png")
    with pytest.raises(UserError, match="there is an image jug.preview.png already"):
        ui_library.rename(library, "mug", "jug")
    assert mug.is_file() and (library.folder / "mug.preview.png").is_file()


def test_a_lora_file_keeps_its_name_and_its_image(library, tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, library.folder / "mug.safetensors")
    Image.new("RGB", (8, 8), RED).save(library.folder / "mug.preview.png")
    Image.new("RGB", (8, 8), BLUE).save(tmp_path / "image.png")
    concept = write_concept(tmp_path, "mug", phrase="sks mug")
    assert ui_library.add(library, concept, tmp_path / "image.png") == "mug-2"
    assert ui_library.add(library, concept, None) == "mug-2"
    assert set(library) == {"mug", "mug-2"} and library.info("mug").is_lora
    assert ui_library.thumbnail(library.info("mug")).getpixel((5, 5)) == RED


def test_deleted_concepts_are_in_the_trash(library, mug):
    contents = mug.read_bytes()
    moved = ui_library.delete(library, "mug")
    assert len(library) == 0 and not mug.exists()
    assert moved.read_bytes() == contents
    assert moved.parent.parent == library.folder / ".trash"
    assert (moved.parent / "mug.preview.png").is_file()
    with pytest.raises(UserError, match="no concept 'mug'"):
        ui_library.delete(library, "mug")
