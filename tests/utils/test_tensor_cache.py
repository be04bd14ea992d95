import multiprocessing
import os
from contextlib import nullcontext

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atomdiff.utils import tensor_cache
from atomdiff.utils.hashing import hash_tensors, hash_values
from atomdiff.utils.tensor_cache import DiskCache

MADE = {"mean": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}
KEY = hash_values("some", 1)


def get(cache, made=MADE):
    """What the cache answers, and whether it had to be made."""
    calls = []
    found = cache.get(KEY, lambda: calls.append(1) or made)
    return found, bool(calls)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_was_made_once_is_read_ever_after(tmp_path):
    found, made = get(DiskCache(tmp_path / "new" / "folder"))
    assert made and same(found, MADE)
    found, made = get(DiskCache(tmp_path / "new" / "folder"), made={})
    assert not made and same(found, MADE) and found["half"].dtype == torch.bfloat16
    assert [file.suffix for file in (tmp_path / "new" / "folder").iterdir()] == [".safetensors"]


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


def another_key(file):
    other = DiskCache(file.parent)._file(hash_values("other"))
    DiskCache(file.parent).get(hash_values("other"), lambda: MADE)
    os.replace(other, file)


def another_shape(file):
    tensors = load_file(file)
    tensors["mean"] = tensors["mean"].reshape(3, 2)
    save_file(tensors, file, {"content": hash_values(KEY, hash_tensors(MADE))})


def no_metadata(file):
    save_file(MADE, file)


def huge_header(file):
    file.write_bytes(b"\xff" * 64)


@pytest.mark.parametrize(
    "damage", [cut_off, flip_a_bit, empty, another_key, another_shape, no_metadata, huge_header, os.remove]
)
def test_files_that_are_not_what_was_written_are_made_anew(tmp_path, damage):
    cache = DiskCache(tmp_path)
    get(cache)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    damage(file)
    with pytest.warns(UserWarning, match=f"{file.name}: damaged") if file.exists() else nullcontext():
        found, made = get(cache)
    assert made and same(found, MADE)
    assert file.read_bytes() == content and list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_made_leaves_nothing_behind(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DiskCache(tmp_path).get(KEY, stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", ["cannot be", "is full"])
def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, write, monkeypatch, user_warnings):
    folder = tmp_path / "file"
    if write == "cannot be":
        folder.write_text("in the way")
    else:
        full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        monkeypatch.setattr(tensor_cache, "save_file", lambda *_: (_ for _ in ()).throw(full))
    with pytest.warns(
        UserWarning, match=r"file: cannot be written \((No space|File exists).*another --cache_dir"
    ) as recorded:
        found, made = get(DiskCache(folder))
        get(DiskCache(folder))
    assert made and same(found, MADE)
    assert len({str(each.message) for each in user_warnings(recorded)}) == 1
    assert folder.is_file() or not list(folder.iterdir())


def fill(folder, rounds):
    for number in range(rounds):
        tensors = {"a": torch.full((1000,), float(number))}
        found = DiskCache(folder).get(hash_values(number), lambda tensors=tensors: tensors)
        assert torch.equal(found["a"], tensors["a"])


def test_processes_may_share_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(tmp_path, 20)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted(hash_values(number) for number in range(20))


def test_what_was_read_is_no_window_onto_the_file(tmp_path):
    cache = DiskCache(tmp_path)
    cache.get("key", lambda: {"x": torch.arange(5000.0)})
    found = cache.get("key", lambda: {})
    (file,) = tmp_path.glob("*.safetensors")
    with open(file, "r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(found["x"], torch.arange(5000.0))
