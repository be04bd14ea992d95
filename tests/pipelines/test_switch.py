"""Switching concepts in place: images are the unmerged ones', weights stay where they are, every bit comes back."""

import copy
import pickle
import random

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig
from peft.tuners.tuners_utils import BaseTunerLayer

import atomdiff
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.pipelines.step_schedule import schedule_of
from atomdiff.tuner import AtomConfig, AtomLayer
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter, predict
from tests.pipelines.helpers import (
    VARIANTS,
    addresses,
    assert_same_bits,
    base_bits,
    bits,
    generate,
    predict_repeated,
)

SETS = [
    *({name: 1.0} for name in VARIANTS),
    {"spatial": 0.4, "separable": -0.7},
    {"joint": 0.5, "sparse": 1.3, "recursive": -1.0},
    dict.fromkeys(VARIANTS, 0.3),
]


def use_unmerged(pipe, weights):
    atomdiff.restore(pipe)
    for model in (pipe.unet, pipe.text_encoder):
        for layer in atom_layers(model).values():
            layer.set_adapter(list(weights))
            for name, weight in weights.items():
                layer.set_scale(name, weight)


def state(pipe):
    layers = [layer for m in pipeline_models(pipe).values() for layer in atom_layers(m).values()]
    scaling = [(layer.active_adapters, layer.disable_adapters, dict(layer.scaling)) for layer in layers]
    return base_bits(pipe), scaling, schedule_of(pipe.unet) is not None


@pytest.mark.slow
@pytest.mark.parametrize("weights", SETS, ids=lambda weights: "+".join(weights))
def test_images_are_those_of_unmerged_concepts(pipe, weights):
    base = generate(pipe) if list(weights) == ["spatial"] else None
    use_unmerged(pipe, weights)
    expected = generate(pipe)
    atomdiff.set_active(pipe, weights)
    assert all(layer.holds_merged for layer in atom_layers(pipe.unet).values())
    torch.testing.assert_close(generate(pipe), expected, atol=1e-5, rtol=0)
    atomdiff.set_active(pipe, {})
    assert (generate(pipe) - expected).abs().max() > 1e-3
    assert base is None or not torch.equal(base, expected)


@pytest.mark.slow
def test_a_name_names_and_a_mapping_mean_the_same(pipe):
    results = []
    for concepts in ("joint", ["joint"], ("joint",), {"joint": 1}, {"joint": {"weight": 1.0}}):
        atomdiff.set_active(pipe, "dct")
        atomdiff.set_active(pipe, concepts)
        results.append(base_bits(pipe))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "channels_last"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)]
)
def test_fifty_switches_leave_no_trace(pipe, dtype, channels_last):
    for model in (pipe.unet, pipe.text_encoder):
        torch.nn.Module.to(model, dtype)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
    before, where, rng = base_bits(pipe), addresses(pipe), random.Random(0)
    strides = [p.stride() for p in pipe.unet.parameters()]
    atomdiff.set_active(pipe, SETS[-1])
    first = base_bits(pipe)
    for step in range(50):
        chosen = rng.sample(list(VARIANTS), rng.randrange(4))
        weights = {name: rng.choice([0, 1, -0.5, {"blocks": {"unet": rng.random()}}]) for name in chosen}
        atomdiff.set_active(pipe, weights, offload_base=rng.choice(["device", "cpu", None]))
        assert not weights or step % 10 or addresses(pipe) == where
    atomdiff.set_active(pipe, {})
    assert_same_bits(base_bits(pipe), before)
    atomdiff.set_active(pipe, SETS[-1])
    assert_same_bits(base_bits(pipe), first)
    assert addresses(pipe) == where and [p.stride() for p in pipe.unet.parameters()] == strides
    atomdiff.restore(pipe)
    assert_same_bits(base_bits(pipe), before)
    assert addresses(pipe) == where


def test_no_concept_is_the_bare_base_in_place(pipe):
    use_unmerged(pipe, {})
    base = generate(pipe)
    atomdiff.set_active(pipe, {})
    assert torch.equal(generate(pipe), base)
    pipe.unet.set_adapters(["joint"], [1.0])  # without effect until the next switch
    assert torch.equal(generate(pipe), base)
    assert all(layer.holds_merged for layer in atom_layers(pipe.unet).values())
    atomdiff.restore(pipe)
    assert (generate(pipe) - base).abs().max() > 1e-3


