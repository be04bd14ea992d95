"""Names: those derived from files are always good, those given are good or refused."""

import unicodedata

import pytest
import torch
from peft import LoraConfig

import atomdiff
from atomdiff.pipelines.adapter_names import derived_name, given_name
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter

MODELS = [torch.nn.Sequential(torch.nn.ModuleDict({"conv": torch.nn.Conv2d(1, 1, 3)}))]

DERIVED = {
    "mug.atoms.safetensors": "mug",
    "my mug, blue.v2.safetensors": "my_mug__blue",
    "train.atoms.safetensors": "train_1",
    "1.atoms.safetensors": "1",
    "0": "0_1",
    "conv.atoms.safetensors": "conv_1",
    "keys": "keys_1",
    "forward": "forward_1",
    "weight": "weight_1",
    "lora_A": "lora_A_1",
    "猫.atoms.safetensors": "猫",
    unicodedata.normalize("NFD", "müll.safetensors"): "müll",
    ".safetensors": "concept",
    "x" * 250: "x" * 250,
    "taken": "taken_2",
}


@pytest.mark.parametrize("found", DERIVED)
def test_a_name_derived_from_a_file_is_always_good(found):
    taken = ["taken", "taken_1"]
    name = derived_name(found, MODELS, taken)
    assert name == DERIVED[found]
    assert given_name(name, MODELS, taken) == name


@pytest.mark.parametrize("name", ["", " ", "a.b", "a b", "train", "0", "conv", "keys", "weight", "oft_R", 3])
def test_a_name_that_no_adapter_can_have_is_refused(name):
    with pytest.raises(UserError, match="cannot be an adapter name"):
        given_name(name, MODELS, [])


@pytest.mark.parametrize("name", ["mug", "conv"])
def test_a_name_that_is_taken_is_refused(name):
    """It may be that of modules by now: those of a LoRA or Mona adapter have its name."""
    with pytest.raises(UserError, match=f"'{name}' is loaded already"):
        given_name(name, MODELS, [name])


def save(pipe, path, config, seed):
    add_adapter(pipe, "made", config, seed=seed, scale=0.05)
    saved = atomdiff.save_atoms(pipe, path, "made", dtype=torch.float32)
    atomdiff.unload_atoms(pipe)
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("config", [AtomConfig(), LoraConfig(r=2, target_modules=["to_q"])])
def test_files_of_any_name_load_beside_each_other(tiny_pipe, tmp_path, config):
    """Two folders with a file of one name, and a name that is also the path of a layer; each is what it is alone."""
    adapted, names = [], []
    target = "conv_in" if isinstance(config, AtomConfig) else "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for seed, folder in enumerate(("a", "b", "c")):
        name = ("猫" if seed < 2 else "1") + (".atoms.safetensors" if isinstance(config, AtomConfig) else "")
        path = save(tiny_pipe, tmp_path / folder / name, config, seed)
        names.append(atomdiff.load_atoms(tiny_pipe, path))
        atomdiff.set_active(tiny_pipe, names[-1])
        adapted.append(tiny_pipe.unet.get_submodule(target).get_base_layer().weight.clone())
        atomdiff.unload_atoms(tiny_pipe)
    for folder, name in zip("abc", ("猫", "猫_1", "1_1"), strict=True):
        path = next((tmp_path / folder).iterdir())
        assert atomdiff.load_atoms(tiny_pipe, path) == name
    for name, weight in zip(("猫", "猫_1", "1_1"), adapted, strict=True):
        atomdiff.set_active(tiny_pipe, name)
        assert torch.equal(tiny_pipe.unet.get_submodule(target).get_base_layer().weight, weight)
    assert not torch.equal(adapted[0], adapted[1])


def test_an_adapter_saved_beside_others_loads_alone(tiny_pipe, tmp_path):
    """Where layers of other methods wrap its own, paths of its tensors are the same in the file."""
    modules = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    tiny_pipe.unet.add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights=False), "inner")
    tiny_pipe.unet.add_adapter(AtomConfig(target_modules=modules), "outer")
    tiny_pipe.unet.add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights=False), "same")
    for name in ("inner", "same"):
        atomdiff.save_atoms(tiny_pipe, tmp_path / name, name)
    atomdiff.unload_atoms(tiny_pipe)
    for name in ("inner", "same"):
        atomdiff.load_atoms(tiny_pipe, tmp_path / name)
    assert [concept.name for concept in atomdiff.list_atoms(tiny_pipe)] == ["inner", "same"]
