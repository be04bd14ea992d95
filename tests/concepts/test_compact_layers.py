"""The compact form of files with shared directions: small, exact, told from other bases, and refused where damaged."""

import dataclasses
import json
import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from atomdiff.concepts.compact_layers import reduce_fingerprint
from atomdiff.concepts.compatibility import fingerprint_distance
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file, trained_tensors, write_concept_file
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import MAX_HEADER_BYTES

CONFIG = AtomConfig(share="kind", share_count=2, basis="dct", channel_block=2, target_modules=["conv1", "to_q"])
TABLE = (
    "9x9 4x4 text_encoder.conv1 7,0.5\n"
    "9x9 4x4 unet.down.conv1 9.25,3.502\n"
    "9x9 - unet.mid.conv1 1,0\n"
    "- 4x4 unet.mid.to_q 12.06,1.5\n"
)


def make_concept(**fields):
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator).half().float()

    shared = {(part, name): numbers(2, d, d) for part in ("unet", "text_encoder") for name, d in SIZES.items()}
    layers = {
        module: {f"{n}_mix": numbers(2) for n in names}
        | {f"{n}_shared": shared[module.split(".")[0], n] for n in names}
        for module, names in {
            "unet.mid.to_q": ["channel"],
            "unet.mid.conv1": ["atom"],
            "unet.down.conv1": ["atom", "channel"],
            "text_encoder.conv1": ["atom", "channel"],
        }.items()
    }
    fingerprint = {
        "unet.down.conv1": [9.25, 3.5, 0.125],
        "unet.mid.conv1": [1.0, 0.0],
        "unet.mid.to_q": [12.0625, 1.5],
        "text_encoder.conv1": [7.0, 0.3, 0.4],
    }
    training = {"steps": 3, "config": {"prediction_type": "v", "flow_shift": None, "learning_rate": 0.1}}
    return ConceptFile(
        **{
            "config": CONFIG,
            "layers": layers,
            "fingerprint": fingerprint,
            "tokens": {"sks": {"text_encoder": numbers(5)}},
            "base_model": "some/modèle",
            "trigger_phrase": "sks mug",
            "training": training,
            "modelspec": {"title": "mug", "sai_model_spec": "1.0.1", "trigger_phrase": "sks mug"},
            "atomdiff_version": "0.1",
            **fields,
        }
    )


SIZES = {"atom": 9, "channel": 4}


def rewrite(path, table=None, tensors=None, metadata=None):
    """A valid file with another table (text or bytes), tensors or metadata (None: taken away)."""
    write_concept_file(path, make_concept())
    with safe_open(path, "pt") as file:
        all_metadata = file.metadata() | (metadata or {})
        all_tensors = {key: file.get_tensor(key) for key in file.keys()} | (tensors or {})  # noqa: SIM118
    if table is not None:
        data = zlib.compress(table.encode()) if isinstance(table, str) else table
        all_tensors["layer_table"] = torch.tensor(list(data), dtype=torch.uint8)
    kept = {key: tensor for key, tensor in all_tensors.items() if tensor is not None}
    save_file(kept, path, {key: value for key, value in all_metadata.items() if value is not None})
    return path


