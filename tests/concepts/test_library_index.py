"""What a library lists: concepts by name and phrase, and files that cannot be used."""

import os
import random
import unicodedata
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import atomdiff
from atomdiff.concepts.concept_file import ConceptFile
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.sampling.adapter_cache import AdapterCache
from atomdiff.sampling.prompt_requests import read_requests
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import MAX_HEADER_BYTES
from tests.concepts.library_files import Reads, number_in, rewrite_header, rewrite_metadata, write_concept


def test_names_are_paths_without_the_ending_and_other_files_are_left_out(tmp_path):
    for name in ("mug", "animals/cat", "animals/wild/cat"):
        write_concept(tmp_path, name)
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    for name in ("mug.atoms.safetensors.partial", "notes.txt", ".hidden.atoms.safetensors"):
        (tmp_path / name).write_bytes(b"no concept")
    write_concept(tmp_path, ".trash/old")
    library = atomdiff.ConceptLibrary(tmp_path)
    assert list(library) == ["animals/cat", "animals/wild/cat", "mug"] and len(library) == 3
    assert "animals/cat" in library and "cat" not in library and not library.damaged


def test_lora_files_are_listed_and_loaded_by_their_path(tmp_path, tiny_pipe):
    write_concept(tmp_path, "cat")
    module = "mid_block.resnets.0.conv1"
    name = f"lora_unet_{module.replace('.', '_')}"
    layer = {f"{name}.lora_down.weight": torch.ones(1, 64, 3, 3), f"{name}.lora_up.weight": torch.ones(64, 1, 1, 1)}
    for file in ("old mug", "cat"):
        save_file(layer, tmp_path / f"{file}.safetensors", {"modelspec.trigger_phrase": "a blue mug"})
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "word.safetensors")
    with pytest.warns(UserWarning, match="cat.safetensors has the same name in the library as .*cat.atoms.safetensors"):
        library = ConceptLibrary(tmp_path)
    assert list(library) == ["cat", "old mug"] and library.find("blue mug") == ["old mug"]
    assert library.info("old mug").is_lora and not library.info("cat").is_lora
    with pytest.raises(UserError, match="'old mug' is a LoRA file and holds no atoms: load it by its path"):
        library["old mug"]
    before = tiny_pipe.unet.get_submodule(module).weight.clone()
    with AdapterCache(tiny_pipe).use(read_requests(["a mug <lora:old mug:0.5>"], library=library)):
        weight = tiny_pipe.unet.get_submodule(module).get_base_layer().weight
        assert torch.allclose(weight, before + 0.5, atol=1e-6)


def test_a_name_is_found_however_its_accents_are_written(tmp_path):
    write_concept(tmp_path, unicodedata.normalize("NFD", "müll"))
    library = ConceptLibrary(tmp_path)
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "müll")
        assert name in library and library[name] is library["müll"]


def test_info_comes_from_the_header(tmp_path, reads):
    path = write_concept(tmp_path, "animals/cat", phrase="zwx Katze", words=("zwx", "a.b"), base_model="/some/where")
    info = ConceptLibrary(tmp_path).info("animals/cat")
    assert (info.name, info.path, info.trigger_phrase) == ("animals/cat", path, "zwx Katze")
    assert info.trigger_words == ("a.b", "zwx") and info.base_model == "/some/where"
    assert (info.size, info.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert not reads.done


@pytest.mark.parametrize(
    ("phrase", "found"),
    [
        ("sks mug", ["a", "d", "b", "c"]),
        ("  SKS   Mug ", ["a", "d", "b", "c"]),
        ("mug", ["a", "b", "c", "d"]),
        ("a photo of mug", ["c"]),
        ("red mug", ["b"]),
        ("straße", ["e"]),
        ("STRASSE", ["e"]),
        ("zwx", ["e"]),
        ("cat-toy", ["e"]),
        ("☂", ["f"]),
        ("mu", []),
        ("blue mug", []),
        ("", []),
        ("!?", []),
    ],
)
def test_find_gives_the_phrase_first_then_all_its_words(tmp_path, phrase, found):
    phrases = {"a": "sks mug", "b": "sks red mug", "c": "a photo of sks mug", "d": "Sks MUG", "f": "☂", "g": ""}
    for name, text in phrases.items():
        write_concept(tmp_path, name, phrase=text)
    write_concept(tmp_path, "e", phrase="Straße", words=("zwx", "<cat-toy>"))
    assert ConceptLibrary(tmp_path).find(phrase) == found


def test_links_to_files_are_followed_and_those_to_folders_are_not(tmp_path):
    target = write_concept(tmp_path / "store", "blob", 5.0)
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "mug.atoms.safetensors").symlink_to(target)
    (folder / "loop").symlink_to(folder)
    (folder / "gone.atoms.safetensors").symlink_to(tmp_path / "nothing")
    library = ConceptLibrary(folder)
    assert list(library) == ["mug"] and number_in(library["mug"]) == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "mug.atoms.safetensors")
    assert not list(ConceptLibrary(tmp_path))


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        with pytest.raises(UserError, match=f"{name}.*cannot be read as a folder"):
            ConceptLibrary(tmp_path / name)
    with pytest.raises(UserError, match="memory_budget=-1: expected bytes, at least 0"):
        ConceptLibrary(tmp_path, memory_budget=-1)


