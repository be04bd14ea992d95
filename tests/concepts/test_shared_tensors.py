"""Files with directions that layers share: once, small, read back, told from other bases; and their first form."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import atomdiff
from atomdiff.cli.summary import describe
from atomdiff.concepts.concept_file import (
    concept_bytes,
    read_concept_file,
    read_header,
    trained_tensors,
    write_concept_file,
)
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.concepts.prune import PruneConfig, prune_file
from atomdiff.evaluate.size import num_trainable_parameters
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter, predict

FIRST = Path(__file__).parents[1] / "fixtures" / "shared-first.atoms.safetensors"
CONFIG = AtomConfig(share="kind", share_count=2, basis="dct", channel_block=2, target_modules=["conv1", "to_q", "fc1"])


@pytest.fixture
def saved(tiny_pipe, tmp_path):
    """A concept of the denoiser and the text encoder, in full precision."""
    add_adapter(tiny_pipe, "mug", CONFIG, ("unet", "text_encoder"))
    return atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", "mug", dtype=torch.float32)


def test_what_is_saved_is_loaded(saved, tiny_pipe, tmp_path):
    acting = predict(tiny_pipe)
    atomdiff.unload_atoms(tiny_pipe)
    assert (predict(tiny_pipe) - acting).abs().max() > 1e-3
    atomdiff.load_atoms(tiny_pipe, saved)
    assert torch.equal(predict(tiny_pipe), acting)
    again = atomdiff.save_atoms(tiny_pipe, tmp_path / "again", "mug", dtype=torch.float32)
    one, two = read_concept_file(saved), read_concept_file(again)
    assert concept_bytes(dataclasses.replace(two, modelspec=one.modelspec)) == concept_bytes(one)


def test_directions_are_there_once(saved, tiny_pipe):
    with safe_open(saved, "pt") as file:
        sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    metadata = read_header(saved)[0]
    concept = read_concept_file(saved)
    counts = {part: sum(m.startswith(part) for m in concept.layers) for part in ("unet", "text_encoder")}
    kernels = sum("atom_mix" in tensors for tensors in concept.layers.values())
    count = 2 * (9 * 9 + 4 * 4 + kernels + counts["unet"]) + 2 * (4 * 4 + counts["text_encoder"])
    assert sizes.keys() == {"layer_table", "layer_values"} and sizes["layer_values"] == [count]
    assert metadata["format_version"] == "2" and '"share":"kind"' in metadata["adapter_config"]
    assert sum(tensor.numel() for tensor in trained_tensors(concept)) == num_trainable_parameters(saved) == count
    described = describe(saved)
    assert f"{count:,} trained" in described and "2 directions for each kind of layer" in described
    assert f"{'unet atom_shared':<24}{'2 x 9 x 9':>18}{1:>8}{162:>14}" in described
    plain = dataclasses.replace(CONFIG, share=None)
    add_adapter(tiny_pipe, "plain", plain, ("unet", "text_encoder"))
    without = atomdiff.save_atoms(tiny_pipe, saved.with_name("plain"), "plain", dtype=torch.float32)
    assert saved.stat().st_size - 4 * count < 1500 < without.stat().st_size / 5


def test_a_library_counts_directions_once(saved):
    library = ConceptLibrary(saved.parent)
    concept = library["mug"]
    shared = {id(tensors["channel_shared"]) for tensors in concept.layers.values()}
    assert len(shared) == 2 < len(concept.layers)
    sizes = [library.memory_used]
    own = {m: {kind: tensor.clone() for kind, tensor in t.items()} for m, t in concept.layers.items()}
    write_concept_file(saved.parent / "own.atoms.safetensors", dataclasses.replace(concept, layers=own))
    assert 0 < sizes[0] < sum(t.nbytes + 520 for tensors in own.values() for t in tensors.values()) + 40_000


def test_another_base_is_told_from_the_one_that_it_was_made_on(saved, tiny_pipe):
    atomdiff.unload_atoms(tiny_pipe)
    weights = [p for n, p in tiny_pipe.unet.named_parameters() if n.endswith(("conv1.weight", "to_q.weight"))]
    before = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)

    def change(share):
        with torch.no_grad():
            for weight, own in zip(weights, before, strict=True):
                weight.copy_(own + share * own.std() * torch.randn(own.shape, generator=generator))
        atomdiff.load_atoms(tiny_pipe, saved)
        atomdiff.unload_atoms(tiny_pipe)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change(0)
    with pytest.warns(UserWarning, match="this base is at distance 0.0.* from the one that the concept was made on"):
        change(0.4)
    with pytest.raises(UserError, match="this base is at distance .*; load it into that one|stays below 0.15"):
        change(3)


def test_layers_that_do_not_fit_are_named(saved, tiny_pipe):
    atomdiff.unload_atoms(tiny_pipe)
    concept = read_concept_file(saved)
    module = max(concept.layers)
    prints = concept.fingerprint | {module: concept.fingerprint[module][:1]}
    write_concept_file(saved, dataclasses.replace(concept, fingerprint=prints))
    with pytest.raises(UserError, match=rf"does not fit this base: {module} \(found .*'fingerprint': \(1,\)"):
        atomdiff.load_atoms(tiny_pipe, saved)
    layers = concept.layers | {"unet.nowhere.conv1": concept.layers[module]}
    prints = concept.fingerprint | {"unet.nowhere.conv1": [2.0, 1.0]}
    write_concept_file(saved, dataclasses.replace(concept, layers=layers, fingerprint=prints))
    with pytest.raises(UserError, match="this base has no unet.nowhere.conv1: the concept was made for another"):
        atomdiff.load_atoms(tiny_pipe, saved)


def test_they_are_not_pruned(saved, tmp_path):
    with pytest.raises(UserError, match="directions that layers share.*with keep in its adapter weight"):
        prune_file(PruneConfig(file=str(saved), output=str(tmp_path / "small"), keep=0.5))


@pytest.mark.parametrize(
    "change",
    [
        lambda places: {},
        lambda places: places | {"unet.atom.9x9": places["unet.atom.9x9"][1:]},
        lambda places: places | {"unet.atom.9x9": [10**6, *places["unet.atom.9x9"][1:]]},
        lambda places: places | {"unet.atom.9x9": [-1, *places["unet.atom.9x9"][1:]]},
        lambda places: places | {"unet.atom.9x9": [True, *places["unet.atom.9x9"][1:]]},
        lambda places: places | {"unet.atom.9x9": places["unet.atom.9x9"][:1] * len(places["unet.atom.9x9"])},
        lambda places: places | {"unet.atom.9x9": [0, *places["unet.atom.9x9"][1:]]},  # of the text encoder
        lambda places: places | {"unet.atom.9x9": None},
        lambda places: places | {"unet.atom.9x9": "0"},
        lambda places: places | {"unet.atom.8x8": []},
        lambda places: places | {"": [0]},
        lambda places: places | {"a.b.c.d.e": [0]},
        lambda places: None,
    ],
)
def test_damaged_places_of_the_first_form_are_refused(tmp_path, change):
    saved = tmp_path / "mug.atoms.safetensors"
    with safe_open(FIRST, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, saved, metadata)
    read_concept_file(saved)
    changed = change(json.loads(metadata["shared_layers"]))
    save_file(tensors, saved, {**metadata, "shared_layers": json.dumps(changed)})
    with pytest.raises(UserError, match="is damaged: .*shared_layers"):
        read_concept_file(saved)