def test_a_switch_follows_training(pipe):
    atomdiff.set_active(pipe, "separable")
    before = generate(pipe)
    for key, parameter in pipe.unet.named_parameters():
        if key.endswith("delta.separable"):
            parameter.data.neg_()
    assert torch.equal(generate(pipe), before)
    atomdiff.set_active(pipe, "separable")
    after = generate(pipe)
    assert (after - before).abs().max() > 1e-3
    use_unmerged(pipe, {"separable": 1.0})
    torch.testing.assert_close(generate(pipe), after, atol=1e-5, rtol=0)


def test_listing_tells_what_is_in_the_weights(pipe):
    atomdiff.set_active(pipe, {"dct": 1.0, "joint": 0.0})
    assert [c.name for c in atomdiff.list_atoms(pipe) if c.active] == ["dct", "joint"]
    assert [c.name for c in atomdiff.list_atoms(pipe) if c.merged] == ["dct", "joint"]
    atomdiff.set_active(pipe, {})
    assert not any(c.active or c.merged for c in atomdiff.list_atoms(pipe))


def test_merging_again_follows_the_weights(tiny_pipe, concepts):
    name = atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
    atomdiff.merge(tiny_pipe)
    full = predict(tiny_pipe)
    tiny_pipe.set_adapters(name, 0.5)
    assert torch.equal(predict(tiny_pipe), full)
    atomdiff.merge(tiny_pipe)
    half = predict(tiny_pipe)
    atomdiff.restore(tiny_pipe)
    torch.testing.assert_close(predict(tiny_pipe), half, atol=1e-5, rtol=0)
    assert (half - full).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("other", ["lora", "oft", "loha"])
def test_atoms_and_other_methods_act_and_are_merged_together(tiny_pipe, concepts, other):
    before = bits(tiny_pipe)
    for order in (("atoms", other), (other, "atoms")):
        names = [atomdiff.load_atoms(tiny_pipe, concepts[method]) for method in order]
        for model in (tiny_pipe.unet, tiny_pipe.text_encoder):
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.set_adapter(names)
        together = predict(tiny_pipe)
        atomdiff.merge(tiny_pipe)
        torch.testing.assert_close(predict(tiny_pipe), together, atol=2e-5, rtol=0)
        atomdiff.restore(tiny_pipe)
        assert torch.equal(predict(tiny_pipe), together)
        atomdiff.merge(tiny_pipe)
        atomdiff.unload_atoms(tiny_pipe)
        assert_same_bits(bits(tiny_pipe), before)


def test_where_one_method_cannot_be_merged_none_is(tiny_pipe):
    """A LoRA with biases of its own on layers that have none comes after atoms."""
    add_adapter(tiny_pipe, "atoms", AtomConfig(target_modules=["conv1"]))
    add_adapter(tiny_pipe, "lora", LoraConfig(r=2, target_modules=["to_q"], lora_bias=True))
    tiny_pipe.unet.set_adapters(["atoms", "lora"])
    before = bits(tiny_pipe)
    for call in (atomdiff.merge, lambda pipe: atomdiff.set_active(pipe, ["atoms", "lora"])):
        with pytest.raises(UserError, match="these concepts cannot be merged: .*lora_bias.*the pipeline is restored"):
            call(tiny_pipe)
        assert_same_bits(bits(tiny_pipe), before)
        assert not any(concept.merged for concept in atomdiff.list_atoms(tiny_pipe))


def test_a_concept_is_loaded_over_a_merged_one_of_another_method(tiny_pipe, concepts):
    before = bits(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, concepts["lora"])
    atomdiff.merge(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, concepts["atoms"])
    atomdiff.unload_atoms(tiny_pipe)
    assert_same_bits(bits(tiny_pipe), before)


LORA = LoraConfig(r=2, target_modules=["to_q", "conv1", "conv_in"])


