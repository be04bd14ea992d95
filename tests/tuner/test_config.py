"""Settings are checked, stored in one form and understood by PEFT."""

import json

import pytest
from peft import PeftConfig

from atomdiff.tuner import AtomConfig, AtomModel
from atomdiff.tuner.peft_type import ATOMS, NAME, add_member


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_atoms": 0}, "num_atoms=0"),
        ({"channel_block": 0}, "channel_block=0"),
        ({"channel_block": 2.0}, "channel_block=2.0"),
        ({"channel_block_pattern": {"conv1": -1}}, r"channel_block_pattern\['conv1'\]=-1"),
        ({"channel_block_pattern": {"conv[": 2}}, r"'conv\[' is not a regular expression"),
        ({"num_atoms": 2.5}, "num_atoms=2.5"),
        ({"basis": "fourier"}, "basis='fourier': expected one of svd, dct, sparse"),
        ({"recursion": 0}, "recursion=0"),
        ({"sparsity": 0.0}, "sparsity=0.0: expected a number above 0"),
        ({"seed": -1}, "seed=-1"),
        ({"joint": True, "recursion": 2}, "joint=True with recursion=2"),
        ({"joint": True, "channel_block": 1}, "joint=True with channel_block=1"),
        ({"layers_to_transform": [1], "target_modules": ".*conv"}, "layers_to_transform with target_modules='.*conv'"),
    ],
)
def test_wrong_fields_are_named_with_their_value(fields, message):
    with pytest.raises(ValueError, match=message):
        AtomConfig(**fields)


def test_channel_block_pattern_matches_the_end_of_names_as_rank_pattern_does():
    config = AtomConfig(channel_block=2, channel_block_pattern={"to_q": 8, r"down.*\.conv1": 4})
    assert [config.block_of(n) for n in ("mid.to_q", "to_q", "down.0.conv1", "up.0.conv1", "to_query")] == [
        8,
        8,
        4,
        2,
        2,
    ]


def test_save_and_load_by_peft(tmp_path):
    config = AtomConfig(num_atoms=3, channel_block=4, basis="dct", target_modules=["b", "a"], exclude_modules="x.*")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, AtomConfig) and loaded.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a", "b"]


def test_registering_again_changes_nothing():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.peft_types import PeftType

    members = list(PeftType)
    assert add_member(NAME.upper()) is ATOMS and list(PeftType) == members
    assert ATOMS == "ATOMS" and PeftType("ATOMS") is ATOMS and PeftType.ATOMS is ATOMS
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ATOMS"] is AtomConfig and PEFT_TYPE_TO_TUNER_MAPPING["ATOMS"] is AtomModel