def test_what_is_written_is_read(tmp_path):
    concept = make_concept()
    write_concept_file(tmp_path / "a", concept)
    read = read_concept_file(tmp_path / "a")
    assert read.layers.keys() == concept.layers.keys()
    for module, tensors in concept.layers.items():
        assert read.layers[module].keys() == tensors.keys()
        assert all(torch.equal(read.layers[module][kind], tensor) for kind, tensor in tensors.items())
    assert torch.equal(read.tokens["sks"]["text_encoder"], concept.tokens["sks"]["text_encoder"])
    assert len(trained_tensors(read)) == 4 + 6  # directions of each kind, and mixes
    for name in ("base_model", "trigger_phrase", "atomdiff_version"):
        assert getattr(read, name) == getattr(concept, name)
    assert read.config.to_dict() == concept.config.to_dict()
    assert read.training == {"steps": 3, "config": {"prediction_type": "v"}} and read.modelspec == {"title": "mug"}
    write_concept_file(tmp_path / "b", read)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_form_is_the_documented_one(tmp_path):
    concept = make_concept()
    write_concept_file(tmp_path / "a", concept, torch.float32)
    with safe_open(tmp_path / "a", "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert zlib.decompress(bytes(tensors["layer_table"].tolist())).decode() == TABLE
    parts = [
        ("text_encoder.conv1", "atom_shared"),
        ("text_encoder.conv1", "atom_mix"),
        ("text_encoder.conv1", "channel_shared"),
        ("text_encoder.conv1", "channel_mix"),
        ("unet.down.conv1", "atom_shared"),
        ("unet.down.conv1", "atom_mix"),
        ("unet.mid.conv1", "atom_mix"),
        ("unet.down.conv1", "channel_shared"),
        ("unet.down.conv1", "channel_mix"),
        ("unet.mid.to_q", "channel_mix"),
    ]
    expected = torch.cat([concept.layers[module][kind].flatten() for module, kind in parts])
    assert torch.equal(tensors["layer_values"], expected) and tensors.keys() == {
        "layer_table",
        "layer_values",
        "token.sks",
    }
    assert metadata.keys() == {
        "format",
        "format_version",
        "adapter_config",
        "base_model",
        "atomdiff_version",
        "trigger_phrase",
        "training",
        "modelspec.title",
    }
    assert metadata["format_version"] == "2"
    assert json.loads(metadata["adapter_config"]) == {
        "peft_type": "ATOMS",
        "channel_block": 2,
        "basis": "dct",
        "share": "kind",
        "share_count": 2,
        "target_modules": ["conv1", "to_q"],
    }


def test_directions_of_one_size_come_in_the_order_of_their_numbers(tmp_path):
    layers = {
        f"unet.{name}": {
            "atom_mix": torch.full((2,), float(size)),
            "atom_shared": torch.full((2, size, size), 1.0 * size),
        }
        for name, size in (("a", 25), ("b", 9))
    }
    concept = make_concept(layers=layers, fingerprint={"unet.a": [1.0], "unet.b": [1.0]}, tokens={})
    write_concept_file(tmp_path / "a", concept)
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.get_tensor("layer_values")[[0, -1]].tolist() == [9, 25]
    assert read_concept_file(tmp_path / "a").layers["unet.a"]["atom_shared"].shape == (2, 25, 25)


def test_values_that_the_file_cannot_hold_are_named(tmp_path):
    concept = make_concept()
    concept.layers["unet.mid.to_q"]["channel_mix"] = torch.full((2,), 1e6)
    with pytest.raises(UserError, match="cannot save unet.mid.to_q.channel_mix as torch.float16.*float32"):
        write_concept_file(tmp_path / "x", concept)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"", "cut off"),
        (b"xxx", "layer_table: Error"),
        (zlib.compress(TABLE.encode())[:-1], "cut off"),
        (zlib.compress(TABLE.encode()) + b"x", "something behind it"),
        (zlib.compress(b"\xff\n"), "utf-8"),
        (zlib.compress(b"-" * (MAX_HEADER_BYTES + 1)), "more than 4,194,304 bytes"),
        ("", r"layer_values has shape \(\d+,\), and the layers need 0 values"),
        (TABLE + "\n", "has the line ''"),
        (TABLE[:-1], "or no end"),
        (TABLE.replace("- 4x4", "- -"), "has the line '- - unet.mid.to_q"),
        (TABLE.replace("- 4x4", "-"), "has the line"),
        (TABLE.replace("- 4x4", "- 4x0"), "has the line"),
        (TABLE.replace("- 4x4", "- 4x5"), "the layers need"),
        (TABLE.replace("- 4x4", "- 999999x999999"), "the layers need"),
        (TABLE.replace("- 4x4", "- 9999999x9"), "has the line"),
        (TABLE.replace(" unet.mid.to_q", ""), "has the line"),
        (TABLE.replace("unet.mid.to_q", "unet.mid.conv1"), "a layer twice"),
        (TABLE.replace("unet.mid.to_q", "unet.a"), "another order"),
        (TABLE.replace("12.06,1.5", "nan"), "has the line"),
        (TABLE.replace("12.06,1.5", "1e400"), "has the line"),
        (TABLE.replace("12.06,1.5", "1e61"), "has the line"),
        (TABLE.replace("12.06,1.5", "-1"), "has the line"),
        (TABLE.replace("12.06,1.5", "1,2,3"), "has the line"),
        (TABLE.replace("12.06,1.5", "1.2.3"), "could not convert"),
        (TABLE.replace("12.06,1.5", "\u0661"), "has the line"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, table, message):
    with pytest.raises(UserError, match=f"x is damaged: its layers cannot be read: .*{message}") as error:
        read_concept_file(rewrite(tmp_path / "x", table))
    assert len(str(error.value)) < len(str(tmp_path)) + 500


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layer_values": None}, "layer_values is missing"),
        ({"layer_table": None}, "layer_table is missing"),
        ({"layer_values": torch.zeros(3)}, r"layer_values has shape \(3,\)"),
        ({"layer_table": torch.zeros(2, 2, dtype=torch.uint8)}, r"layer_table has shape \(2, 2\)"),
        ({"unet.conv_in.atom_mix": torch.zeros(2)}, "unet.conv_in.atom_mix is missing, or has no place"),
        ({"unet.shared.atom_mix.9x9": torch.zeros(2, 2)}, "unet.shared.atom_mix.9x9 is missing, or has no place"),
        ({"layer_values": torch.full((3,), math.nan)}, "layer_values holds values that are not finite"),
        ({"layer_values": torch.zeros(3, dtype=torch.int8)}, r"'layer_values' \(I8\), which this atomdiff does not"),
        ({"layer_table": torch.zeros(3)}, r"'layer_table' \(F32\), which this atomdiff does not know: update it"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        read_concept_file(rewrite(tmp_path / "x", tensors=tensors))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "1"}, "settings of format version '2' and says that its version is '1'"),
        ({"adapter_config": '{"peft_type": "ATOMS", "share": "kind", "basis": "dct"}'}, "the layers need"),  # 4
        ({"adapter_config": '{"peft_type": "ATOMS", "pruned": true}'}, "no valid base_fingerprint"),
        ({"training": None}, "no valid training"),
    ],
)
def test_wrong_metadata_is_named(tmp_path, metadata, message):
    with pytest.raises(UserError, match=message):
        read_concept_file(rewrite(tmp_path / "x", metadata=metadata))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_files_give_one_clear_error_or_finite_numbers(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x"
    write_concept_file(path, make_concept())
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    noise = data.draw(st.binary(max_size=8))
    path.write_bytes(whole[:start] + noise + whole[start + len(noise) :] if noise else whole[:start])
    try:
        concept = read_concept_file(path)
    except UserError as error:
        assert "x" in str(error)
    else:
        assert all(tensor.isfinite().all() for tensors in concept.layers.values() for tensor in tensors.values())


def test_a_damaged_byte_of_the_table_is_noticed(tmp_path):
    path = tmp_path / "x"
    write_concept_file(path, make_concept())
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        size = file.get_slice("layer_table").get_shape()[0]
    for place in range(len(whole) - size, len(whole)):  # bytes come behind numbers
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="is damaged: its layers cannot be read: .*copy or download it again"):
            read_concept_file(path)


