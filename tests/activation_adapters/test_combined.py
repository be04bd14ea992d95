"""Adapters of several methods as one: they act as each of them beside the others, and come off exactly."""

import copy
import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import atomdiff
from atomdiff.activation_adapters import CombinedConfig
from atomdiff.activation_adapters.coeff_tuning import CoeffTuningLayer
from atomdiff.cli.summary import describe
from atomdiff.concepts.parameter_count import count_parameters
from atomdiff.tuner.adapter_state import adapter_layers
from atomdiff.tuner.layer import AtomLayer
from atomdiff.utils.errors import UserError
from tests.activation_adapters.methods import call, make_model
from tests.helpers import add_adapter, assert_same_tensors, assert_unchanged, predict, predict_batch, snapshot

ATOMS = {"peft_type": "ATOMS", "target_modules": "conv", "channel_block": 2}
HEADS = {"peft_type": "COEFF_TUNING", "scale": 3}
BRANCHES = {"peft_type": "CONV_ADAPTER", "target_modules": ["conv1"], "reduction": 2}


def combined(*parts):
    return CombinedConfig(methods=[*parts] or [ATOMS, HEADS])


def shake(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def with_values(base, *parts):
    model = get_peft_model(base, combined(*parts))
    shake(model)
    return model.eval()


def test_it_begins_as_the_base_trains_all_and_comes_off_exactly():
    base = make_model("unet")
    expected, before = call(base), copy.deepcopy(base.state_dict())
    model = get_peft_model(base, combined())
    assert torch.equal(call(model), expected)
    trainable = {
        name.split(".")[-2 if "delta" in name else -3] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trainable == {"atom_delta", "atom_channel_delta", "coeff_tuning_mixing"}
    shake(model)
    adapted = call(model)
    for kind in (AtomLayer, CoeffTuningLayer):  # each has an effect
        for layer in model.modules():
            if isinstance(layer, kind):
                layer.set_scale("default", 0)
        changed, adapted = adapted, call(model)
        assert (changed - adapted).abs().max() > 1e-4
    assert torch.equal(adapted, expected)
    removed = model.unload()
    assert torch.equal(call(removed), expected)
    assert_same_tensors(removed.state_dict(), before)


@pytest.mark.parametrize("parts", [(ATOMS, HEADS), (HEADS, BRANCHES, ATOMS | {"basis": "dct"})])
def test_peft_saves_and_loads_it(parts, tmp_path):
    model = with_values(make_model("unet"), *parts)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "COMBINED" and stored["methods"] == [*parts]
    loaded = PeftModel.from_pretrained(make_model("unet"), tmp_path, adapter_name="again")
    torch.testing.assert_close(call(loaded), call(model), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="depends on its input"):
        loaded.merge_adapter()
    torch.testing.assert_close(call(loaded), call(model), atol=1e-6, rtol=0)


def test_a_concept_of_it_is_loaded_switched_mixed_and_unloaded(tiny_pipe, tmp_path):
    before, plain = snapshot(tiny_pipe), predict(tiny_pipe)
    for name, config in (("both", combined()), ("other", combined(HEADS, ATOMS | {"channel_block": 1}))):
        add_adapter(tiny_pipe, name, config, seed=len(name))
    folders = {name: atomdiff.save_atoms(tiny_pipe, tmp_path / name, name) for name in ("both", "other")}
    tiny_pipe.set_adapters(["both"])
    expected = predict(tiny_pipe)
    atomdiff.unload_atoms(tiny_pipe)
    assert_unchanged(tiny_pipe, before)
    for folder in folders.values():
        atomdiff.load_atoms(tiny_pipe, folder)
    tiny_pipe.set_adapters(["both"])
    torch.testing.assert_close(predict(tiny_pipe), expected, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="'both' adds depends on its input"):
        atomdiff.merge(tiny_pipe)
    assert torch.equal(predict(tiny_pipe), predict(tiny_pipe))

    batch = []
    for number, weights in enumerate(({"both": 1}, {"other": 0.5, "both": 0.3}, {})):
        atomdiff.set_active(tiny_pipe, weights)
        batch.append(predict_batch(tiny_pipe, 3)[number])
    torch.testing.assert_close(predict(tiny_pipe), plain)
    atomdiff.set_active(tiny_pipe, "both")
    torch.testing.assert_close(predict(tiny_pipe), expected, atol=1e-4, rtol=0)
    assert tiny_pipe.unet.conv_in.holds_merged
    atomdiff.restore(tiny_pipe)
    with atomdiff.mixed_batch(tiny_pipe, ["both", {"other": 0.5, "both": 0.3}, None]):
        torch.testing.assert_close(predict_batch(tiny_pipe, 3), torch.stack(batch), atol=1e-4, rtol=0)

    atomdiff.unload_atoms(tiny_pipe, "both")
    assert adapter_layers(tiny_pipe.unet, "other") and not adapter_layers(tiny_pipe.unet, "both")
    atomdiff.unload_atoms(tiny_pipe)
    assert torch.equal(predict(tiny_pipe), plain)
    assert_unchanged(tiny_pipe, before)


def test_its_parts_act_as_they_do_alone(tiny_pipe):
    add_adapter(tiny_pipe, "both", combined(), seed=1)
    tiny_pipe.unet.eval()
    expected = predict(tiny_pipe)
    for name, fields in (("atoms", ATOMS), ("heads", HEADS)):
        config = combined().parts()[0 if fields is ATOMS else 1]
        add_adapter(tiny_pipe, name, config, seed=1)
        for key, parameter in tiny_pipe.unet.named_parameters():
            if f".{name}" in key:
                parameter.data = tiny_pipe.unet.get_parameter(re.sub(rf"\.{name}(?=\.|$)", ".both", key)).data.clone()
    tiny_pipe.set_adapters(["atoms", "heads"])
    torch.testing.assert_close(predict(tiny_pipe), expected, atol=1e-5, rtol=0)
    tiny_pipe.set_adapters(["heads"])
    assert (predict(tiny_pipe) - expected).abs().max() > 1e-4


def test_its_parameters_are_those_of_its_parts(tiny_pipe, tmp_path):
    counts = [count_parameters("sd-1.5", config) for config in (combined(), *combined().parts())]
    whole, *parts = [(count.num_trainable_parameters, count.file_bytes) for count in counts]
    assert whole == tuple(map(sum, zip(*parts, strict=True))) and parts[1][0] == 2048
    add_adapter(tiny_pipe, "both", combined())
    text = describe(atomdiff.save_atoms(tiny_pipe, tmp_path / "concept", "both"))
    assert "COMBINED" in text and "atom_delta" in text and "coeff_tuning_mixing" in text


def test_where_one_does_not_fit_none_is_left():
    net = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="matches nothing"):
        get_peft_model(net, combined())
    assert type(net[0]) is nn.Conv2d and not hasattr(net, "peft_config")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([ATOMS], "expected a list of settings of two or more adapters"),
        (
            [ATOMS, {"peft_type": "LORA"}],
            r"methods\[1\]: found peft_type='LORA', expected one of ATOMS, COEFF_",
        ),
        ([ATOMS, {}], r"methods\[1\]: found peft_type=None"),
        ([ATOMS, "heads"], r"methods\[1\]: found peft_type=None"),
        ([ATOMS, ATOMS], "found 2 of ATOMS, expected one of each method"),
        ([ATOMS, HEADS | {"heads": 3}], r"methods\[1\]: CoeffTuningConfig has no field heads; it has: exclude_m"),
        ([HEADS | {"scale": 0}, ATOMS], r"methods\[0\]: scale=0: expected a number above 0"),
        ([ATOMS | {"select": "adaptive"}, HEADS], r"select='adaptive': expected 'all' beside other adapters"),
        ([ATOMS | {"share": "kind", "basis": "dct"}, HEADS], "share='kind': expected None beside other adapters"),
        ([ATOMS | {"modules_to_save": ["conv_in"]}, HEADS], "modules_to_save"),
    ],
)
def test_what_does_not_go_together_is_refused(methods, message):
    with pytest.raises(ValueError, match=message):
        CombinedConfig(methods=methods)


def test_patterns_of_strangers_are_checked_in_its_parts(tiny_pipe, tmp_path):
    add_adapter(tiny_pipe, "both", combined())
    folder = atomdiff.save_atoms(tiny_pipe, tmp_path / "both", "both")
    atomdiff.unload_atoms(tiny_pipe)
    file = folder / "adapter_config.json"
    stored = json.loads(file.read_text())
    stored["methods"][0]["target_modules"] = "(a+)+$"
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"cannot read .*adapter_config.json: .*\(a\+\)\+"):
        atomdiff.load_atoms(tiny_pipe, folder)
