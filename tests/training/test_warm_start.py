"""Runs that start from a concept, or from the nearest ones of a library: what they start from, and that they resume."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from atomdiff.atoms.variants import SharedAtoms
from atomdiff.cli.summary import describe
from atomdiff.concepts.atom_changes import changes_of
from atomdiff.concepts.concept_file import read_concept_file, write_concept_file
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.concepts.prune import PruneConfig, prune_file
from atomdiff.training.dreambooth import take_step, train
from atomdiff.training.launch import start_accelerator
from atomdiff.training.preflight import check_runs
from atomdiff.training.resume import state_of
from atomdiff.training.run import build_run
from atomdiff.training.warm_start import warm_start
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import atom_tensors
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file
from tests.helpers import concept_bytes


@pytest.fixture
def concept(config, tmp_path):
    """The file of a run of four steps, in a folder `library`, and that run's config."""
    config = dataclasses.replace(config, learning_rate=0.05, token_learning_rate=0.05)
    file = train(dataclasses.replace(config, output_dir=str(tmp_path / "first")))
    (tmp_path / "library").mkdir()
    return file.rename(tmp_path / "library" / "first.atoms.safetensors"), config


def built(config, adapter=None):
    return build_run(config, start_accelerator(config), adapter or AtomConfig(), None)


def change_in(run):
    """S and C of a run's adapter, as `changes_of` has them of a file."""
    values = {}
    for module, tensors in atom_tensors(run.model.denoiser, "default").items():
        for name in ("atom", "channel"):
            if f"{name}_delta" in tensors:
                values[f"unet.{module}.{name}_delta"] = (
                    tensors[f"{name}_basis"].T @ tensors[f"{name}_delta"]
                ).flatten()
    return values


def assert_close(found, expected, tolerance=1e-3):
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert float((found[key] - values).norm()) <= tolerance * float(values.norm()) + 1e-7, key


def with_other_atoms(file, change=lambda tensor: tensor):
    """Write a concept again with other signs and another order of atoms, its changes put through a function."""
    concept = read_concept_file(file)
    layers = {}
    for module, tensors in concept.layers.items():
        layers[module] = dict(tensors)
        for name in ("atom", "channel"):
            if f"{name}_delta" in tensors:
                for kind in (f"{name}_delta", f"{name}_basis"):
                    layers[module][kind] = -tensors[kind].flip(0)
                layers[module][f"{name}_delta"] = change(layers[module][f"{name}_delta"])
    write_concept_file(file, dataclasses.replace(concept, layers=layers), torch.float32)


def test_a_run_starts_from_a_concept_whatever_its_atoms(concept):
    file, config = concept
    before = read_concept_file(file)
    with_other_atoms(file)
    run = built(dataclasses.replace(config, init_from=str(file), trigger_word="zwx", use_ema=True))
    cold = run.optimizer.state_dict()
    warm_start(run, take_step)
    assert_close(change_in(run), changes_of(before).values)
    assert torch.equal(run.model.token_embeddings["text_encoder"][0], before.tokens["sks"]["text_encoder"])
    assert run.optimizer.state_dict() == cold
    for average, parameter in zip(run.ema.shadow_params, run.trainable.values(), strict=True):
        assert torch.equal(average, parameter)
    assert run.start == [{"name": "first", "sha256": hash_file(file), "weight": 1.0, **_told(before)}]


def _told(concept):
    return {key: concept.training[key] for key in ("steps", "seed", "final_loss")}


def test_layers_that_a_concept_lacks_start_cold(concept):
    file, config = concept
    whole = read_concept_file(file)
    some = {module: whole.layers[module] for module in list(whole.layers)[:2]}
    fingerprint = {module: whole.fingerprint[module] for module in some}
    write_concept_file(file, dataclasses.replace(whole, layers=some, fingerprint=fingerprint, tokens={}))
    run = built(dataclasses.replace(config, init_from=str(file)))
    word = run.model.token_embeddings["text_encoder"].detach().clone()
    warm_start(run, take_step)
    for key, values in change_in(run).items():
        assert bool(values.any()) == (key.rpartition(".")[0] in some)
    assert torch.equal(run.model.token_embeddings["text_encoder"], word)