@pytest.mark.slow
@pytest.mark.parametrize("other", [LORA, LoHaConfig(r=2, target_modules=["to_k", "conv1"])], ids=["lora", "loha"])
def test_other_methods_are_merged_beside_atoms_and_exactly_taken_off(pipe, other):
    before, where = base_bits(pipe), addresses(pipe)
    add_adapter(pipe, "other", other, seed=5)
    where = addresses(pipe)
    atomdiff.set_active(pipe, {"spatial": 0.5, "other": 0.7})
    assert addresses(pipe) == where
    both, merged = generate(pipe), base_bits(pipe)
    atomdiff.set_active(pipe, "spatial")
    only = generate(pipe)
    assert (both - only).abs().max() > 1e-3
    atomdiff.set_active(pipe, {"other": 0.7, "spatial": 0.5})
    assert_same_bits(base_bits(pipe), merged)
    atomdiff.set_active(pipe, {})
    assert_same_bits({key: value for key, value in base_bits(pipe).items() if key in before}, before)
    atomdiff.restore(pipe)
    pipe.unet.set_adapters(["spatial", "other"], [0.5, 0.7])
    for layer in atom_layers(pipe.text_encoder).values():
        layer.set_adapter([])
    torch.testing.assert_close(generate(pipe), both, atol=2e-5, rtol=0)
    assert addresses(pipe) == where


def test_another_method_stays_on_while_a_schedule_rewrites_the_atoms_below(pipe):
    add_adapter(pipe, "lora", LORA, seed=5)
    pipe.scheduler.set_timesteps(3)
    first, last = pipe.scheduler.timesteps[[0, -1]]
    atomdiff.set_active(pipe, {"spatial": 0.25, "lora": 1.0})
    expected = predict_repeated(pipe, timestep=last)
    before = base_bits(pipe)
    atomdiff.set_active(pipe, {"spatial": {"steps": {0: 1, 1: 0.25}}, "lora": 1.0})
    predict_repeated(pipe, timestep=first)
    assert torch.equal(predict_repeated(pipe, timestep=last), expected)
    assert_same_bits(base_bits(pipe), before)


@pytest.mark.parametrize(
    "other", [OFTConfig(r=2, oft_block_size=0, target_modules=["to_q"]), IA3Config(target_modules=["to_k"])]
)
def test_methods_without_a_weight_act_at_one_or_are_refused(pipe, recwarn, other, user_warnings):
    other.feedforward_modules = []
    add_adapter(pipe, "other", other, seed=5)
    recwarn.clear()
    atomdiff.set_active(pipe, ["spatial", "other"])
    kept = state(pipe)
    with pytest.raises(UserError, match=r"'other' is a \w+ adapter, which PEFT gives no weight such as 0.5: use 1"):
        atomdiff.set_active(pipe, {"joint": 1.0, "other": 0.5})
    assert_same_bits(state(pipe)[0], kept[0])
    assert state(pipe)[1:] == kept[1:] and not user_warnings(recwarn)


def test_the_weight_of_another_method_is_only_tried_out(pipe):
    add_adapter(pipe, "lora", LORA, seed=5)
    add_adapter(pipe, "oft", OFTConfig(r=2, oft_block_size=0, target_modules=["to_v"]), seed=5)
    use_unmerged(pipe, {})
    pipe.unet.set_adapter(["lora"])
    before = predict_repeated(pipe)
    with pytest.raises(UserError, match="'oft' is a OFT"):
        atomdiff.set_active(pipe, {"lora": 0.3, "oft": 0.5})
    assert torch.equal(predict_repeated(pipe), before)


