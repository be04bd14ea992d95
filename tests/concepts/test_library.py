"""A library reads concepts when they are used, keeps the last ones within a budget, and follows its folder."""

import os

import pytest
import torch

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.utils.errors import UserError
from tests.concepts.library_files import number_in, write_concept


def test_a_concept_is_read_on_first_use_and_kept(three, reads):
    library = ConceptLibrary(three)
    assert not reads.done and library.memory_used == 0
    bee = library["bee"]
    assert number_in(bee) == 1 and bee.trigger_phrase == "a photo of sks bee" and set(bee.tokens) == {"sks"}
    assert library["bee"] is bee
    assert reads.done == {"bee": 1}
    assert library.memory_used > sum(tensor.nbytes for tensor in bee.layers["unet.conv_in"].values())


def test_the_folder_may_be_relative_and_the_program_go_elsewhere(three, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(three)
    library = ConceptLibrary(".")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert number_in(library["cat"]) == 2


def test_a_new_file_is_found_by_its_name_and_its_phrase_without_being_announced(three):
    library = ConceptLibrary(three)
    write_concept(three, "dog", 3, "sks dog")
    assert "dog" not in library
    assert number_in(library["dog"]) == 3 and "dog" in library
    write_concept(three, "new/elk", 4, "sks elk")
    assert library.find("elk") == ["new/elk"]
    write_concept(three, "fox", 5)
    assert library.info("fox").name == "fox"


def test_an_unknown_name_is_answered_with_near_ones(three):
    write_concept(three, "insects/moth")
    library = ConceptLibrary(three)
    for name, hint in (("bees", "bee"), ("moth", "insects/moth"), ("ant.atoms.safetensors", "ant")):
        with pytest.raises(UserError, match=f"no concept '{name}' among the 4 in .*near: {hint}\\b"):
            library[name]
    with pytest.raises(UserError, match="and none of a similar name"):
        library.info("zzzzzz")


def test_a_changed_file_is_read_again_even_with_the_size_and_time_of_the_old_one(three):
    library = ConceptLibrary(three)
    old, ant, before = library["bee"], library["ant"], (three / "bee.atoms.safetensors").stat()
    path = write_concept(three, "bee", 7, "a photo of sks bee")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert library["bee"] is old  # no scan since
    library.refresh()
    assert number_in(library["bee"]) == 7 and number_in(old) == 1
    assert library["ant"] is ant


def test_a_removed_concept_takes_no_memory(three):
    library = ConceptLibrary(three)
    for name in library:
        library[name]
    memory_of_three = library.memory_used
    (three / "bee.atoms.safetensors").unlink()
    library.refresh()
    assert 0 < library.memory_used < memory_of_three
    with pytest.raises(UserError):
        library["bee"]


def test_a_folder_that_goes_away_leaves_the_library_as_it_was(three):
    library = ConceptLibrary(three)
    bee = library["bee"]
    three.rename(three.with_name("away"))
    for _ in range(2):
        with pytest.raises(UserError, match="cannot be read as a folder"):
            library.refresh()
    assert len(library) == 3 and library["bee"] is bee
    with pytest.raises(UserError, match="ant"):
        library["ant"]
    three.with_name("away").rename(three)
    library.refresh()
    assert number_in(library["ant"]) == 0


def test_a_concept_replaced_while_it_is_read_is_read_again(three, reads):
    library = ConceptLibrary(three)

    def replace(name):
        reads.after = lambda name: None
        write_concept(three, "bee", 8)
        library.refresh()

    reads.after = replace
    assert number_in(library["bee"]) == 1
    assert number_in(library["bee"]) == 8


def test_a_file_damaged_behind_its_header_is_refused_when_it_is_read(three):
    write_concept(three, "dog", 3)
    data = (three / "dog.atoms.safetensors").read_bytes()
    (three / "dog.atoms.safetensors").write_bytes(data[:-2] + b"\x00\x7e")  # not a number
    library = ConceptLibrary(three)
    for _ in range(2):
        with pytest.raises(UserError, match="dog.*not finite"):
            library["dog"]
    assert number_in(library["cat"]) == 2 and not library._reading


def test_those_asked_for_last_are_kept_within_the_budget(three, reads):
    library = ConceptLibrary(three)
    library["ant"]
    one = library.memory_used
    library = ConceptLibrary(three, memory_budget=int(2.5 * one))
    reads.done.clear()
    for name in ("ant", "bee", "ant", "cat", "ant", "cat"):  # cat puts bee out
        library[name]
        assert library.memory_used <= library.memory_budget
    assert reads.done == {"ant": 1, "bee": 1, "cat": 1}
    library["bee"]  # puts ant out
    assert library.memory_used == pytest.approx(2 * one, rel=0.05)
    for name in ("cat", "bee", "ant"):
        library[name]
    assert reads.done == {"ant": 2, "bee": 2, "cat": 1}


def test_a_budget_is_bytes_so_that_a_large_concept_counts_for_many(three):
    library = ConceptLibrary(three)
    for name in library:
        library[name]
    small = library.memory_used
    write_concept(three, "whale", size=10_000)  # 360 KB
    library = ConceptLibrary(three, memory_budget=small + 400_000)
    library["whale"]
    assert library.memory_used > 700_000 or library.memory_used == 0
    library = ConceptLibrary(three, memory_budget=small + 1000)
    kept = {name: library[name] for name in ("ant", "bee", "cat")}
    assert library["whale"] is not library["whale"]  # larger than the whole budget: never kept, and puts nobody out
    assert all(library[name] is delta for name, delta in kept.items())


def test_no_budget_keeps_nothing(three, reads):
    library = ConceptLibrary(three, memory_budget=0)
    assert number_in(library["bee"]) == number_in(library["bee"]) == 1
    assert reads.done == {"bee": 2} and library.memory_used == 0


def test_what_the_library_gives_is_what_the_file_holds(three):
    library = ConceptLibrary(three)
    for name in library:
        concept, read = library[name], read_concept_file(library.info(name).path)
        assert concept.config == read.config and concept.fingerprint == read.fingerprint
        assert torch.equal(concept.tokens["sks"]["text_encoder"], read.tokens["sks"]["text_encoder"])
