"""Concepts that are kept in part: merged, unmerged, mixed and pruned files agree; all is exact, nothing is the base."""

import pytest
import torch

import atomdiff
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.concepts.prune import PruneConfig, prune_file
from atomdiff.pipelines.differences import merged_copy
from atomdiff.pipelines.switch import set_weights
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.utils.errors import UserError
from tests.helpers import predict
from tests.pipelines.helpers import VARIANTS, assert_same_bits, assert_same_state, base_bits, pipeline_state
from tests.pipelines.helpers import predict_repeated as predict_many

TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "shared"])
def test_a_pruned_file_is_the_concept_kept_in_part(pipe, tmp_path, name):
    path = atomdiff.save_atoms(pipe, tmp_path / "mug.atoms.safetensors", name, dtype=torch.float32)
    prune_file(PruneConfig(file=str(path), output=str(tmp_path / "small.safetensors"), keep=0.4))
    atomdiff.set_active(pipe, {name: {"keep": 0.4}})
    kept = predict(pipe)
    atomdiff.set_active(pipe, name)
    assert (predict(pipe) - kept).abs().max() > 1e-3
    atomdiff.unload_atoms(pipe)
    base = predict(pipe)
    assert (base - kept).abs().max() > 1e-3
    atomdiff.load_atoms(pipe, tmp_path / "small.safetensors", "pruned")
    torch.testing.assert_close(predict(pipe), kept, **TOLERANCE)
    again = atomdiff.save_atoms(pipe, tmp_path / "again.safetensors", "pruned", dtype=torch.float32)
    assert {m: set(t) for m, t in read_concept_file(again).layers.items()} == {
        m: set(t) for m, t in read_concept_file(tmp_path / "small.safetensors").layers.items()
    }
    atomdiff.unload_atoms(pipe)
    atomdiff.load_atoms(pipe, path, "mug", keep=0.4)
    torch.testing.assert_close(predict(pipe), kept, **TOLERANCE)
    assert not any(layer.holds_merged for layer in atom_layers(pipe.unet).values())


def test_all_of_a_concept_is_the_concept_and_none_of_it_the_base(pipe):
    atomdiff.set_active(pipe, {})
    base = base_bits(pipe)
    atomdiff.set_active(pipe, {"separable": {"keep": 0}, "recursive": {"keep": 0.0, "weight": 2}})
    assert_same_bits(base_bits(pipe), base)
    atomdiff.set_active(pipe, "separable")
    whole = base_bits(pipe)
    atomdiff.set_active(pipe, {"separable": {"keep": 0.3}})
    part = base_bits(pipe)
    assert any(not torch.equal(part[key], tensor) for key, tensor in whole.items())
    atomdiff.set_active(pipe, {"separable": {"keep": 1}})
    assert_same_bits(base_bits(pipe), whole)


def test_each_sample_of_a_batch_keeps_its_own_share(pipe):
    samples = [
        {"separable": {"keep": 0.3}},
        {"separable": 1.0},
        {"separable": {"keep": 0.6, "weight": 0.5}, "recursive": {"keep": 0.2}},
        None,
        {"recursive": 1.0, "sparse": {"keep": 0.4}},
        {"shared": {"keep": 0.5}},
    ]
    expected = []
    for sample in samples:
        atomdiff.set_active(pipe, sample or {})
        expected.append(predict_many(pipe)[0])
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    with atomdiff.mixed_batch(pipe, samples):
        mixed = predict_many(pipe, len(samples))
    torch.testing.assert_close(mixed, torch.stack(expected), **TOLERANCE)


def test_a_part_of_a_concept_is_exported(pipe):
    set_weights(pipe, {"separable": {"keep": 0.3, "weight": 0.5}})
    part = predict(pipe)
    torch.testing.assert_close(predict(merged_copy(pipe)), part, **TOLERANCE)
    set_weights(pipe, {"separable": 0.5})
    assert (predict(merged_copy(pipe)) - part).abs().max() > 1e-3


def test_what_is_kept_lasts_until_the_next_switch(pipe):
    atomdiff.set_active(pipe, {"separable": {"keep": 0.3}})
    part = predict(pipe)
    atomdiff.restore(pipe)
    torch.testing.assert_close(predict(pipe), part, **TOLERANCE)  # unmerged
    pipe.set_adapters(["separable"], [1.0])
    torch.testing.assert_close(predict(pipe), part, **TOLERANCE)
    atomdiff.set_active(pipe, "recursive")
    atomdiff.restore(pipe)
    pipe.set_adapters(["separable"], [1.0])
    whole = predict(pipe)
    assert (whole - part).abs().max() > 1e-3
    atomdiff.set_active(pipe, "separable")
    torch.testing.assert_close(predict(pipe), whole, **TOLERANCE)


def test_what_is_kept_of_one_concept_lasts_when_others_are_loaded(pipe, tmp_path):
    files = [
        atomdiff.save_atoms(pipe, tmp_path / f"{name}.atoms.safetensors", name) for name in ("separable", "recursive")
    ]
    atomdiff.unload_atoms(pipe)
    base = predict(pipe)
    expected = []
    for file in files:
        atomdiff.load_atoms(pipe, file, "alone", keep=0.4)
        expected.append(predict(pipe))
        atomdiff.unload_atoms(pipe)
    for name, file, keep in (
        ("one", files[0], 0.4),
        ("other", files[1], 0.4),
        ("whole", files[1], 1),
        ("none", files[0], 0),
    ):
        atomdiff.load_atoms(pipe, file, name, keep=keep)
    for name, prediction in (("one", expected[0]), ("other", expected[1]), ("none", base)):
        pipe.set_adapters([name], [1.0])
        torch.testing.assert_close(predict(pipe), prediction, **TOLERANCE)
    pipe.set_adapters(["whole"], [1.0])
    assert (predict(pipe) - expected[1]).abs().max() > 1e-3


def test_a_refused_switch_keeps_what_was_kept(pipe):
    before = predict(pipe)
    with pytest.raises(UserError, match="offload_base='nowhere'"):
        atomdiff.set_active(pipe, {"separable": {"keep": 0.3}}, offload_base="nowhere")
    assert torch.equal(predict(pipe), before)


def test_other_methods_and_wrong_shares_are_refused(tiny_pipe, concepts):
    before = pipeline_state(tiny_pipe)
    with pytest.raises(UserError, match=r"keep=0.5: .*lora is not an atom concept"):
        atomdiff.load_atoms(tiny_pipe, concepts["lora"], keep=0.5)
    for keep in (1.5, -0.1, True, "half", float("nan")):
        with pytest.raises(UserError, match=r"keep=.*from 0 to 1"):
            atomdiff.load_atoms(tiny_pipe, concepts["atoms"], keep=keep)
    assert_same_state(tiny_pipe, before)
    atomdiff.load_atoms(tiny_pipe, concepts["lora"], "lora")
    with pytest.raises(UserError, match="'lora' is not an atom concept: only those can be .*kept in part"):
        atomdiff.set_active(tiny_pipe, {"lora": {"keep": 0.5}})