def test_reduced_fingerprints_are_compared_with_whole_ones():
    one, other = {"a": [4.0, 3.0, 2.0, 1.0], "b": [5.0]}, {"a": [4.0, 2.0, 2.0, 2.0], "b": [4.0]}
    reduced = {module: reduce_fingerprint(values) for module, values in one.items()}
    assert reduced == {"a": [4.0, pytest.approx(14**0.5)], "b": [5.0]}
    assert reduce_fingerprint(reduced["a"]) == reduced["a"]
    whole = fingerprint_distance(one, other)
    found = fingerprint_distance(reduced, other)
    assert 0 < found < whole and found == fingerprint_distance(other, reduced)
    assert found == pytest.approx(((14**0.5 - 12**0.5) / 30**0.5 + 1 / 5) / 2)
    assert fingerprint_distance(reduced, one) == fingerprint_distance(reduced, reduced) == 0
    assert fingerprint_distance({"a": [1.0, 2.0, 3.0]}, one) == math.inf


def test_directions_that_differ_are_refused(tmp_path):
    concept = make_concept()
    tensors = concept.layers["unet.mid.conv1"]
    layers = concept.layers | {"unet.mid.conv1": {kind: 2 * tensor for kind, tensor in tensors.items()}}
    with pytest.raises(UserError, match="unet.mid.conv1 has other directions than the layers of its kind"):
        write_concept_file(tmp_path / "x", dataclasses.replace(concept, layers=layers))