def test_a_pruned_concept_is_a_start_like_others(concept, tmp_path):
    file, config = concept
    small = tmp_path / "small.safetensors"
    prune_file(PruneConfig(str(file), str(small), keep=0.5))
    run = built(dataclasses.replace(config, init_from=str(small)))
    warm_start(run, take_step)
    expected, found = changes_of(read_concept_file(small)).values, change_in(run)
    assert_close({key: found[key] for key in expected}, expected)
    assert not any(values.any() for key, values in found.items() if key not in expected)


@pytest.mark.slow
def test_directions_that_layers_share_start_from_the_nearest_concept_alone(config, adapter_file, tmp_path):
    shared = Path(adapter_file("atoms")).with_name("shared.json")
    shared.write_text(json.dumps({"peft_type": "ATOMS", "basis": "dct", "share": "kind"}))
    config = dataclasses.replace(config, adapter=str(shared), learning_rate=0.05, token_learning_rate=0.05)
    library = tmp_path / "library"
    for seed in (0, 1):
        train(dataclasses.replace(config, output_dir=str(library / str(seed)), seed=seed))
    nearest = read_concept_file(library / "0" / "teapot.atoms.safetensors")
    run = built(dataclasses.replace(config, init_from=str(library), init_probe_steps=3), read_adapter(str(shared)))
    warm_start(run, take_step)
    assert [(each["name"], each["weight"]) for each in run.start] == [("0/teapot", 1.0)]
    for module, tensors in atom_tensors(run.model.denoiser, "default").items():
        for kind, tensor in nearest.layers[f"unet.{module}"].items():
            assert torch.equal(tensors[kind], tensor)


