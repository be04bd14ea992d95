"""Adapters of activations in a pipeline: beside atoms, switched, mixed, loaded from folders, and taken out."""

import itertools

import pytest
import torch
from peft import LoraConfig

import atomdiff
from atomdiff.activation_adapters import CoeffTuningConfig, ConvAdapterConfig, MonaConfig
from atomdiff.pipelines.differences import layer_differences, merged_copy
from atomdiff.tuner.adapter_state import adapter_layers
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter, assert_unchanged, predict, predict_batch, snapshot
from tests.tiny_models import fresh_copy

METHODS = {
    "mona": MonaConfig(hidden_size=4, target_modules=["resnets.0", "attentions.0"]),
    "branch": ConvAdapterConfig(target_modules=["conv1", "conv_shortcut"]),
    "heads": CoeffTuningConfig(),
}
ATOMS = atomdiff.AtomConfig(target_modules="all", channel_block=2)


def close(one, other, atol=1e-4):
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def filled(pipe, *names):
    for name in names:
        torch.manual_seed(len(name))
        add_adapter(pipe, name, METHODS.get(name, ATOMS), seed=len(name))
    pipe.set_adapters(list(names))
    pipe.unet.eval()
    return pipe


@pytest.fixture
def pipe(tiny_pipe):
    return filled(tiny_pipe, "atoms", *METHODS)


def test_the_order_of_adapters_does_not_matter(tiny_pipe, pipe_template):
    before, names = snapshot(tiny_pipe), ["atoms", *METHODS]
    expected = predict(filled(tiny_pipe, *names))
    for order in (names[::-1], [*names[1:], "atoms"]):
        close(predict(filled(fresh_copy(pipe_template, requires_safety_checker=False), *order)), expected, atol=1e-5)
    layers = {name: len(adapter_layers(tiny_pipe.unet, name)) for name in names}
    assert min(layers.values()) > 2
    for name in (*names[2:], *names[:2]):
        atomdiff.unload_atoms(tiny_pipe, name)
    assert_unchanged(tiny_pipe, before)


def test_weights_of_diffusers_act_as_the_layers_do(pipe):
    pipe.set_adapters(["mona"], [0.5])
    half = predict(pipe)
    for layer in adapter_layers(pipe.unet, "mona").values():
        layer.set_scale("mona", 1.0)
        layer.scale_layer(0.5)
    assert torch.equal(predict(pipe), half)
    for layer in adapter_layers(pipe.unet, "mona").values():
        layer.unscale_layer()
    assert not torch.equal(predict(pipe), half)
    pipe.disable_lora()
    plain = predict(pipe)
    pipe.enable_lora()
    pipe.set_adapters(["mona"], [0.0])
    assert torch.equal(predict(pipe), plain)


def test_set_active_writes_atoms_and_leaves_the_others_to_act(pipe):
    pipe.set_adapters(["atoms", "mona", "heads"], [0.5, 0.7, 2.0])
    expected, before = predict(pipe), pipe.unet.conv_in.base_layer.weight.clone()
    atomdiff.set_active(pipe, {"atoms": 0.5, "mona": 0.7, "heads": 2.0})
    close(predict(pipe), expected)
    concepts = {concept.name: concept for concept in atomdiff.list_atoms(pipe)}
    assert {name for name, concept in concepts.items() if concept.merged} == {"atoms"}
    assert {name for name, concept in concepts.items() if concept.active} == {"atoms", "mona", "heads"}
    atomdiff.set_active(pipe, "branch")
    pipe.set_adapters(["branch"])
    assert torch.equal(pipe.unet.conv_in.base_layer.weight, before)


def test_merging_is_refused_only_where_they_act(pipe):
    pipe.set_adapters(["atoms", "mona"])
    acting = predict(pipe)
    for action in (atomdiff.merge, merged_copy, lambda pipe: list(layer_differences(pipe))):
        with pytest.raises(UserError, match="what 'mona' adds depends on its input, so there is no weight"):
            action(pipe)
        assert torch.equal(predict(pipe), acting)
    pipe.set_adapters(["atoms"])
    alone = predict(pipe)
    copied = merged_copy(pipe)
    close(predict(copied), alone)
    assert not adapter_layers(copied.unet) and torch.equal(predict(pipe), alone)
    atomdiff.merge(pipe)
    close(predict(pipe), alone)
    atomdiff.restore(pipe)
    assert torch.equal(predict(pipe), alone)


