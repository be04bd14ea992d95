"""`atomdiff average`: means of runs from one start, to the bit where they can be, and refusals that say why."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import atomdiff
from atomdiff.atoms.variants import variant_of
from atomdiff.cli.main import main
from atomdiff.cli.summary import describe
from atomdiff.concepts.average import AverageConfig, average_files
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file, stored_dtype, write_concept_file
from atomdiff.concepts.prune import PruneConfig, prune_file
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file
from tests.concepts.library_files import make, orthonormal
from tests.helpers import assert_same_tensors, predict
from tests.pipelines.helpers import train


def with_word(concept, number, word="sks", **training):
    tokens = {word: {"text_encoder": torch.full((4,), float(number))}}
    return dataclasses.replace(concept, tokens=tokens, training=training, trigger_phrase=f"{word} mug")


def average(tmp_path, *concepts, weights=(), dtype=torch.float32):
    files = [str(tmp_path / f"run{number}.atoms.safetensors") for number in range(len(concepts))]
    for file, concept in zip(files, concepts, strict=True):
        write_concept_file(file, concept, dtype)
    output = tmp_path / "mean.atoms.safetensors"
    average_files(AverageConfig(files=tuple(files), output=str(output), weights=weights))
    return read_concept_file(output)


def changes(concept):
    """S or C of every delta, in float64."""
    found = {}
    for module, tensors in concept.layers.items():
        for name in ("atom", "channel"):
            if f"{name}_delta" in tensors:
                atoms, delta = tensors[f"{name}_basis"].double(), tensors[f"{name}_delta"].double()
                found[module, name] = atoms.T @ delta
    return found


def on_same_atoms(concept, seed):
    """The concept with other deltas on its own atoms."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        module: {
            kind: torch.randn(tensor.shape, generator=generator) if kind.endswith("delta") else tensor
            for kind, tensor in tensors.items()
        }
        for module, tensors in concept.layers.items()
    }
    return dataclasses.replace(concept, layers=layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_average_of_a_file_with_itself_is_that_file(tmp_path, dtype):
    concept = with_word(make(), 0.3, config={"seed": 1, "steps": 3})
    concept.layers["unet.conv_in"]["atom_delta"][0, :2] = torch.tensor(
        [-0.0, 6e-8]
    )  # the latter is subnormal in float16
    for weights in ((), (0.3, 0.7), (0.1, 0.1, 0.1), (3.0, 4.0, 5.5)):
        average(tmp_path, *[concept] * max(len(weights), 2), weights=weights, dtype=dtype)
        assert stored_dtype(tmp_path / "mean.atoms.safetensors") == dtype
        mean, run = (load_file(tmp_path / f"{name}.atoms.safetensors") for name in ("mean", "run0"))
        assert_same_tensors(mean, run)
        for name, tensor in mean.items():
            assert torch.equal(tensor.signbit(), run[name].signbit())


def test_a_weight_of_one_and_others_of_zero_gives_that_file(tmp_path):
    one, other = with_word(make(), 1), with_word(make(1), 2)
    one.layers["unet.conv_in"]["atom_delta"][0, 0] = -0.0
    for weights, number in (((2, 0), 0), ((0, 1), 1), ((0, 1, 0), 1)):
        average(tmp_path, *(one, other, one)[: len(weights)], weights=tuple(map(float, weights)), dtype=torch.float16)
        assert_same_tensors(*(load_file(tmp_path / f"{name}.atoms.safetensors") for name in ("mean", f"run{number}")))
    assert load_file(tmp_path / "run0.atoms.safetensors")["unet.conv_in.atom_delta"][0, 0].signbit()


def test_changes_and_embeddings_are_means_whatever_the_atoms(tmp_path):
    runs = [with_word(make(seed), seed, config={"seed": seed, "lr": 0.1}, steps=40, seed=seed) for seed in range(3)]
    mean = average(tmp_path, *runs, weights=(1.0, 2.0, 5.0))
    found = changes(mean)
    for key, change in found.items():
        expected = sum(weight * changes(run)[key] for weight, run in zip((1, 2, 5), runs, strict=True)) / 8
        assert torch.allclose(change, expected, atol=1e-5)
    assert torch.allclose(mean.tokens["sks"]["text_encoder"], torch.full((4,), 12 / 8))
    assert torch.equal(mean.layers["unet.conv_in"]["atom_basis"], runs[0].layers["unet.conv_in"]["atom_basis"])
    assert mean.training["config"] == {"lr": 0.1} and mean.trigger_phrase == "sks mug"
    assert mean.training["average_of"][1] == {
        "name": "run1",
        "sha256": hash_file(tmp_path / "run1.atoms.safetensors"),
        "weight": 0.25,
        "steps": 40,
        "seed": 1,
    }
    assert "average of      run0 (0.125), run1 (0.25), run2 (0.625)" in describe(tmp_path / "mean.atoms.safetensors")


def test_few_atoms_are_averaged_if_they_span_the_same(tmp_path):
    config = AtomConfig(channel_block=1, num_atoms=3)
    one, other = make(config=config, shapes={"unet.conv_in": {"atom": 9}}), make(1)
    atoms = one.layers["unet.conv_in"]["atom_basis"][:3]
    turn = orthonormal(3, torch.Generator().manual_seed(5))
    deltas = [torch.randn(3, 9, generator=torch.Generator().manual_seed(seed)) for seed in (6, 7)]
    layers = [{"atom_delta": deltas[0], "atom_basis": atoms}, {"atom_delta": deltas[1], "atom_basis": turn @ atoms}]
    one, other = (dataclasses.replace(one, layers={"unet.conv_in": each}) for each in layers)
    ((_, change),) = changes(average(tmp_path, one, other)).items()
    expected = (atoms.T @ deltas[0] + (turn @ atoms).T @ deltas[1]) / 2
    assert torch.allclose(change, expected.double(), atol=1e-5)
    elsewhere = {"atom_delta": deltas[1], "atom_basis": make(2).layers["unet.conv_in"]["atom_basis"][:3]}
    with pytest.raises(UserError, match=r"run1.* with .*run0.*: unet.conv_in: it has other atoms, which make changes"):
        average(tmp_path, one, dataclasses.replace(one, layers={"unet.conv_in": elsewhere}))


@pytest.mark.parametrize("basis", ["dct", "sparse"])
def test_other_bases(tmp_path, basis):
    config, shapes = AtomConfig(channel_block=1, basis=basis), {"unet.conv_in": {"atom": 9}}
    one = make(config=config, shapes=shapes)
    other = on_same_atoms(one, 3)
    delta = average(tmp_path, one, other).layers["unet.conv_in"]["atom_delta"]
    deltas = [concept.layers["unet.conv_in"]["atom_delta"] for concept in (one, other)]
    assert torch.allclose(delta, (deltas[0] + deltas[1]) / 2)
    if basis == "sparse":
        with pytest.raises(UserError, match="other atoms, on which the same change cannot be made"):
            average(tmp_path, one, make(1, config=config, shapes=shapes))


def test_recursion_is_averaged_where_the_mix_is_the_same(tmp_path):
    def recursive(number, mix=1.0):
        tensors = {"recursion_delta": torch.full((9, 1, 9), number), "recursion_mix": torch.full((3, 9, 1), mix)}
        config = AtomConfig(channel_block=1, recursion=1, basis="dct")
        return dataclasses.replace(
            make(config=config), layers={"unet.conv_in": tensors}, fingerprint={"unet.conv_in": [1]}
        )

    mean = average(tmp_path, recursive(1.0), recursive(2.0))
    assert (mean.layers["unet.conv_in"]["recursion_delta"] == 1.5).all()
    with pytest.raises(UserError, match="another recursion_mix, and a mean of products is no product of means"):
        average(tmp_path, recursive(1.0), recursive(2.0, 3.0))


def sharing(number, mix=1.0, without=()):
    """A concept of two layers with two directions of one number."""
    config = AtomConfig(channel_block=1, basis="dct", share="kind", share_count=2)
    fingerprint = {module: values for module, values in make().fingerprint.items() if module not in without}
    shared = torch.full((2, 9, 9), number)
    return ConceptFile(
        config, {m: {"atom_mix": torch.full((2,), mix), "atom_shared": shared} for m in fingerprint}, fingerprint
    )


def shared_changes(concept):
    return {module: variant_of(concept.config).deltas(tensors) for module, tensors in concept.layers.items()}


def test_shared_directions_are_averaged_where_the_mixes_are_the_same(tmp_path):
    mean = average(tmp_path, sharing(1.0), sharing(2.0))
    assert all((tensors["atom_shared"] == 1.5).all() for tensors in mean.layers.values())
    assert mean.config.share_count == 2


@pytest.mark.parametrize("without", [(), ("unet.conv_in",)], ids=["all layers", "a layer less"])
def test_with_other_mixes_an_average_has_the_directions_of_all_concepts(tmp_path, without):
    runs = sharing(1.0), sharing(2.0, 3.0, without)
    mean = average(tmp_path, *runs, weights=(1.0, 3.0))
    assert mean.config.share_count == 4 and mean.layers.keys() == mean.fingerprint.keys() == runs[0].layers.keys()
    found, first, second = map(shared_changes, (mean, *runs))
    for module, deltas in found.items():
        expected = (first[module]["atom_delta"] + 3 * second.get(module, {}).get("atom_delta", 0.0)) / 4
        assert torch.allclose(deltas["atom_delta"], expected, atol=1e-5)
    again = average(tmp_path, *runs, weights=(1.0, 0.0))
    assert again.config.share_count == 2 and shared_changes(again).keys() == first.keys()


def test_a_layer_that_a_run_lacks_is_not_changed_by_it(tmp_path):
    runs = [with_word(make(seed), 1) for seed in range(3)]
    for run, module in zip(runs[1:], ("unet.conv_in", "unet.conv_out"), strict=True):
        del run.layers[module], run.fingerprint[module]
    for order in (runs, [runs[1], runs[0], runs[2]]):
        mean = average(tmp_path, *order, weights=(1.0, 2.0, 5.0))
        assert mean.layers.keys() == mean.fingerprint.keys() == runs[0].layers.keys()
        for key, change in changes(mean).items():
            expected = sum(
                weight * changes(run)[key] for weight, run in zip((1, 2, 5), order, strict=True) if key[0] in run.layers
            )
            assert torch.allclose(change, expected / 8, atol=1e-5)
    only = average(tmp_path, *runs[:2], weights=(0.0, 1.0))
    assert only.layers.keys() == {"unet.conv_out"}


def test_each_layer_is_compared_with_whatever_file_has_it(tmp_path):
    runs = [with_word(make(0), 1) for _ in range(3)]
    del runs[0].layers["unet.conv_out"], runs[0].fingerprint["unet.conv_out"]
    runs[2].layers["unet.conv_out"] = {kind: tensor[:, :3] for kind, tensor in runs[2].layers["unet.conv_out"].items()}
    with pytest.raises(UserError, match=r"run2.* cannot be averaged .* the tensors of unet.conv_out have other shapes"):
        average(tmp_path, *runs)


def test_what_was_not_trained_from_one_start_is_refused(tmp_path):
    one = with_word(make(), 1, config={"prediction_type": "epsilon"})
    layers = {"unet.conv_in": one.layers["unet.conv_in"]}
    fewer = dataclasses.replace(one, layers=layers, fingerprint={"unet.conv_in": one.fingerprint["unet.conv_in"]})
    elsewhere = dataclasses.replace(fewer, config=dataclasses.replace(one.config, target_modules=["conv_in"]))
    apart = dataclasses.replace(one, layers={}, fingerprint={})
    for other, reason in (
        (
            dataclasses.replace(one, config=AtomConfig()),
            "it has other atoms .channel_block=4, not 2.; average runs of one",
        ),
        (elsewhere, "only one of them adapts unet.conv_out"),
        (apart, "they have no layer in common"),
        (with_word(make(base=1.1), 1), "another base, at distance 0.0"),
        (with_word(make(), 1, "zwx"), "other trigger words .zwx, not sks.; train all with one trigger_word"),
        (dataclasses.replace(one, tokens={}), "other trigger words .none, not sks."),
        (with_word(make(), 1, config={"prediction_type": "flow"}), "predict something else .prediction_type flow, not"),
    ):
        with pytest.raises(UserError, match=rf"run1.* cannot be averaged with .*run0.*: .*{reason}"):
            average(tmp_path, one, other)
    assert not (tmp_path / "mean.atoms.safetensors").exists()


def test_pruned_files_are_refused(tiny_pipe, tmp_path):
    train(tiny_pipe, "atoms")
    source = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.safetensors")
    prune_file(PruneConfig(str(source), f"{tmp_path}/half", keep=0.5))
    for files, reason in (
        ((source, tmp_path / "half"), "pruned=True, not False"),
        ((tmp_path / "half",) * 2, "both are"),
    ):
        with pytest.raises(UserError, match=reason):
            average_files(AverageConfig(files=tuple(map(str, files)), output=f"{tmp_path}/mean"))


def test_a_pipeline_loads_the_average(tiny_pipe, tmp_path):
    for seed in (1, 2):
        train(tiny_pipe, "atoms", word="ohwx", seed=seed)
        atomdiff.save_atoms(tiny_pipe, tmp_path / f"{seed}.safetensors", dtype=torch.float32)
        atomdiff.unload_atoms(tiny_pipe)
    command = [f"{tmp_path}/1.safetensors", f"{tmp_path}/2.safetensors", "--output", f"{tmp_path}/new/mean.safetensors"]
    assert main(["average", *command, "--weights", "1", "3"]) == 0
    atomdiff.load_atoms(tiny_pipe, tmp_path / "new" / "mean.safetensors")
    found = predict(tiny_pipe)
    atomdiff.unload_atoms(tiny_pipe)
    runs = [read_concept_file(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    words = [run.tokens["ohwx"]["text_encoder"] for run in runs]
    by_hand = dataclasses.replace(
        runs[0],
        layers={
            module: {
                kind: (tensor + 3 * runs[1].layers[module][kind]) / 4 if kind.endswith("delta") else tensor
                for kind, tensor in tensors.items()
            }
            for module, tensors in runs[0].layers.items()
        },
        tokens={"ohwx": {"text_encoder": (words[0] + 3 * words[1]) / 4}},
    )
    atomdiff.load_atoms(tiny_pipe, by_hand, adapter_name="hand")
    assert torch.allclose(found, predict(tiny_pipe), atol=1e-5)


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys):
    write_concept_file(tmp_path / "a", make())
    (a, b), output = (str(tmp_path / "a"), str(tmp_path / "b")), str(tmp_path / "c")
    for files, options, reason in (
        ([a], [], "expected two concept files or more"),
        ([a, a], ["--weights", "1"], "found 1 weights for 2 files"),
        ([a, a], ["--weights", "1", "-1"], "expected numbers of at least 0"),
        ([a, a], ["--weights", "0", "0"], "of which one is above 0"),
        ([a, b], [], "is not a file"),
    ):
        assert main(["average", *files, "--output", output, *options]) == 2
        assert reason in capsys.readouterr().err
    assert main(["average", a, a, "--output", a]) == 2
