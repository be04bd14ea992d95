import hashlib
import os

import torch

from atomdiff.utils.hashing import hash_file, hash_listing, hash_model, hash_tensors, hash_values, quick_hash


def test_keys_tell_all_contents_apart():
    keys = [
        hash_values("a", "b"),
        hash_values("ab"),
        hash_values(b"ab"),
        hash_values("b", "a"),
        hash_values("1"),
        hash_values(1),
        hash_tensors({"a": torch.zeros(2)}),
        hash_tensors({"b": torch.zeros(2)}),
        hash_tensors({"a": torch.zeros(2, 1)}),
        hash_tensors({"a": torch.zeros(2, dtype=torch.int32)}),
    ]
    assert len(set(keys)) == len(keys)
    assert hash_values("a", "b") == keys[0]


def bits(*numbers):
    return torch.tensor(numbers, dtype=torch.int64).view(torch.float32)


def test_quick_keys_tell_every_number():
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(64, 32, 3, 3, generator=random), torch.randn(64, generator=random)
    keys = [quick_hash([weight, bias])]
    assert quick_hash([weight.clone().to(memory_format=torch.channels_last), bias.clone()]) == keys[0]
    keys.append(quick_hash([bias, weight]))
    for index in (0, 777, 18431):  # first, within, last
        other = weight.clone()
        other.view(-1)[index] *= 1 + 2**-20
        keys.append(quick_hash([other, bias]))
    keys += [quick_hash([weight]), quick_hash([weight.view(32, 64, 3, 3), bias]), quick_hash([weight, bias.bfloat16()])]
    keys += [quick_hash([bits(1, 2)]), quick_hash([bits(2, 1)]), quick_hash([bits(1, 1)])]
    half = torch.ones(3, dtype=torch.bfloat16)  # not a whole number of 8 bytes
    keys += [quick_hash([half]), quick_hash([half * 2]), quick_hash([half[0]]), quick_hash([half[:0]]), quick_hash([])]
    assert len(set(keys)) == len(keys)


def test_a_models_key_follows_its_weights_config_and_type(tiny_pipe):
    vae = tiny_pipe.vae
    keys = [hash_model(vae), hash_model(tiny_pipe.text_encoder)]
    assert hash_model(vae) == keys[0]
    vae.register_to_config(_name_or_path="elsewhere")
    assert hash_model(vae) == keys[0]
    vae.register_to_config(scaling_factor=0.5)
    keys.append(hash_model(vae))
    vae.encoder.conv_in.bias.data[0] += 1e-3
    keys.append(hash_model(vae))
    keys.append(hash_model(vae.to(torch.bfloat16)))
    assert len(set(keys)) == 5


def test_hashes_follow_content_and_listing(tmp_path):
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner" / "file"
    file.write_bytes(b"12")
    os.utime(file, ns=(0, 10**18))
    folder, alone, listing = hash_file(tmp_path), hash_file(file), hash_listing(tmp_path)
    listing_alone = hash_listing(file)
    assert alone == hashlib.sha256(b"12").hexdigest()  # as sha256sum has it, whatever the file is called
    os.utime(file, ns=(0, 2 * 10**18))
    assert (hash_file(tmp_path), hash_file(file)) == (folder, alone)
    assert hash_listing(tmp_path) != listing and hash_listing(file) != listing_alone
    file.write_bytes(b"34")
    os.utime(file, ns=(0, 10**18))
    assert hash_file(tmp_path) != folder and hash_file(file) != alone
    assert hash_listing(tmp_path) == listing