def test_each_sample_of_a_mixed_batch_has_its_own(pipe):
    samples = ["mona", None, {"atoms": 0.5, "branch": 0.7}, {"heads": 2.0, "mona": 0.3}, "heads"]
    expected = []
    for number, sample in enumerate(samples):
        weights = {sample: 1.0} if isinstance(sample, str) else sample or {}
        atomdiff.set_active(pipe, weights)
        expected.append(predict_batch(pipe, len(samples))[number])
    atomdiff.restore(pipe)
    pipe.set_adapters(["branch"])
    before = predict_batch(pipe, len(samples))
    with atomdiff.mixed_batch(pipe, samples):
        mixed = predict_batch(pipe, len(samples))
    close(mixed, torch.stack(expected))
    assert min((one - other).abs().max() for one, other in itertools.combinations(mixed, 2)) > 1e-2
    assert torch.equal(predict_batch(pipe, len(samples)), before)


def test_a_batch_that_is_not_one_of_samples_is_refused(pipe):
    with (
        atomdiff.mixed_batch(pipe, ["mona", "heads", None]),
        pytest.raises(UserError, match="batch of 4 for 3 samples"),
    ):
        predict_batch(pipe, 4)


def test_only_atoms_are_kept_in_part(pipe):
    with pytest.raises(UserError, match="'mona' is not an atom concept: only those can be kept in part"):
        with atomdiff.mixed_batch(pipe, [{"mona": {"keep": 0.5}}, None]):
            pytest.fail("it was let in")


def test_a_lora_gets_all_of_its_layers_within_blocks_that_have_adapters(pipe):
    lora = LoraConfig(target_modules=["to_q", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(lora, "lora")
    expected = [path for path, _ in pipe.unet.named_modules() if path.endswith((".to_q", ".conv1"))]
    assert len(adapter_layers(pipe.unet, "lora")) == len(expected) > 4
    predict(pipe)


def test_unloading_by_diffusers_gives_the_base_back(tiny_pipe):
    before, plain = snapshot(tiny_pipe), predict(tiny_pipe)
    filled(tiny_pipe, "mona", "heads", "branch")
    assert not torch.equal(predict(tiny_pipe), plain)
    tiny_pipe.unload_lora_weights()
    assert torch.equal(predict(tiny_pipe), plain)
    assert atomdiff.list_atoms(tiny_pipe) == []
    assert_unchanged(tiny_pipe, before)


@pytest.mark.parametrize("name", METHODS)
def test_a_folder_is_loaded_beside_atoms_and_unloaded_exactly(name, tiny_pipe, tmp_path, pipe_template):
    source = filled(fresh_copy(pipe_template, requires_safety_checker=False), name)
    expected = predict(source)
    folder = atomdiff.save_atoms(source, tmp_path / "concept", name)
    add_adapter(tiny_pipe, "atoms", ATOMS)
    alone = predict(tiny_pipe)
    assert atomdiff.load_atoms(tiny_pipe, folder) == "concept"
    close(predict(tiny_pipe), expected, atol=1e-6)
    tiny_pipe.set_adapters(["atoms", "concept"])
    assert (predict(tiny_pipe) - alone).abs().max() > 1e-4
    atomdiff.unload_atoms(tiny_pipe, "concept")
    tiny_pipe.set_adapters(["atoms"])
    assert torch.equal(predict(tiny_pipe), alone)


def test_a_pickled_model_is_loaded_with_its_concepts(pipe, tmp_path):
    expected = predict(pipe)
    torch.save(pipe.unet, tmp_path / "unet.pt")
    pipe.unet = torch.load(tmp_path / "unet.pt", weights_only=False)
    assert torch.equal(predict(pipe), expected)
    atomdiff.unload_atoms(pipe, "mona")
    atomdiff.set_active(pipe, ["atoms", "branch", "heads"])
    assert not torch.equal(predict(pipe), expected)


def test_what_does_not_fit_is_left_out_when_it_may_be(tiny_pipe, tiny_sd2_pipe, tmp_path):
    add_adapter(tiny_pipe, "mona", MonaConfig(hidden_size=4))
    folder = atomdiff.save_atoms(tiny_pipe, tmp_path / "concept", "mona")
    unet = tiny_sd2_pipe.unet
    unet.mid_block.attentions[0].transformer_blocks[0].dim = 5  # so its adapters have another shape
    with pytest.raises(UserError, match="do not fit this model.*allow_base_mismatch"):
        atomdiff.load_atoms(tiny_sd2_pipe, folder)
    with pytest.warns(UserWarning, match="mid_block.attentions.0.after_"):
        atomdiff.load_atoms(tiny_sd2_pipe, folder, allow_base_mismatch=True)
    layers = adapter_layers(unet, "concept")
    assert len(layers) == len(adapter_layers(tiny_pipe.unet)) - 2 and not any(
        "mid_block.att" in path for path in layers
    )
    predict(tiny_sd2_pipe)