def test_layers_that_a_concept_lacks_start_without_a_change_of_shared_directions(config, adapter_file):
    config = dataclasses.replace(config, adapter=adapter_file("shared"), learning_rate=0.05)
    file = train(config)
    whole = read_concept_file(file)
    names = list(whole.layers)
    some = {module: whole.layers[module] for module in names[: len(names) // 2]}
    fingerprint = {module: whole.fingerprint[module] for module in some}
    write_concept_file(file, dataclasses.replace(whole, layers=some, fingerprint=fingerprint))
    run = built(dataclasses.replace(config, init_from=str(file)), read_adapter(config.adapter))
    cold = atom_tensors(run.model.denoiser, "default")
    cold = {module: {kind: tensor.clone() for kind, tensor in tensors.items()} for module, tensors in cold.items()}
    warm_start(run, take_step)
    written = {kind for tensors in some.values() for kind in tensors}
    layers = atom_tensors(run.model.denoiser, "default")
    assert layers.keys() > {module.partition(".")[2] for module in some}
    for module, tensors in layers.items():
        for kind, delta in SharedAtoms.deltas(tensors).items():
            concept = some.get(f"unet.{module}")
            expected = torch.zeros_like(delta) if concept is None else SharedAtoms.deltas(concept)[kind]
            assert torch.equal(delta, expected)
            shared, mix = (kind.replace("_delta", end) for end in ("_shared", "_mix"))
            if concept is None and not tensors[shared].any():  # of a kind that the concept has no layer of
                assert torch.equal(tensors[mix], cold[module][mix])
    assert written == {"atom_mix", "atom_shared", "channel_mix", "channel_shared"}
    missing = [path for path in layers if f"unet.{path}" not in some]
    take_step(run, 1)
    for path in missing:  # they learn as others do
        assert any(tensor.any() for tensor in SharedAtoms.deltas(layers[path]).values())


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_a_trigger_word_is_the_mean_of_the_concepts_that_have_it(concept, lacking):
    file, config = concept
    trained = read_concept_file(file)
    files = []
    for number in range(2):
        words = {"sks": {encoder: (number + 1) * vector for encoder, vector in trained.tokens["sks"].items()}}
        words = {} if number < lacking else words
        files.append(file.with_name(f"{number}.atoms.safetensors"))
        write_concept_file(files[-1], dataclasses.replace(trained, tokens=words), torch.float32)
    file.unlink()
    run = built(dataclasses.replace(config, init_from=str(file.parent), init_probe_steps=4))
    cold = run.model.token_embeddings["text_encoder"].detach().clone()
    warm_start(run, take_step)
    weights = {each["name"]: each["weight"] for each in run.start}
    assert weights == {"0": pytest.approx(0.5), "1": pytest.approx(0.5)}
    vector = trained.tokens["sks"]["text_encoder"]
    expected = (1.5 * vector, 2 * vector, cold[0])[lacking]
    assert torch.allclose(run.model.token_embeddings["text_encoder"][0], expected)


@pytest.mark.slow
def test_the_nearest_concepts_of_a_library_are_averaged_by_their_similarity(concept, tmp_path, capfd):
    file, config = concept
    library, generator = tmp_path / "library", torch.Generator().manual_seed(0)
    noise = lambda size: lambda delta: delta + size * delta.std() * torch.randn(delta.shape, generator=generator)  # noqa: E731
    for name, change in (("near", noise(1.0)), ("far", noise(5.0)), ("against", lambda delta: -delta)):
        copy = library / f"{name}.atoms.safetensors"
        copy.write_bytes(file.read_bytes())
        with_other_atoms(copy, change)
    config = dataclasses.replace(config, init_from=str(library), init_probe_steps=4, init_concepts=2)
    run = built(config)
    cold = {name: parameter.detach().clone() for name, parameter in run.trainable.items()}
    warm_start(run, take_step)
    assert [each["name"] for each in run.start] == ["first", "near"]
    similarities = [each["similarity"] for each in run.start]
    assert similarities[0] > 0.999 and similarities[0] > similarities[1] > 0.3  # the probe learns what that run learned
    for each in run.start:
        assert each["weight"] == pytest.approx(each["similarity"] / sum(similarities))
    files = [read_concept_file(library / f"{each['name']}.atoms.safetensors") for each in run.start]
    weights = [each["weight"] for each in run.start]
    parts = [changes_of(each).values for each in files]
    assert_close(change_in(run), {key: weights[0] * parts[0][key] + weights[1] * parts[1][key] for key in parts[0]})
    words = [each.tokens["sks"]["text_encoder"] for each in files]
    assert torch.allclose(run.model.token_embeddings["text_encoder"][0], weights[0] * words[0] + weights[1] * words[1])
    assert state_of(run)["optimizer"]["state"] == {}
    assert "starting from the mean of first (1.000), near (0." in capfd.readouterr().err
    for name in ("first", "near", "far"):
        (library / f"{name}.atoms.safetensors").unlink()
    run = built(config)
    warm_start(run, take_step)
    assert run.start == [] and "no concept is similar: the run starts cold" in capfd.readouterr().err
    assert all(torch.equal(parameter, cold[name]) for name, parameter in run.trainable.items())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["file", "library"])
def test_a_resumed_run_ends_with_the_same_bytes(concept, source, tmp_path):
    file, config = concept
    init = {"init_from": str(file)} if source == "file" else {"init_from": str(file.parent), "init_probe_steps": 2}
    config = dataclasses.replace(config, checkpointing_steps=2, use_ema=True, **init)
    whole = train(config)
    expected, training = concept_bytes(whole), read_concept_file(whole).training
    assert [each["sha256"] for each in training["init_from"]] == [hash_file(file)]
    assert ("similarity" in training["init_from"][0]) == (source == "library")
    assert str(tmp_path) not in json.dumps(training)
    assert "started from    first (1)" in describe(whole)
    cold = train(dataclasses.replace(config, output_dir=str(tmp_path / "cold"), init_from=None, **DEFAULTS))
    assert "init_from" not in read_concept_file(cold).training and concept_bytes(cold) != expected
    assert not {*DEFAULTS} & {*read_concept_file(cold).training["config"]}

    resumed = dataclasses.replace(config, resume_from_checkpoint="checkpoint-2")
    assert concept_bytes(train(resumed)) == expected
    with pytest.raises(UserError, match=r"checkpoint-2: (started from first|written with init_)"):
        train(dataclasses.replace(resumed, init_from=None, **DEFAULTS))
    with_other_atoms(file)
    with pytest.raises(UserError, match="checkpoint-2: started from first, init_from=.* now has other files. Restore"):
        train(resumed)


DEFAULTS = {"init_probe_steps": 20, "init_concepts": 3}


def test_what_a_run_cannot_start_from_is_refused_before_it_begins(concept, train_config, adapter_file, tmp_path):
    file, config = concept
    config = dataclasses.replace(config, init_from=str(file))
    check_runs([config])
    empty = tmp_path / "empty"
    empty.mkdir()
    loras = tmp_path / "loras"
    loras.mkdir()
    factors = {"unet.conv_in.lora_A.weight": torch.ones(1, 36), "unet.conv_in.lora_B.weight": torch.ones(32, 1)}
    save_file(factors, loras / "lora.safetensors")
    blocks = {"adapter": adapter_file("atoms")}
    for fields, reason in (
        ({"adapter": adapter_file("lora")}, "expected an adapter of atoms"),
        (blocks, r"first.* has other atoms than the run trains \(channel_block=4, not 2\)"),
        ({"num_vectors": 2}, "has the trigger words sks of 1 vectors; the run trains sks of 2"),
        ({"train_token": False}, "the run trains none"),
        ({"init_from": str(empty)}, "found no concepts there"),
        ({"init_from": str(loras)}, "found no concepts of atoms there, only 1 LoRA"),
    ):
        with pytest.raises(UserError, match=reason):
            check_runs([dataclasses.replace(config, **fields)])
    result = Path(config.output_dir) / "teapot.atoms.safetensors"
    result.parent.mkdir(exist_ok=True)
    result.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="the result=.* is init_from, too"):
        check_runs([dataclasses.replace(config, init_from=str(result))])
    for fields, reason in (
        ({"init_from": str(tmp_path / "nothing")}, "found nothing there"),
        ({"init_concepts": 2}, "expected init_from with it"),
        ({"init_from": str(file), "init_probe_steps": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=reason):
            train_config(**fields)


def test_what_the_base_shows_not_to_fit_is_refused(concept, tmp_path):
    file, config = concept
    config = dataclasses.replace(config, init_from=str(file))
    with pytest.raises(UserError, match="adapts unet.* which the run does not"):
        warm_start(built(config, AtomConfig(target_modules=["conv_in"])), take_step)
    whole = read_concept_file(file)
    elsewhere = {module: [2 * value for value in values] for module, values in whole.fingerprint.items()}
    write_concept_file(file, dataclasses.replace(whole, fingerprint=elsewhere))
    with pytest.raises(UserError, match="first.* was made on another base .*distance 0.5, not below .*: start from"):
        warm_start(built(config), take_step)
    with pytest.raises(UserError, match="init_from=.*none of the 1 concepts"):
        warm_start(built(dataclasses.replace(config, init_from=str(file.parent))), take_step)
    assert len(ConceptLibrary(file.parent)) == 1
    layers = {module: dict(tensors) for module, tensors in whole.layers.items()}
    layers["unet.conv_in"] = {kind: tensor for kind, tensor in layers["unet.conv_out"].items() if "channel" not in kind}
    write_concept_file(file, dataclasses.replace(whole, layers=layers))
    with pytest.raises(UserError, match=r"first.* was made on another base .*conv_in.* do not fit\): start from"):
        warm_start(built(config), take_step)


def test_a_similar_concept_that_does_not_fit_is_passed_over(concept):
    file, config = concept
    config = dataclasses.replace(config, init_from=str(file.parent), init_probe_steps=2)
    word = read_concept_file(file)
    words = {f"word{number}": vectors for number in range(2) for vectors in word.tokens.values()}
    write_concept_file(file.with_name("words.atoms.safetensors"), dataclasses.replace(word, tokens=words))
    run = built(config)
    warm_start(run, take_step)
    assert [each["name"] for each in run.start] == ["first"]
    file.unlink()
    with pytest.raises(UserError, match="no similar concept fits; the most similar: words has the trigger words"):
        warm_start(built(config), take_step)
