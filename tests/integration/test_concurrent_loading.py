"""Loading in one thread changes nothing that other threads see: warning filters, random numbers, classes, models."""

import copy
import threading
import warnings

import pytest
import torch
from peft import LoraConfig, OFTConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import atomdiff
from atomdiff.pipelines import differences
from atomdiff.tuner import AtomConfig, adapter_state, attach, merging
from atomdiff.tuner.dry_run import copy_structure
from atomdiff.tuner.inject import inject
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter, assert_same_tensors, assert_unchanged, sharing_pipeline, snapshot, together

pytestmark = pytest.mark.slow

CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["to_q", "conv1"]),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=["to_q"]),
}


def lora_tensors(pipe, name="a"):
    return adapter_state.peft_tensors(pipe.unet, name)


@pytest.fixture(scope="module")
def folders(pipe_template, tmp_path_factory):
    files = {}
    for name, config in CONFIGS.items():
        pipe = copy.deepcopy(pipe_template)
        add_adapter(pipe, name, config, seed=1)
        files[name] = atomdiff.save_atoms(pipe, tmp_path_factory.mktemp(name) / name, name)
    return files


@pytest.fixture
def watched(monkeypatch):
    """What is seen of the process from within PEFT's injection, where another thread may look."""
    seen, inject = [], BaseTuner.inject_adapter

    def look(*args, **kwargs):
        seen.append((warnings.filters[:], nn.Module.register_parameter, torch.get_rng_state().sum().item()))
        return inject(*args, **kwargs)

    monkeypatch.setattr(BaseTuner, "inject_adapter", look)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_of_the_process_is_changed(tiny_pipe, folders, watched, name):
    filters, register = warnings.filters[:], nn.Module.register_parameter
    for adapter in ("a", "b"):
        atomdiff.load_atoms(tiny_pipe, folders[name], adapter)
    assert len(watched) == 4
    assert all((seen_filters, seen_register) == (filters, register) for seen_filters, seen_register, _ in watched)
    weights = {"a": 1.0} if name == "oft" else {"a": 0.5, "b": 1.0}
    atomdiff.set_active(tiny_pipe, weights)
    assert warnings.filters == filters


def test_several_adapters_are_loaded_without_a_warning(tiny_pipe, folders):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for adapter in ("a", "b"):
            atomdiff.load_atoms(tiny_pipe, folders["lora"], adapter)
    assert list(tiny_pipe.unet.peft_config) == ["a", "b"]


def test_weights_of_methods_without_any_are_refused_without_a_warning(tiny_pipe, folders):
    atomdiff.load_atoms(tiny_pipe, folders["oft"], "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="gives no weight"):
            atomdiff.set_active(tiny_pipe, {"a": 0.5})
        atomdiff.set_active(tiny_pipe, "a")
    atomdiff.unload_atoms(tiny_pipe)


def test_threads_load_at_the_same_time(pipe_template, folders):
    """Other threads make modules meanwhile, and find their own warnings and random numbers."""
    alone = copy.deepcopy(pipe_template)
    atomdiff.load_atoms(alone, folders["lora"], "a")
    expected, before = lora_tensors(alone), snapshot(pipe_template)
    pipes = [copy.deepcopy(pipe_template) for _ in range(2)]
    done = threading.Event()

    def load(pipe):
        for _ in range(3):
            atomdiff.load_atoms(pipe, folders["lora"], "a")
            assert_same_tensors(lora_tensors(pipe), expected)
            atomdiff.unload_atoms(pipe)

    def load_both():
        try:
            together(*(lambda pipe=pipe: load(pipe) for pipe in pipes))
        finally:
            done.set()

    def make():
        while not done.is_set():
            assert not nn.Linear(2, 2).weight.is_meta

    together(load_both, make)
    for pipe in pipes:
        assert_unchanged(pipe, before)


def test_threads_load_into_one_pipeline_one_after_the_other(tiny_pipe, pipe_template, folders):
    """Also through another pipeline that shares the models; one of them merges, and one lists what there is."""
    other, before = sharing_pipeline(tiny_pipe), snapshot(tiny_pipe)
    alone = copy.deepcopy(pipe_template)
    atomdiff.load_atoms(alone, folders["lora"], "a")
    expected = lora_tensors(alone)

    def load(pipe, name):
        for number in range(4):
            atomdiff.load_atoms(pipe, folders["lora"], f"{name}{number}")
            atomdiff.merge(pipe)
            if number % 2:
                atomdiff.unload_atoms(pipe, f"{name}{number}")

    def look():
        for _ in range(20):
            assert all(concept.layers["unet"] == len(expected) // 2 for concept in atomdiff.list_atoms(tiny_pipe))

    together(lambda: load(tiny_pipe, "x"), lambda: load(other, "y"), look)
    assert {concept.name for concept in atomdiff.list_atoms(other)} == {"x0", "x2", "y0", "y2"}
    for name in ("x0", "x2", "y0", "y2"):
        assert_same_tensors(lora_tensors(tiny_pipe, name), expected)
    atomdiff.unload_atoms(tiny_pipe)
    assert_unchanged(tiny_pipe, before)


def test_a_structure_can_be_changed_while_the_model_stays(tiny_pipe, folders):
    unet = tiny_pipe.unet
    atomdiff.load_atoms(tiny_pipe, folders["lora"], "a")
    keys, flags = list(unet.state_dict()), [p.requires_grad for p in unet.parameters()]
    copied = copy_structure(unet)
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in unet.parameters()]
    inject(copied, AtomConfig(target_modules=["to_q", "to_k"]), "b")
    attach.delete_adapter(copied, "a")
    assert list(unet.state_dict()) == keys and list(unet.peft_config) == ["a"]
    assert [p.requires_grad for p in unet.parameters()] == flags
    assert all(layer.active_adapters == ["a"] for layer in adapter_state.adapter_layers(unet).values())


def test_exporting_leaves_the_weights_alone(tiny_pipe, folders, monkeypatch):
    """Another thread that generates meanwhile sees the base and its adapters at every moment."""
    atomdiff.load_atoms(tiny_pipe, folders["lora"], "a")
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in tiny_pipe.unet.state_dict().items()}
    merge, seen = merging.merge, []

    def look(layer):
        merge(layer)
        now = tiny_pipe.unet.state_dict()
        seen.append(
            all(now[key].data_ptr() == at and torch.equal(now[key], value) for key, (at, value) in before.items())
        )
        assert not any(layer.merged for layer in adapter_state.adapter_layers(tiny_pipe.unet).values())

    monkeypatch.setattr(differences.merging, "merge", look)
    assert len(list(differences.layer_differences(tiny_pipe))) == len(seen) and all(seen)
