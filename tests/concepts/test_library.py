"""Thousands of concepts in a folder: found by name and phrase, read once, kept within a budget, from any thread."""

import json
import os
import random
import shutil
import threading
import time
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import atomdiff
from atomdiff.concepts import library as library_module
from atomdiff.concepts import library_index
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file, write_concept_file
from atomdiff.concepts.library import ConceptLibrary, _memory
from atomdiff.sampling.adapter_cache import AdapterCache
from atomdiff.sampling.prompt_requests import read_requests
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import MAX_HEADER_BYTES

SECONDS = 30  # no thread waits longer: a test that would hang fails instead


def write(folder, name, number=0.0, phrase="", words=("sks",), base_model="some/model", size=9):
    """A concept of one layer, all of whose numbers are `number`."""
    path = Path(folder) / f"{name}.atoms.safetensors"
    delta = ConceptFile(
        config=AtomConfig(channel_block=1, target_modules=["conv_in"]),
        layers={
            "unet.conv_in": {"atom_delta": torch.full((9, size), float(number)), "atom_basis": torch.zeros(9, size)}
        },
        fingerprint={"unet.conv_in": [3.0, 1.0]},
        tokens={word: {"text_encoder": torch.full((4,), float(number))} for word in words},
        base_model=base_model,
        trigger_phrase=phrase,
    )
    write_concept_file(path, delta)
    return path


def number_in(delta):
    return delta.layers["unet.conv_in"]["atom_delta"][0, 0].item()


