"""A library in many threads: each file is read once, and nobody waits for a file of others."""

import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from atomdiff.concepts.library import ConceptLibrary, _memory
from atomdiff.utils.errors import UserError
from tests.concepts.library_files import SECONDS, number_in, write_concept


def in_threads(count, work):
    """Results of `work(number)` from as many threads, all let loose at once."""
    start = threading.Barrier(count)

    def run(number):
        start.wait(SECONDS)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(SECONDS) for future in [pool.submit(run, number) for number in range(count)]]


@pytest.mark.slow
def test_threads_get_right_concepts_while_files_come_and_go(tmp_path, reads):
    for number in range(40):
        write_concept(tmp_path, f"c{number}", number)
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
                write_concept(tmp_path, f"c{thread}", thread)  # of two that write one file at once, one fails
                write_concept(tmp_path, f"new{thread}-{step}", thread)
                assert number_in(library[f"new{thread}-{step}"]) == thread
        return True

    assert all(in_threads(8, work))
    assert not library._reading
    assert library.memory_used == sum(map(_memory, library._cache.values()))


def test_one_of_many_threads_reads_and_all_get_what_it_read(three, reads):
    library = ConceptLibrary(three)
    reads.before = lambda name: time.sleep(0.1)
    found = in_threads(16, lambda number: library["bee"])
    assert reads.done == {"bee": 1} and all(each is found[0] for each in found)


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
            write_concept(three, "dog", 3, "sks dog")
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
    write_concept(three, "dog", 3)
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
