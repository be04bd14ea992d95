"""The layers that a file gets: those with a score, as many as there is room for."""

import dataclasses
import warnings
from collections import Counter

import pytest
import torch

import atomdiff
from atomdiff.atoms.variants import SCORE_NAME
from atomdiff.cli.summary import describe
from atomdiff.concepts.concept_file import concept_bytes, read_concept_file, read_header
from atomdiff.concepts.layer_choice import choose_layers, count_by_block
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import atom_layers
from atomdiff.utils.errors import UserError
from tests.concepts.test_concept_file import make_concept
from tests.helpers import add_adapter, predict

LARGE, SMALL = "unet.down.conv1", "unet.mid.to_q"


def size(concept):
    return len(concept_bytes(concept, torch.float16))


def test_layers_below_the_threshold_leave():
    chosen = choose_layers(make_concept(), {LARGE: 0.0999, SMALL: 0.1}, None, torch.float16)
    assert chosen.layers.keys() == chosen.fingerprint.keys() == {SMALL}
    assert chosen.training["selected_layers"] == "1 of 2" and chosen.tokens.keys() == {"sks", "a.b"}
    both = choose_layers(make_concept(), {LARGE: 0.5, SMALL: 0.1}, None, torch.float16)
    assert both.layers.keys() == {LARGE, SMALL}


def test_a_file_has_at_most_its_budget():
    scores = {LARGE: 0.5, SMALL: 0.2}
    whole = size(choose_layers(make_concept(), scores, None, torch.float16))
    for budget in range(whole + 8, 1000, -40):
        try:
            chosen = choose_layers(make_concept(), scores, budget, torch.float16)
        except UserError as error:
            assert "no room for one" in str(error)
            small = size(choose_layers(make_concept(), {LARGE: 0.0, SMALL: 0.2}, None, torch.float16))
            assert budget < small
            break
        assert size(chosen) <= budget
        # What does not fit is passed over for a smaller layer.
        assert chosen.layers.keys() == ({LARGE, SMALL} if budget >= whole else chosen.layers.keys() - {""})
        assert len(chosen.layers) == (2 if budget >= whole else 1)
    else:
        pytest.fail("every budget was kept")


def test_the_best_layer_is_kept_where_none_has_a_score():
    with pytest.warns(UserWarning, match="scores of all 2 layers are below 0.1: the best layer is kept alone"):
        chosen = choose_layers(make_concept(), {LARGE: -0.3, SMALL: 0.05}, None, torch.float16)
    assert chosen.layers.keys() == {SMALL}


def test_layers_without_a_score_stay_and_count_in_the_budget():
    concept = make_concept()
    both = choose_layers(concept, {SMALL: 0.2}, None, torch.float16)
    assert both.layers.keys() == {LARGE, SMALL} and both.training["selected_layers"] == "2 of 2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the file is not empty
        one = choose_layers(concept, {SMALL: 0.05}, size(both), torch.float16)
    assert one.layers.keys() == one.fingerprint.keys() == {LARGE} and one.training["selected_layers"] == "1 of 2"
    assert choose_layers(concept, {SMALL: 0.2}, size(both), torch.float16).layers.keys() == {LARGE, SMALL}
    for score, room in ((0.2, size(both) - 1), (0.05, size(one) - 1)):
        with pytest.raises(UserError, match=rf"the file has {size(one):,} without the layers that may leave,"):
            choose_layers(concept, {SMALL: score}, room, torch.float16)


@pytest.mark.parametrize("chosen", ["unet", "text_encoder"])
def test_the_layers_of_a_component_without_scores_are_saved(tiny_pipe, tmp_path, chosen):
    everything = {
        "unet": AtomConfig(target_modules=["conv1"]),
        "text_encoder": AtomConfig(target_modules=["q_proj", "v_proj"]),
    }
    for component, config in everything.items():
        if component == chosen:
            config = dataclasses.replace(config, select="adaptive", select_budget="100KB")
        getattr(tiny_pipe, component).add_adapter(config, "mug")
    counts = {component: len(atom_layers(getattr(tiny_pipe, component))) for component in everything}
    idle, *_ = atom_layers(getattr(tiny_pipe, chosen)).values()
    idle.tensors(SCORE_NAME)["mug"].data.zero_()
    concept = read_concept_file(atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.safetensors", "mug"))
    found = Counter(module.partition(".")[0] for module in concept.layers)
    assert found == counts | {chosen: counts[chosen] - 1}
    total = sum(counts.values())
    assert concept.training["selected_layers"] == f"{total - 1} of {total}"


def test_one_file_has_one_budget(tiny_pipe, tmp_path):
    for component, budget in (("unet", "100KB"), ("text_encoder", "90KB")):
        config = AtomConfig(target_modules=["conv1", "q_proj"], select="adaptive", select_budget=budget)
        getattr(tiny_pipe, component).add_adapter(config, "mug")
    with pytest.raises(UserError, match="found 90,000 bytes and 100,000 bytes in the adapters of one concept"):
        atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.safetensors", "mug")
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_saved_concept_has_the_layers_that_act_and_nothing_of_their_choice(tiny_pipe, tmp_path):
    add_adapter(tiny_pipe, "mug", AtomConfig(select="adaptive", target_modules=["conv1", "to_q"]))
    layers = atom_layers(tiny_pipe.unet)
    with torch.no_grad():
        for number, layer in enumerate(layers.values()):
            layer.tensors(SCORE_NAME)["mug"].fill_(0.2 if number % 3 == 0 else 0.0)
    acting = predict(tiny_pipe)
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.safetensors", "mug", dtype=torch.float32)
    concept, metadata = read_concept_file(path), read_header(path)[0]
    assert concept.layers.keys() == {f"unet.{name}" for name in list(layers)[::3]}
    assert metadata["format_version"] == "1" and "select" not in metadata["adapter_config"]
    assert concept.training["selected_layers"] == f"{len(concept.layers)} of {len(layers)}"
    described = describe(path)
    assert f"selected layers  {len(concept.layers)} of {len(layers)}: {count_by_block(concept.layers)}" in described
    atomdiff.unload_atoms(tiny_pipe)
    base = predict(tiny_pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atomdiff.load_atoms(tiny_pipe, path)
    torch.testing.assert_close(predict(tiny_pipe), acting, atol=1e-6, rtol=0)
    assert (acting - base).abs().max() > 1e-3


def test_blocks_are_counted():
    modules = ["unet.up_blocks.0.resnets.0.conv1", "unet.up_blocks.0.resnets.1.conv1", "unet.conv_in"]
    assert count_by_block(modules) == "unet.conv_in 1, unet.up_blocks.0 2"