def rewrite_header(path, change):
    """Change the header of a file, as a dict of JSON or as bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + size]))
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def rewrite_metadata(path, **values):
    rewrite_header(path, lambda header: {**header, "__metadata__": {**header["__metadata__"], **values}})


class Reads:
    """Counts reads of a function that takes a path first, and can make them wait."""

    def __init__(self, monkeypatch, function):
        self.done = Counter()
        self.now = Counter()
        self.overlaps = 0
        self.before = lambda name: None
        self.after = lambda name: None
        self._lock = threading.Lock()
        module = library_module if hasattr(library_module, function) else library_index
        read = getattr(module, function)

        def counted(path):
            name = Path(path).name.partition(".")[0]
            with self._lock:
                self.done[name] += 1
                self.now[name] += 1
                self.overlaps += self.now[name] > 1
            try:
                self.before(name)
                value = read(path)
                self.after(name)
                return value
            finally:
                with self._lock:
                    self.now[name] -= 1

        monkeypatch.setattr(module, function, counted)


@pytest.fixture
def reads(monkeypatch):
    return Reads(monkeypatch, "read_concept_file")


@pytest.fixture
def headers(monkeypatch):
    return Reads(monkeypatch, "read_header")


@pytest.fixture
def three(tmp_path):
    """A folder with three concepts."""
    for number, name in enumerate(("ant", "bee", "cat")):
        write(tmp_path, name, number, f"a photo of sks {name}")
    return tmp_path


# ---------------------------------------------------------------------------------------------------------- the index


def test_names_are_paths_without_the_ending_and_other_files_are_left_out(tmp_path):
    for name in ("mug", "animals/cat", "animals/wild/cat"):
        write(tmp_path, name)
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    for name in ("mug.atoms.safetensors.partial", "notes.txt", ".hidden.atoms.safetensors"):
        (tmp_path / name).write_bytes(b"no concept")
    write(tmp_path, ".trash/old")
    library = atomdiff.ConceptLibrary(tmp_path)
    assert list(library) == ["animals/cat", "animals/wild/cat", "mug"] and len(library) == 3
    assert "animals/cat" in library and "cat" not in library and not library.damaged


def test_lora_files_are_listed_and_loaded_by_their_path(tmp_path, tiny_pipe):
    write(tmp_path, "cat")
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
    write(tmp_path, unicodedata.normalize("NFD", "müll"))
    library = ConceptLibrary(tmp_path)
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "müll")
        assert name in library and library[name] is library["müll"]


def test_info_comes_from_the_header(tmp_path, reads):
    path = write(tmp_path, "animals/cat", phrase="zwx Katze", words=("zwx", "a.b"), base_model="/some/where")
    info = ConceptLibrary(tmp_path).info("animals/cat")
    assert (info.name, info.path, info.trigger_phrase) == ("animals/cat", path, "zwx Katze")
    assert info.trigger_words == ("a.b", "zwx") and info.base_model == "/some/where"
    assert (info.size, info.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert not reads.done


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
        write(tmp_path, name, phrase=text)
    write(tmp_path, "e", phrase="Straße", words=("zwx", "<cat-toy>"))
    assert ConceptLibrary(tmp_path).find(phrase) == found


def test_links_to_files_are_followed_and_those_to_folders_are_not(tmp_path):
    target = write(tmp_path / "store", "blob", 5.0)
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


# ---------------------------------------------------------------------------------------------- what changes on disk


def test_a_new_file_is_found_by_its_name_and_its_phrase_without_being_announced(three):
    library = ConceptLibrary(three)
    write(three, "dog", 3, "sks dog")
    assert "dog" not in library
    assert number_in(library["dog"]) == 3 and "dog" in library
    write(three, "new/elk", 4, "sks elk")
    assert library.find("elk") == ["new/elk"]
    write(three, "fox", 5)
    assert library.info("fox").name == "fox"


def test_an_unknown_name_is_answered_with_near_ones(three):
    write(three, "insects/moth")
    library = ConceptLibrary(three)
    for name, hint in (("bees", "bee"), ("moth", "insects/moth"), ("ant.atoms.safetensors", "ant")):
        with pytest.raises(UserError, match=f"no concept '{name}' among the 4 in .*near: {hint}\\b"):
            library[name]
    with pytest.raises(UserError, match="and none of a similar name"):
        library.info("zzzzzz")


def test_refresh_reads_the_headers_of_new_and_changed_files_only(three, headers):
    library = ConceptLibrary(three)
    assert headers.done == {"ant": 1, "bee": 1, "cat": 1}
    old = {name: library.info(name) for name in library}
    library.refresh()
    write(three, "bee", phrase="sks wasp")
    write(three, "dog")
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


def test_a_changed_file_is_read_again_even_with_the_size_and_time_of_the_old_one(three):
    library = ConceptLibrary(three)
    old, ant, before = library["bee"], library["ant"], (three / "bee.atoms.safetensors").stat()
    path = write(three, "bee", 7, "a photo of sks bee")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert library["bee"] is old  # nobody has looked
    library.refresh()
    assert number_in(library["bee"]) == 7 and number_in(old) == 1
    assert library["ant"] is ant


def test_a_removed_concept_takes_no_memory(three):
    library = ConceptLibrary(three)
    for name in library:
        library[name]
    three_held = library.memory_used
    (three / "bee.atoms.safetensors").unlink()
    library.refresh()
    assert 0 < library.memory_used < three_held
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
        write(three, "bee", 8)
        library.refresh()

    reads.after = replace
    assert number_in(library["bee"]) == 1
    assert number_in(library["bee"]) == 8


# ------------------------------------------------------------------------------------------------------ damaged files


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
    "a later version": lambda path: rewrite_metadata(path, format_version="2"),
    "bare tensors": lambda path: save_file({"x": torch.zeros(2)}, path),
    "a thousand words": lambda path: save_file(
        {f"token.{number}": torch.zeros(1) for number in range(1000)},
        path,
        {"format": "atomdiff", "format_version": "1"},
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_listed_warned_of_once_and_welcome_when_mended(three, damage, user_warnings):
    path = write(three, "dog", 3)
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
        write(three, "dog", 3)
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
    write(three, "locked/dog", 3)
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


def test_a_file_damaged_behind_its_header_is_refused_when_it_is_read(three):
    write(three, "dog", 3)
    data = (three / "dog.atoms.safetensors").read_bytes()
    (three / "dog.atoms.safetensors").write_bytes(data[:-2] + b"\x00\x7e")  # not a number
    library = ConceptLibrary(three)
    for _ in range(2):
        with pytest.raises(UserError, match="dog.*not finite"):
            library["dog"]
    assert number_in(library["cat"]) == 2 and not library._reading


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_is_in_a_file_the_index_holds(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    path = write(folder, "x", phrase="sks mug")
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


# ------------------------------------------------------------------------------------------------------------- memory


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
    write(three, "whale", size=10_000)  # 360 KB
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


# ------------------------------------------------------------------------------------------------------------ threads


def in_threads(count, work):
    """Results of `work(number)` from as many threads, all let loose at once."""
    start = threading.Barrier(count)

    def run(number):
        start.wait(SECONDS)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(SECONDS) for future in [pool.submit(run, number) for number in range(count)]]


def test_threads_get_right_concepts_while_files_come_and_go(tmp_path, reads):
    for number in range(40):
        write(tmp_path, f"c{number}", number)
    library = ConceptLibrary(tmp_path)
    library["c0"]
    library = ConceptLibrary(tmp_path, 10 * library.memory_used)
    reads.before = lambda name: time.sleep(0.001)

    def work(thread):
        chance = random.Random(thread)
        for step in range(150):
            number = chance.randrange(40)
            assert number_in(library[f"c{number}"]) == number
            assert library.memory_used <= library.memory_budget
            if step % 50 == thread % 50:
                write(tmp_path, f"c{thread}", thread)  # of two that write one file at once, one fails
                write(tmp_path, f"new{thread}-{step}", thread)
                assert number_in(library[f"new{thread}-{step}"]) == thread
        return True

    assert all(in_threads(8, work))
    assert not library._reading
    assert library.memory_used == sum(map(_memory, library._cache.values()))


def test_one_of_many_threads_reads_and_all_get_what_it_read(three, reads):
    library = ConceptLibrary(three)
    reads.before = lambda name: time.sleep(0.1)
    found = in_threads(16, lambda number: library["bee"])
    assert reads.done == {"bee": 1} and all(delta is found[0] for delta in found)


def test_even_what_is_not_kept_is_never_read_twice_at_once(three, reads):
    library = ConceptLibrary(three, memory_budget=0)
    reads.before = lambda name: time.sleep(0.01)
    in_threads(8, lambda number: [number_in(library[name]) for name in ("ant", "bee", "cat") * 3])
    assert reads.overlaps == 0 and sum(reads.done.values()) < 8 * 9


def test_nobody_waits_for_a_file_that_another_thread_reads(three, reads):
    library = ConceptLibrary(three)
    ant, begun, go_on = library["ant"], threading.Event(), threading.Event()

    def slow(name):
        if name == "bee":
            begun.set()
            assert go_on.wait(SECONDS)

    reads.before = slow
    with ThreadPoolExecutor(2) as pool:
        bee = pool.submit(library.__getitem__, "bee")
        assert begun.wait(SECONDS)
        try:
            write(three, "dog", 3, "sks dog")
            others = pool.submit(lambda: (library["ant"], library["cat"], library["dog"], library.find("dog")))
            found = others.result(SECONDS)
        finally:
            go_on.set()
        assert number_in(bee.result(SECONDS)) == 1
    assert found[0] is ant and number_in(found[1]) == 2 and number_in(found[2]) == 3 and found[3] == ["dog"]


def test_nobody_waits_for_a_look_at_the_folder(three, headers):
    library = ConceptLibrary(three)
    bee, begun, go_on = library["bee"], threading.Event(), threading.Event()

    def slow(name):
        begun.set()
        assert go_on.wait(SECONDS)

    headers.before = slow
    write(three, "dog", 3)
    with ThreadPoolExecutor(2) as pool:
        looking = pool.submit(library.refresh)
        assert begun.wait(SECONDS)
        try:
            known = pool.submit(lambda: (library["bee"], library["cat"], list(library), library.find("cat")))
            found = known.result(SECONDS)
        finally:
            go_on.set()
        looking.result(SECONDS)
    assert found[0] is bee and number_in(found[1]) == 2
    assert found[2] == ["ant", "bee", "cat"] and found[3] == ["cat"] and "dog" in library


def test_a_read_that_fails_fails_for_all_who_wait_and_for_none_after(three, reads):
    library = ConceptLibrary(three)
    path = three / "bee.atoms.safetensors"
    shutil.copy(path, three / "kept")
    path.unlink()
    reads.before = lambda name: time.sleep(0.02)

    def work(number):
        with pytest.raises(UserError, match="bee"):
            library["bee"]

    in_threads(6, work)
    assert not library._reading and reads.overlaps == 0
    shutil.copy(three / "kept", path)
    assert number_in(library["bee"]) == 1


def test_what_the_library_gives_is_what_the_file_holds(three):
    library = ConceptLibrary(three)
    for name in library:
        delta, read = library[name], read_concept_file(library.info(name).path)
        assert delta.config == read.config and delta.fingerprint == read.fingerprint
        assert torch.equal(delta.tokens["sks"]["text_encoder"], read.tokens["sks"]["text_encoder"])
