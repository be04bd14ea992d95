import multiprocessing
import os
from contextlib import nullcontext

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atomdiff.utils import tensor_cache
from atomdiff.utils.tensor_cache import DiskCache, content_key, quick_key, tensors_key, weights_key

MADE = {"mean": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}
KEY = content_key("some", 1)


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
    other = DiskCache(file.parent)._file(content_key("other"))
    DiskCache(file.parent).get(content_key("other"), lambda: MADE)
    os.replace(other, file)


def another_shape(file):
    tensors = load_file(file)
    tensors["mean"] = tensors["mean"].reshape(3, 2)
    save_file(tensors, file, {"content": content_key(KEY, tensors_key(MADE))})


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
    whole = file.read_bytes()
    damage(file)
    with pytest.warns(UserWarning, match=f"{file.name}: damaged") if file.exists() else nullcontext():
        found, made = get(cache)
    assert made and same(found, MADE)
    assert file.read_bytes() == whole and list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_made_leaves_nothing_behind(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        DiskCache(tmp_path).get(KEY, stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", ["cannot be", "is full"])
def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, write, monkeypatch):
    folder = tmp_path / "file"
    if write == "cannot be":
        folder.write_text("in the way")
    else:
        full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        monkeypatch.setattr(tensor_cache, "save_file", lambda *_: (_ for _ in ()).throw(full))
    with pytest.warns(
        UserWarning, match=r"file: cannot be written \((No space|File exists).*another --cache_dir"
    ) as told:
        found, made = get(DiskCache(folder))
        get(DiskCache(folder))
    assert made and same(found, MADE)
    assert len({str(each.message) for each in told}) == 1
    assert folder.is_file() or not list(folder.iterdir())


def fill(folder, rounds):
    for number in range(rounds):
        tensors = {"a": torch.full((1000,), float(number))}
        found = DiskCache(folder).get(content_key(number), lambda tensors=tensors: tensors)
        assert torch.equal(found["a"], tensors["a"])


def test_processes_may_share_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(tmp_path, 20)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted(content_key(number) for number in range(20))


def test_keys_tell_all_contents_apart():
    keys = [
        content_key("a", "b"),
        content_key("ab"),
        content_key(b"ab"),
        content_key("b", "a"),
        content_key("1"),
        content_key(1),
        tensors_key({"a": torch.zeros(2)}),
        tensors_key({"b": torch.zeros(2)}),
        tensors_key({"a": torch.zeros(2, 1)}),
        tensors_key({"a": torch.zeros(2, dtype=torch.int32)}),
    ]
    assert len(set(keys)) == len(keys)
    assert content_key("a", "b") == keys[0]


def bits(*numbers):
    return torch.tensor(numbers, dtype=torch.int64).view(torch.float32)


def test_quick_keys_tell_every_number():
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(64, 32, 3, 3, generator=random), torch.randn(64, generator=random)
    keys = [quick_key([weight, bias])]
    assert quick_key([weight.clone().to(memory_format=torch.channels_last), bias.clone()]) == keys[0]
    keys.append(quick_key([bias, weight]))
    for place in (0, 777, 18431):  # first, within, last
        other = weight.clone()
        other.view(-1)[place] *= 1 + 2**-20
        keys.append(quick_key([other, bias]))
    keys += [quick_key([weight]), quick_key([weight.view(32, 64, 3, 3), bias]), quick_key([weight, bias.bfloat16()])]
    keys += [quick_key([bits(1, 2)]), quick_key([bits(2, 1)]), quick_key([bits(1, 1)])]
    half = torch.ones(3, dtype=torch.bfloat16)  # not a whole number of 8 bytes
    keys += [quick_key([half]), quick_key([half * 2]), quick_key([half[0]]), quick_key([half[:0]]), quick_key([])]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("second", [5, 3 + 7 * 1024, 3 + 2 * 512 * 1024])  # in the row, the column, another square
def test_quick_keys_tell_two_signs(second):
    weight = torch.randn(3 * 512 * 1024, generator=torch.Generator().manual_seed(0))
    other = weight.clone()
    other[[3, second]] *= -1  # each the highest bit of a 64-bit word: twice 2^63 is nothing
    assert quick_key([other]) != quick_key([weight])


def test_quick_keys_tell_what_was_swapped():
    random = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 4096, 512, generator=random)
    keys = [quick_key([one, two]), quick_key([two, one])]
    for first, second in ((1, 2), (1, 1 + 512 * 3), (1, 1 + 512 * 1500)):  # in a row, in a column, in two squares
        other = one.clone()
        words = other.view(-1).view(torch.int64)
        words[[first, second]] = words[[second, first]]
        keys.append(quick_key([other, two]))
    assert len(set(keys)) == len(keys)


def test_a_models_key_follows_its_weights_config_and_type(tiny_pipe):
    vae = tiny_pipe.vae
    keys = [weights_key(vae), weights_key(tiny_pipe.text_encoder)]
    assert weights_key(vae) == keys[0]
    vae.register_to_config(_name_or_path="elsewhere")
    assert weights_key(vae) == keys[0]
    vae.register_to_config(scaling_factor=0.5)
    keys.append(weights_key(vae))
    vae.encoder.conv_in.bias.data[0] += 1e-3
    keys.append(weights_key(vae))
    keys.append(weights_key(vae.to(torch.bfloat16)))
    assert len(set(keys)) == 5


def test_what_was_read_is_no_window_onto_the_file(tmp_path):
    cache = DiskCache(tmp_path)
    cache.get("key", lambda: {"x": torch.arange(5000.0)})
    found = cache.get("key", lambda: {})
    (file,) = tmp_path.glob("*.safetensors")
    with open(file, "r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(found["x"], torch.arange(5000.0))