def test_refresh_reads_the_headers_of_new_and_changed_files_only(three, headers):
    library = ConceptLibrary(three)
    assert headers.done == {"ant": 1, "bee": 1, "cat": 1}
    old = {name: library.info(name) for name in library}
    library.refresh()
    write_concept(three, "bee", phrase="sks wasp")
    write_concept(three, "dog")
    (three / "cat.atoms.safetensors").unlink()
    library.refresh()
    assert headers.done == {"ant": 1, "bee": 2, "cat": 1, "dog": 1}
    assert list(library) == ["ant", "bee", "dog"]
    assert library.info("ant") is old["ant"] and library.info("bee") is not old["bee"]
    assert library.find("sks wasp") == ["bee"] and not library.find("cat") and not library.find("sks bee")
    with pytest.raises(UserError, match="no concept 'cat'"):
        library["cat"]


def test_files_that_are_no_concepts_are_looked_at_once(three, monkeypatch):
    for name in ("unet", "vae"):
        save_file({"conv_in.weight": torch.zeros(2), "act.alpha": torch.ones(1)}, three / f"{name}.safetensors")
    looks = Reads(monkeypatch, "read_safetensors_header")
    library = ConceptLibrary(three)
    library.refresh()
    assert looks.done == {"unet": 1, "vae": 1} and sorted(library) == ["ant", "bee", "cat"]
    save_file({"lora_unet_conv_in.diff": torch.zeros(2)}, three / "vae.safetensors")
    (three / "unet.safetensors").unlink()
    library.refresh()
    assert looks.done == {"unet": 1, "vae": 2} and "vae" in library


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def bomb(path):
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": cut,
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(4000)),
    "endless header": lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
    "header bomb": bomb,
    "no JSON": lambda path: rewrite_header(path, lambda header: b"{"),
    "deep JSON": lambda path: rewrite_header(path, lambda header: b"[" * 100_000),
    "long number": lambda path: rewrite_header(path, lambda header: b"1" * 100_000),
    "no text": lambda path: rewrite_header(path, lambda header: b"\xff\xfe"),
    "a list": lambda path: rewrite_header(path, lambda header: []),
    "no offsets": lambda path: rewrite_header(path, lambda header: {"x": {}}),
    "metadata of numbers": lambda path: rewrite_metadata(path, trigger_phrase=3),
    "another format": lambda path: rewrite_metadata(path, format="pt"),
    "a later version": lambda path: rewrite_metadata(path, format_version="3"),
    "bare tensors": lambda path: save_file({"x": torch.zeros(2)}, path),
    "a thousand words": lambda path: save_file(
        {f"token.{number}": torch.zeros(1) for number in range(1000)},
        path,
        {"format": "atomdiff", "format_version": "1"},
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_listed_warned_of_once_and_welcome_when_mended(three, damage, user_warnings):
    path = write_concept(three, "dog", 3)
    DAMAGES[damage](path)
    with pytest.warns(UserWarning, match="left out of the library.*dog") as caught:
        library = ConceptLibrary(three)
    assert len(user_warnings(caught)) == 1
    assert list(library) == ["ant", "bee", "cat"] and list(library.damaged) == [path]
    assert str(path) in library.damaged[path]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.refresh()
        with pytest.raises(UserError, match="the concept 'dog' cannot be used: .*dog"):
            library["dog"]
        write_concept(three, "dog", 3)
        assert number_in(library["dog"]) == 3 and not library.damaged


def test_a_file_that_cannot_be_opened_is_tried_again(three, headers):
    def fail(name):
        raise UserError("cannot read it") from OSError("too many open files")

    headers.before = fail
    with pytest.warns(UserWarning, match="cannot read it"):
        library = ConceptLibrary(three)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.refresh()
    assert len(library) == 0 and len(library.damaged) == 3
    headers.before = lambda name: None
    assert number_in(library["bee"]) == 1 and not library.damaged


def test_a_subfolder_that_cannot_be_read_is_listed_and_tried_again(three, monkeypatch):
    write_concept(three, "locked/dog", 3)
    scan = os.scandir

    def deny(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="cannot read .*locked: .*Permission denied"):
        patch.setattr(os, "scandir", deny)
        library = ConceptLibrary(three)
    assert list(library) == ["ant", "bee", "cat"] and list(library.damaged) == [three / "locked"]
    assert number_in(library["locked/dog"]) == 3 and not library.damaged


def test_many_damaged_files_make_one_short_warning(tmp_path, user_warnings):
    for number in range(20):
        (tmp_path / f"{number}.atoms.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        library = ConceptLibrary(tmp_path)
    (warning,) = user_warnings(caught)
    assert "and 17 more" in str(warning.message)
    assert len(library.damaged) == 20 and len(library) == 0


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_is_in_a_file_the_index_holds(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    path = write_concept(folder, "x", phrase="sks mug")
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    noise = data.draw(st.binary(max_size=8))
    path.write_bytes(whole[:start] + noise + whole[start + data.draw(st.integers(0, 9)) :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        library = ConceptLibrary(folder)
    assert len(library) + len(library.damaged) == 1
    library.find("mug")
    try:
        assert isinstance(library["x"], ConceptFile)
    except UserError as error:
        assert "x" in str(error)
