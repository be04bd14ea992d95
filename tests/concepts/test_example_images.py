"""Example images of a concept are found or named, and lose their metadata."""

import json
import re

import pytest
from PIL import Image, PngImagePlugin

from atomdiff.concepts.example_images import find_examples
from atomdiff.concepts.push import write_repository
from atomdiff.sampling.output_files import SampleFile, write_overview
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file
from tests.fake_hub import card_of


def save_samples_of(folder, concept, prompts):
    """Write what `atomdiff sample` writes for a concept; return the images."""
    folder.mkdir(exist_ok=True)
    concepts = json.dumps([{"file": concept.name, "sha256": hash_file(concept), "weight": 1.0}])
    files = [SampleFile(folder, prompt, 0, {"concepts": concepts}) for prompt in prompts]
    for file in files:
        file.save(Image.new("RGB", (8, 8), "red"))
    write_overview(folder, files)
    return [file.path for file in files]


def test_images_generated_with_the_concept_are_found_beside_it_and_others_are_not(concept, tmp_path):
    file, _ = concept
    other = tmp_path / "other.atoms.safetensors"
    other.write_bytes(b"other")
    save_samples_of(file.parent, file, ["sks mug | on the beach", "sks mug in space"])
    save_samples_of(file.parent.parent / "elsewhere", other, ["a cat"])[0].rename(file.parent / "cat.png")
    Image.new("RGB", (8, 8)).save(file.parent / "before_after.png")
    Image.new("RGB", (8, 8)).save(file.parent / "photo.png")
    (file.parent / "broken.png").write_bytes(b"\x89PNG")
    long = PngImagePlugin.PngInfo()
    long.add_text("workflow", "x" * 2_000_000, zip=True)  # more than Pillow unpacks
    Image.new("RGB", (8, 8)).save(file.parent / "long.png", pnginfo=long)
    Image.new("RGB", (8, 8)).save(file.parent / "contact_sheet.png")
    folder = write_repository(tmp_path / "repo", file, "ada/mug")
    data, text = card_of((folder / "README.md").read_text())
    assert {item["text"] for item in data["widget"]} == {"sks mug | on the beach", "sks mug in space"}
    images = sorted(path.relative_to(folder).as_posix() for path in (folder / "images").iterdir())
    assert [item["output"]["url"] for item in data["widget"]] == images[:2]
    assert [re.sub(r"images/\d+-", "", name) for name in images[2:]] == ["grid.png", "contact-sheet.png"]
    assert "<Gallery />" in text and all(f"]({name})" in text for name in images[2:])
    assert f'pipe("{data["widget"][0]["text"]}")' in text
    (file.parent / "manifest.json").write_text("{}")
    again = write_repository(tmp_path / "again", file, "ada/mug")
    assert not [path for path in (again / "images").iterdir() if "grid" in path.name]


def test_a_grid_with_images_of_other_concepts_is_left_out_and_so_are_images_after_the_eighth(concept, tmp_path):
    other = tmp_path / "other.atoms.safetensors"
    other.write_bytes(b"other")
    save_samples_of(tmp_path / "samples", concept[0], [f"sks mug {number}" for number in range(9)])
    assert [file.name for file, _ in find_examples([tmp_path / "samples"], concept[0])][8:] == ["grid.png"]
    save_samples_of(tmp_path / "samples", other, ["a cat"])
    names = [file.name for file, _ in find_examples([tmp_path / "samples"], concept[0])]
    assert len(names) == 8 and all(name.startswith("sks-mug-") for name in names)


def test_images_can_be_named_with_and_without_prompts_and_lose_their_metadata(concept, tmp_path):
    file, _ = concept
    sample = save_samples_of(tmp_path / "samples", file, ["sks mug"])[0]
    photo = tmp_path / "my photo.jpg"
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "where I live", 6
    Image.new("RGB", (8, 4)).save(photo, exif=exif)
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", '{"a workflow": "secret"}')
    workflow = tmp_path / "workflow.png"
    Image.new("RGBA", (8, 4)).save(workflow, pnginfo=text)
    folder = write_repository(tmp_path / "repo", file, "ada/mug", images=[sample, photo, str(workflow)])
    data, _ = card_of((folder / "README.md").read_text())
    assert [item["text"] for item in data["widget"]] == ["sks mug"]
    stored = sorted((folder / "images").iterdir())
    assert [path.name for path in stored][1:] == ["01-my-photo.png", "02-workflow.png"]
    sizes = []
    for path in stored:
        with Image.open(path) as image:
            assert not image.info and not image.getexif()
            sizes.append(image.size)
    assert sizes == [(8, 8), (4, 8), (8, 4)]
    named = write_repository(tmp_path / "named", file, "ada/mug", images={photo: "sks mug, again"})
    data, _ = card_of((named / "README.md").read_text())
    assert data["widget"] == [{"text": "sks mug, again", "output": {"url": "images/00-my-photo.png"}}]
    write_repository(tmp_path / "searched", file, "ada/mug", images=[tmp_path / "samples"])
    assert len(list((tmp_path / "searched" / "images").iterdir())) == 2  # the image and grid.png
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    for bad in (broken, tmp_path / "nothing.png"):
        with pytest.raises(UserError, match=f"cannot read the image {re.escape(str(bad))}"):
            write_repository(tmp_path / "bad", file, "ada/mug", images=[sample, bad])
    assert not (tmp_path / "bad").exists()
