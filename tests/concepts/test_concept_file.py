"""The concept file holds what it was given, always in the same bytes, and nothing broken is read."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from atomdiff.atoms.basis import dct_atoms
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file, read_header, write_concept_file
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import printable

CONFIG = AtomConfig(channel_block=2, target_modules=["b", "a"])


def make_concept(**fields):
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    conv = {"atom_delta": numbers(9, 9), "atom_basis": dct_atoms((3, 3), 9)}
    channels = {"channel_delta": numbers(4, 4), "channel_basis": dct_atoms((2, 2), 4)}
    return ConceptFile(
        **{
            "config": CONFIG,
            "layers": {"unet.down.conv1": conv | channels, "unet.mid.to_q": dict(channels)},
            "fingerprint": {"unet.down.conv1": [9.25, 3.5, 0.125], "unet.mid.to_q": [12.0625, 1.5]},
            "tokens": {
                "sks": {"text_encoder": numbers(5)},
                "a.b": {"text_encoder": numbers(5), "text_encoder_2": numbers(7)},
            },
            "base_model": "some/modèle",
            "trigger_phrase": "a photo of sks mug",
            "training": {"steps": 3, "seed": 0, "learning_rate": 0.01},
            "modelspec": {"title": "mug", "date": "2026-01-01"},
            "atomdiff_version": "0.1",
            **fields,
        }
    )


def write(path, metadata=None, tensors=None):
    """A valid file with other metadata or tensors (None: taken away)."""
    write_concept_file(path, make_concept(), torch.float32)
    with safe_open(path, "pt") as file:
        all_metadata = {**file.metadata(), **(metadata or {})}
        all_tensors = {**{key: file.get_tensor(key) for key in file.keys()}, **(tensors or {})}  # noqa: SIM118
    kept = {key: tensor for key, tensor in all_tensors.items() if tensor is not None}
    save_file(kept, path, {key: value for key, value in all_metadata.items() if value is not None})
    return path


def test_what_is_written_is_read(tmp_path):
    concept = make_concept()
    write_concept_file(tmp_path / "new folder" / "mug.atoms.safetensors", concept, torch.float32)
    read = read_concept_file(tmp_path / "new folder" / "mug.atoms.safetensors")
    for name in ("fingerprint", "base_model", "trigger_phrase", "training", "modelspec", "atomdiff_version"):
        assert getattr(read, name) == getattr(concept, name)
    assert read.config.to_dict() == concept.config.to_dict()
    for stored, given_tensors in ((read.layers, concept.layers), (read.tokens, concept.tokens)):
        assert stored.keys() == given_tensors.keys()
        for key, tensors in given_tensors.items():
            assert stored[key].keys() == tensors.keys()
            assert all(torch.equal(stored[key][kind], tensor) for kind, tensor in tensors.items())


def test_keys_and_metadata_are_the_documented_ones(tmp_path):
    path = tmp_path / "mug.atoms.safetensors"
    write_concept_file(path, make_concept())
    with safe_open(path, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        assert {file.get_tensor(key).dtype for key in keys} == {torch.float16}
    kinds = ("atom_delta", "atom_basis", "channel_delta", "channel_basis")
    layers = {f"unet.down.conv1.{kind}" for kind in kinds} | {f"unet.mid.to_q.{kind}" for kind in kinds[2:]}
    assert keys == layers | {"token.sks", "token.a.b", "token.a.b.text_encoder_2"}
    assert metadata["format"] == "atomdiff" and metadata["format_version"] == "1"
    assert json.loads(metadata["adapter_config"]) == {
        "peft_type": "ATOMS",
        "num_atoms": None,
        "channel_block": 2,
        "channel_block_pattern": {},
        "joint": False,
        "recursion": None,
        "basis": "svd",
        "sparsity": 0.001,
        "seed": 0,
        "target_modules": ["a", "b"],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    assert json.loads(metadata["training"])["steps"] == 3 and metadata["modelspec.title"] == "mug"


def test_same_input_same_bytes(tmp_path):
    many = AtomConfig(channel_block=2)
    many.target_modules = {"b", "a"}  # as PEFT leaves a long list
    for name, config in (("a", CONFIG), ("b", many)):
        write_concept_file(tmp_path / name, make_concept(config=config))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    metadata = (tmp_path / "a").read_bytes()[8:]
    assert re.findall(rb'"(modelspec\.\w+)":', metadata) == [b"modelspec.date", b"modelspec.title"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_the_file_cannot_hold_is_not_written(tmp_path, value):
    concept = make_concept()
    concept.layers["unet.mid.to_q"]["channel_delta"] = torch.full((4, 4), value)
    with pytest.raises(UserError, match="unet.mid.to_q.channel_delta as torch.float16.*float32"):
        write_concept_file(tmp_path / "x", concept)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": None}, "not an atomdiff file"),
        ({"format": "pt"}, "not an atomdiff file: its format is 'pt'"),
        ({"format_version": "3"}, "format version '3'; this atomdiff reads versions '1' and '2': update"),
        ({"format_version": "2"}, "settings of format version '1' and says that its version is '2'"),
        ({"adapter_config": '{"peft_type": "ATOMS", "pruned": true}'}, "of format version '2' and says .* is '1'"),
        ({"adapter_config": None}, "no valid adapter_config"),
        ({"adapter_config": "{"}, "no valid adapter_config"),
        ({"adapter_config": "[]"}, "not a JSON object"),
        ({"adapter_config": "[" * 100_000}, "no valid adapter_config"),
        ({"adapter_config": '{"peft_type": "LORA"}'}, "settings that this atomdiff does not know"),
        ({"adapter_config": '{"peft_type": "ATOMS", "rank": 2}'}, "does not know .rank"),
        ({"adapter_config": '{"peft_type": "ATOMS", "basis": "x"}'}, "settings are not valid: basis='x'"),
        ({"base_fingerprint": None}, "no valid base_fingerprint"),
        ({"base_fingerprint": "{}"}, "not one list of numbers for each layer"),
        ({"base_fingerprint": '{"unet.down.conv1": [NaN], "unet.mid.to_q": [1]}'}, "not one list of numbers"),
        ({"training": "none"}, "no valid training"),
        ({"training": '{"a": 1, "a": 2}'}, "no valid training in its metadata: a key appears twice"),
        ({"training": '{"a": "\\ud800"}'}, "no valid training"),
        ({"base_fingerprint": f'{{"unet.down.conv1": [{10**400}], "unet.mid.to_q": [1]}}'}, "not one list of numbers"),
        ({"adapter_config": '{"peft_type": "ATOMS", "joint": 1}'}, "joint=1: expected true or false"),
        ({"adapter_config": '{"peft_type": "ATOMS", "target_modules": [1]}'}, "expected a name or a list of names"),
        (
            {"adapter_config": '{"peft_type": "ATOMS", "channel_block_pattern": {"(a+)+b": 2}}'},
            r"such as '\(a\+\)\+b' would take too long to match",
        ),
    ],
)
def test_wrong_metadata_is_named(tmp_path, metadata, message):
    with pytest.raises(UserError, match=message):
        read_concept_file(write(tmp_path / "x", metadata))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"unet.mid.to_q.channel_delta": torch.full((4, 4), float("nan"))}, "channel_delta holds values.*not finite"),
        ({"unet.mid.to_q.channel_delta": torch.zeros(4, 4, dtype=torch.int8)}, r"channel_delta. \(I8\)"),
        ({"unet.mid.to_q.channel_delta": torch.full((4, 4), 1e300, dtype=torch.float64)}, "not finite"),
        ({"token.sks": torch.zeros(5, dtype=torch.int64)}, r"'token.sks' \(I64\)"),
        ({"unet.mid.to_q.lora_down": torch.zeros(4, 4)}, "holds 'unet.mid.to_q.lora_down'.*update"),
        (
            {"unet.mid.to_q.channel_delta": None, "unet.mid.to_q.channel_basis": None},
            "not one list of numbers for each",
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        read_concept_file(write(tmp_path / "x", tensors=tensors))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_files_give_one_clear_error_or_the_same_numbers(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x"
    write_concept_file(path, make_concept())
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:start]
    else:
        noise = data.draw(st.binary(min_size=1, max_size=8))
        damaged = whole[:start] + noise + whole[start + len(noise) :]
    path.write_bytes(damaged)
    try:
        concept = read_concept_file(path)
    except UserError as error:
        assert "x" in str(error)
    else:
        tensors = [
            tensor for kinds in [*concept.layers.values(), *concept.tokens.values()] for tensor in kinds.values()
        ]
        assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_the_header_is_read_alone(tmp_path):
    path = tmp_path / "mug.atoms.safetensors"
    write_concept_file(path, make_concept())
    metadata, dtypes = read_header(path)
    assert metadata["trigger_phrase"] == "a photo of sks mug"
    assert set(dtypes.values()) == {"F16"} and dtypes.keys() >= {"token.sks", "unet.mid.to_q.channel_delta"}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="its header does not fit its contents; copy or download it again"):
        read_header(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not an atomdiff file: its format is None"):
        read_header(path)
    with pytest.raises(UserError, match="nothing is not a file; expected a concept file"):
        read_header(tmp_path / "nothing")


def test_what_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    many = {f"word{i}": {"text_encoder": torch.zeros(5)} for i in range(65)}
    with pytest.raises(UserError, match=r"65 trigger words \(word0, word1, word10 and 62 more\); .* at most 64"):
        write_concept_file(tmp_path / "x", make_concept(tokens=many))
    monkeypatch.setattr("atomdiff.concepts.concept_file.MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="the concept would take .* bytes, expected at most 1,000"):
        write_concept_file(tmp_path / "x", make_concept())
    assert not list(tmp_path.iterdir())


def test_messages_stay_short_and_leave_a_terminal_alone():
    assert printable("unet.conv_in") == "unet.conv_in" and printable("a\x1b[2J") == r"'a\x1b[2J'"
    assert printable("x" * 10**6) == "x" * 300 + "..."


def test_a_folder_is_refused_with_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="is a folder; expected a concept file"):
        read_concept_file(tmp_path)


def test_files_from_before_a_setting_existed_keep_loading(tmp_path):
    first = {"peft_type": "ATOMS", "num_atoms": None, "channel_block": 2, "channel_block_pattern": {}, "basis": "svd"}
    first |= {"target_modules": ["a", "b"], "exclude_modules": None}
    path = tmp_path / "mug.atoms.safetensors"
    write(path, {"adapter_config": json.dumps(first)})
    assert read_concept_file(path).config == CONFIG
