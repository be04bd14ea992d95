"""What cannot be loaded leaves a pipeline as it was, and takes no memory."""

import copy
import json
import resource
import warnings

import pytest
import torch
from peft import GloraConfig, HiraConfig, LoHaConfig, LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import atomdiff
from atomdiff.concepts import peft_folder
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import peft_tensors
from atomdiff.utils.errors import UserError
from tests.pipelines.helpers import METHODS, assert_same_state, pipeline_state


def rewrite(source, target, change=None, drop=(), metadata=None):
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key not in drop}  # noqa: SIM118
        save_file({**tensors, **(change or {})}, target, {**file.metadata(), **(metadata or {})})
    return target


BROKEN = {
    "missing": (lambda source, folder: folder / "nothing", "there is no file or directory"),
    "empty folder": (lambda source, folder: folder, "holds no concept"),
    "other layers": (
        lambda source, folder: rewrite(source, folder / "x", {"unet.nowhere.atom_delta": torch.zeros(9, 9)}),
        "not one list of numbers for each layer",
    ),
    "shape": (
        lambda source, folder: rewrite(source, folder / "x", {"unet.conv_in.atom_delta": torch.zeros(8, 9)}),
        "does not fit this base: unet.conv_in",
    ),
    "missing atoms": (
        lambda source, folder: rewrite(source, folder / "x", drop=["unet.conv_in.atom_basis"]),
        "does not fit this base: unet.conv_in",
    ),
    "not finite": (
        lambda source, folder: rewrite(
            source, folder / "x", {"unet.conv_in.atom_delta": torch.full((9, 9), torch.inf)}
        ),
        "unet.conv_in.atom_delta holds values",
    ),
    "version": (
        lambda source, folder: rewrite(source, folder / "x", metadata={"format_version": "9"}),
        "format version '9'",
    ),
    "token": (
        lambda source, folder: rewrite(source, folder / "x", {"token.sks": torch.zeros(33)}),
        r"embedding of 'sks' has shape \(33,\)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_a_failed_load_leaves_the_pipeline_as_it_was(tiny_pipe, concepts, tmp_path, case):
    make, message = BROKEN[case]
    atomdiff.load_atoms(tiny_pipe, concepts["dct atoms"], "there")
    atomdiff.merge(tiny_pipe)
    before = pipeline_state(tiny_pipe)
    with pytest.raises(UserError, match=message):
        atomdiff.load_atoms(tiny_pipe, make(concepts["atoms"], tmp_path), "new")
    assert_same_state(tiny_pipe, before)


def break_lora(source, folder, tensors):
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    all_tensors = load_file(source / "adapter_model.safetensors")
    save_file(tensors(all_tensors), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: dict(list(t.items())[1:]), "do not fit this model.*1 in all"),
        (lambda t: {**t, "base_model.model.nowhere.lora_A.weight": torch.zeros(2, 2)}, "do not fit.*nowhere"),
        (lambda t: {key: value[..., :1].contiguous() for key, value in t.items()}, "do not fit this model"),
        (lambda t: {key: value / 0 for key, value in t.items()}, "not finite"),
    ],
)
def test_a_failed_load_of_a_directory_too(tiny_pipe, concepts, tmp_path, tensors, message):
    names = [atomdiff.load_atoms(tiny_pipe, concepts[method]) for method in ("dct atoms", "lora")]
    tiny_pipe.unet.set_adapter(names)
    atomdiff.merge(tiny_pipe)
    before = pipeline_state(tiny_pipe)
    with pytest.raises(UserError, match=message):
        atomdiff.load_atoms(tiny_pipe, break_lora(concepts["lora"], tmp_path, tensors), "new")
    assert_same_state(tiny_pipe, before)


HUGE = 10_000_000
ABSURD = {
    "lora": (lambda: LoraConfig(r=2, target_modules=["to_q"]), {"r": HUGE}, "ask for a tensor"),
    "lora, less so": (lambda: LoraConfig(r=2, target_modules=["to_q"]), {"r": 10**6}, r"found \(2, .*\(1000000, "),
    "lora, here and there": (
        lambda: LoraConfig(r=2, target_modules=["to_q"]),
        {"rank_pattern": {"mid_block.*": HUGE}},
        "ask for a tensor",
    ),
    "loha": (lambda: LoHaConfig(r=2, target_modules=["conv1"]), {"r": HUGE}, "ask for a tensor"),
    "hira": (lambda: HiraConfig(r=2, target_modules=["to_q"]), {"r": HUGE}, "ask for a tensor"),
    "glora": (lambda: GloraConfig(r=2, target_modules=["to_q"]), {"r": HUGE}, "ask for a tensor"),
    "atoms": (
        lambda: AtomConfig(basis="sparse", num_atoms=12, target_modules=["conv_in"]),
        {"num_atoms": 100 * HUGE},
        "ask for a tensor",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ABSURD)
def test_an_absurd_rank_is_refused_before_it_takes_memory(tiny_pipe, tmp_path, case):
    make, absurd, message = ABSURD[case]
    adapter = copy.deepcopy(tiny_pipe.unet)
    adapter.add_adapter(make())
    peft_folder.write(tmp_path, {"unet": (make(), peft_tensors(adapter, "default"))}, {}, "unet")
    atomdiff.load_atoms(tiny_pipe, tmp_path, "good")
    before = pipeline_state(tiny_pipe)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | absurd))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"cannot load .*{message}"):
        atomdiff.load_atoms(tiny_pipe, tmp_path, "new")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 64 << 10  # in KB
    assert_same_state(tiny_pipe, before)


def test_trying_an_adapter_out_leaves_nothing_behind(tiny_pipe, concepts, user_warnings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        atomdiff.load_atoms(tiny_pipe, concepts["lora"], "x")
        predicted = torch.rand(1)
        atomdiff.unload_atoms(tiny_pipe, "x")
        torch.manual_seed(0)
        inject_adapter_in_model(METHODS["lora"](), tiny_pipe.unet, "x")
    assert torch.equal(torch.rand(1), predicted) and not user_warnings(caught)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights='pissa_niter_4' rewrites the base"),
        ("modules_to_save", ["conv_in"], "replaces whole modules"),
        ("trainable_token_indices", [1], "replaces rows of embeddings"),
        ("bias", "all", "bias='all' trains biases of the base"),
        ("bias", "lora_only", "bias='lora_only' trains biases of the base"),
        ("peft_type", "NO_SUCH", "cannot read .*adapter_config.json"),
    ],
)
def test_directories_that_cannot_be_taken_out_again_are_refused(tiny_pipe, concepts, tmp_path, field, value, message):
    for file in concepts["lora"].glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(UserError, match=message):
        atomdiff.load_atoms(tiny_pipe, tmp_path, "x")
    assert not atomdiff.list_atoms(tiny_pipe)