def test_concepts_of_words_only_are_switched_too(tiny_pipe, concepts, tmp_path):
    add_placeholder_token(tiny_pipe, "zwx")
    set_token_embedding(tiny_pipe, "zwx", {"text_encoder": torch.ones(32)})
    atomdiff.save_atoms(tiny_pipe, tmp_path / "word.safetensors")
    atomdiff.unload_atoms(tiny_pipe)
    before = base_bits(tiny_pipe)
    atomdiff.load_atoms(tiny_pipe, tmp_path / "word.safetensors")
    atomdiff.set_active(tiny_pipe, {"word": 0.5}, offload_base="file")  # there is nothing to keep
    atomdiff.set_active(tiny_pipe, {"word": {"steps": {0: 1, 1: 0}}})
    generate(tiny_pipe)
    with pytest.raises(UserError, match="'word' has no layer in 'down_blocks'; it has layers in: none"):
        atomdiff.set_active(tiny_pipe, {"word": {"blocks": {"down": 0.5}}})
    atomdiff.load_atoms(tiny_pipe, concepts["joint atoms"], "joint")
    atomdiff.set_active(tiny_pipe, ["word", "joint"])
    atomdiff.unload_atoms(tiny_pipe)
    assert_same_bits(base_bits(tiny_pipe), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ("nobody", "there is no concept 'nobody'; loaded are: 'separable', 'dct', 'spatial', 'joint'"),
        ({"joint": 1.0, "": 1.0}, "there is no concept ''; loaded are"),
        ({"joint": float("nan")}, r"found the adapter weight .*weight=nan.*give a number.*finite"),
        ({"joint": float("inf")}, "finite"),
        ({"joint": 10**400}, "finite"),
        ({"joint": "much"}, "found the adapter weight 'much': give a number"),
        ({"joint": None}, "found the adapter weight None: give a number"),
        ({"joint": True}, "found the adapter weight"),
        ({"joint": {"weight": "1"}}, "found the adapter weight"),
        (
            {"dct": {"blocks": {"down.0": 1}}},
            "'dct' has no layer in 'down_blocks.0'; it has layers in: .*unet.mid_block",
        ),
        ({"joint": {"blocks": {"conv_i": 1}}}, "no layer in 'conv_i'"),
        ({"joint": {"wieght": 1}}, "no layer in 'wieght'"),
        ({"joint": {"steps": {1.5: 1}}}, "expected shares of the denoising steps, from 0 to 1"),
        ({"joint": {"steps": [1, 2]}}, r"found steps=\[1, 2\]"),
        ({"lora": {"steps": {0: 1}}}, "'lora' is not an atom concept"),
        ({"lora": {"blocks": {"down": 1}}}, "'lora' has no layer|'lora' is not an atom concept"),
        (None, "found the concepts None: give their names"),
        ([["joint"]], r"found the concepts \[\['joint'\]\]: give their names"),
        (7, "found the concepts 7"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(pipe, concepts, message):
    add_adapter(pipe, "lora", LORA)
    atomdiff.set_active(pipe, {"dct": {"steps": {0: 1, 1: 0}}})
    kept = state(pipe)
    with pytest.raises(UserError, match=message):
        atomdiff.set_active(pipe, concepts)
    assert_same_bits(state(pipe)[0], kept[0])
    assert state(pipe)[1:] == kept[1:]


def test_a_switch_looks_at_the_chosen_concepts_only(pipe, monkeypatch):
    calls = []
    update, set_adapter = AtomLayer._weight_update, BaseTunerLayer.set_adapter
    monkeypatch.setattr(AtomLayer, "_weight_update", lambda self, *args: calls.append(args[0]) or update(self, *args))
    monkeypatch.setattr(
        BaseTunerLayer, "set_adapter", lambda *args, **kw: calls.append("all") or set_adapter(*args, **kw)
    )
    atomdiff.set_active(pipe, ["joint", "recursive"])
    layers = atom_layers(pipe.unet).values()
    expected = [name for name in ("joint", "recursive") for layer in layers if name in layer.scaling]
    assert sorted(calls) == sorted(expected)


@pytest.mark.slow
def test_copies_and_pickles_live_their_own_lives(pipe):
    atomdiff.set_active(pipe, {"separable": {"steps": {0: 1, 1: 0}}, "joint": 0.5}, offload_base="cpu")
    before, expected = base_bits(pipe), generate(copy.deepcopy(pipe))
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(generate(twin), expected)
        assert not torch.equal(base_bits(twin)["unet.conv_in.weight"], before["unet.conv_in.weight"])
        assert_same_bits(base_bits(pipe), before)
        atomdiff.set_active(twin, "dct")
        atomdiff.restore(twin)
        assert_same_bits(base_bits(pipe), before)
    assert torch.equal(generate(pipe), expected)
