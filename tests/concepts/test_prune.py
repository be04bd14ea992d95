"""`atomdiff prune`: what is kept, in which bytes, and which version of the format."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import atomdiff
from atomdiff.cli.main import main
from atomdiff.cli.summary import describe
from atomdiff.concepts.concept_file import read_concept_file, read_header, write_concept_file
from atomdiff.concepts.prune import PruneConfig, prune_file
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter
from tests.pipelines.helpers import train


def save(pipe, path, config=None, dtype=torch.float32):
    config = config or AtomConfig(target_modules=["conv1", "conv_in", "to_q"])
    add_adapter(pipe, "mug", config)
    return atomdiff.save_atoms(pipe, path, "mug", dtype=dtype)


def prune(source, output, **options):
    return prune_file(PruneConfig(file=str(source), output=str(output), **options))


def ranked_by_hand(concept):
    """(importance, module, delta, direction) of all directions, by NumPy, the most important first."""
    ranked = []
    for module, tensors in concept.layers.items():
        for delta in [kind for kind in tensors if kind.endswith("_delta")]:
            changes = tensors[delta].double().numpy()
            shares = np.full(len(changes), 1 / changes.shape[1])
            if delta == "atom_delta" or "atom_delta" not in tensors:
                squares = np.square(concept.fingerprint[module])
                shares = (squares / squares.sum())[: len(changes)]
            _, values, directions = np.linalg.svd(np.sqrt(shares)[:, None] * changes, full_matrices=False)
            ranked += [(v, module, delta, direction) for v, direction in zip(values, directions, strict=True)]
    return sorted(ranked, key=lambda each: -each[0])


def test_the_most_important_directions_of_all_layers_are_kept(tiny_pipe, tmp_path):
    concept = read_concept_file(save(tiny_pipe, tmp_path / "mug.safetensors"))
    pruned = prune(tmp_path / "mug.safetensors", tmp_path / "small.safetensors", keep=0.3)
    small = read_concept_file(tmp_path / "small.safetensors")
    ranked = ranked_by_hand(concept)
    assert (pruned.directions, pruned.all_directions) == (math.ceil(0.3 * len(ranked)), len(ranked))
    for module, tensors in concept.layers.items():
        for delta in ("atom_delta", "channel_delta"):
            if delta not in tensors:
                continue
            basis = delta.replace("delta", "basis")
            kept = [v for _, m, d, v in ranked[: pruned.directions] if (m, d) == (module, delta)]
            found = small.layers.get(module, {})
            assert (delta in found) == (basis in found) == bool(kept)
            if kept:
                projection = sum(np.outer(v, v) for v in kept)
                expected = tensors[basis].double().numpy().T @ tensors[delta].double().numpy() @ projection
                matrix = found[basis].double().numpy().T @ found[delta].double().numpy()
                np.testing.assert_allclose(matrix, expected, atol=1e-5)
                assert found[delta].shape == (len(kept), tensors[delta].shape[1])
    assert small.config.pruned and read_header(tmp_path / "small.safetensors")[0]["format_version"] == "2"
    assert pruned.bytes == (tmp_path / "small.safetensors").stat().st_size < 0.6 * pruned.all_bytes
    assert "all atoms, pruned, basis svd" in describe(tmp_path / "small.safetensors")


def test_a_share_of_one_copies_the_file(tiny_pipe, tmp_path):
    source = save(tiny_pipe, tmp_path / "mug.safetensors", dtype=torch.float16)
    size = source.stat().st_size
    for name, options in (("one", {"keep": 1.0}), ("two", {"bytes": str(size)})):
        pruned = prune(source, tmp_path / name, **options)
        assert (tmp_path / name).read_bytes() == source.read_bytes() and pruned.directions == pruned.all_directions
    assert read_header(source)[0]["format_version"] == "1"
    assert "pruned" not in read_header(source)[0]["adapter_config"]  # which older readers would refuse


def test_a_size_keeps_as_much_as_fits(tiny_pipe, tmp_path):
    source = save(tiny_pipe, tmp_path / "mug.safetensors", dtype=torch.float16)
    for limit in ("9KB", 12_000):
        pruned = prune(source, tmp_path / "small.safetensors", bytes=str(limit))
        most = 9000 if limit == "9KB" else limit
        assert pruned.bytes == (tmp_path / "small.safetensors").stat().st_size <= most
        more = prune(source, tmp_path / "more", keep=(pruned.directions + 0.5) / pruned.all_directions)
        assert more.directions == pruned.directions + 1 and more.bytes > most
    with pytest.raises(UserError, match=r"bytes=100: with 1 directions the file has [\d,]+ bytes"):
        prune(source, tmp_path / "none", bytes="100")
    assert not (tmp_path / "none").exists()


def test_without_directions_the_trigger_word_is_left(tiny_pipe, tmp_path):
    train(tiny_pipe, "atoms", word="sks")
    source = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.safetensors")
    pruned = prune(source, tmp_path / "word.safetensors", keep=0.0)
    word = read_concept_file(tmp_path / "word.safetensors")
    assert (pruned.layers, word.layers) == (0, {}) and word.tokens.keys() == {"sks"}
    write_concept_file(source, dataclasses.replace(read_concept_file(source), tokens={}))
    with pytest.raises(UserError, match="nothing of the concept is left"):
        prune(source, tmp_path / "nothing", keep=0.0)


def test_where_whole_layers_go_older_readers_read_the_file(tiny_pipe, tmp_path):
    config = AtomConfig(basis="dct", channel_block=1)
    source = save(tiny_pipe, tmp_path / "mug.safetensors", config)
    with torch.no_grad():
        concept = read_concept_file(source)
        weak = sorted(concept.layers)[:3]
        for module in weak:
            concept.layers[module]["atom_delta"].mul_(1e-4)
    write_concept_file(source, concept, torch.float32)
    pruned = prune(source, tmp_path / "small.safetensors", keep=(len(concept.layers) - 3) / len(concept.layers))
    small = read_concept_file(tmp_path / "small.safetensors")
    assert small.layers.keys() == concept.layers.keys() - set(weak) and pruned.layers == len(small.layers)
    assert read_header(tmp_path / "small.safetensors")[0]["format_version"] == "1" and not small.config.pruned


def test_the_layers_that_a_run_has_chosen_are_those_that_are_left(tiny_pipe, tmp_path):
    config = AtomConfig(target_modules=["conv1", "to_q"], select="adaptive")
    source = save(tiny_pipe, tmp_path / "mug.safetensors", config)
    all_layers = read_concept_file(source).training["selected_layers"]
    prune(source, tmp_path / "small.safetensors", keep=0.02)
    small = read_concept_file(tmp_path / "small.safetensors")
    total = all_layers.partition(" of ")[2]
    assert small.training["selected_layers"] == f"{len(small.layers)} of {total}" != all_layers
    assert f"selected layers  {len(small.layers)} of {total}: " in describe(tmp_path / "small.safetensors")


def test_whole_layers_are_kept_where_it_is_asked_for(tiny_pipe, tmp_path):
    source = save(tiny_pipe, tmp_path / "mug.safetensors")
    concept = read_concept_file(source)
    change: dict[str, float] = {}
    for importance, module, _, _ in ranked_by_hand(concept):
        change[module] = math.hypot(change.get(module, 0.0), importance)
    ordered = sorted(change, key=lambda module: -change[module])
    pruned = prune(source, tmp_path / "small.safetensors", keep=0.4, whole_layers=True)
    small, metadata = read_concept_file(tmp_path / "small.safetensors"), read_header(tmp_path / "small.safetensors")[0]
    assert small.layers.keys() == set(ordered[: math.ceil(0.4 * len(ordered))])
    assert all(torch.equal(t, concept.layers[m][kind]) for m, ts in small.layers.items() for kind, t in ts.items())
    assert metadata["format_version"] == "1" and "pruned" not in metadata["adapter_config"]
    fitting = prune(source, tmp_path / "fitting.safetensors", bytes="20KB", whole_layers=True)
    assert 0 < fitting.layers < fitting.all_layers and fitting.bytes <= 20_000 and pruned.layers == len(small.layers)


def test_a_pruned_file_is_pruned_again(tiny_pipe, tmp_path):
    source = save(tiny_pipe, tmp_path / "mug.safetensors")
    first = prune(source, tmp_path / "half.safetensors", keep=0.5)
    second = prune(tmp_path / "half.safetensors", tmp_path / "quarter.safetensors", keep=0.5)
    assert second.all_directions == first.directions and second.bytes < first.bytes
    assert atomdiff.load_atoms(tiny_pipe, tmp_path / "quarter.safetensors") == "quarter"


def test_pruned_files_with_other_shapes_are_refused(tiny_pipe, tmp_path):
    source = save(tiny_pipe, tmp_path / "mug.safetensors")
    prune(source, tmp_path / "half.safetensors", keep=0.5)
    concept = read_concept_file(tmp_path / "half.safetensors")
    module = next(module for module, tensors in concept.layers.items() if "channel_basis" in tensors)
    for basis in (torch.tensor(1.0), torch.zeros(0, 16), torch.zeros(20, 16), torch.zeros(2, 9), torch.zeros(3)):
        layers = concept.layers | {module: concept.layers[module] | {"channel_basis": basis}}
        write_concept_file(tmp_path / "bad.safetensors", dataclasses.replace(concept, layers=layers))
        with pytest.raises(UserError, match="does not fit this base"):
            atomdiff.load_atoms(tiny_pipe, tmp_path / "bad.safetensors")


def test_the_command(tiny_pipe, tmp_path, capsys):
    source, output = str(save(tiny_pipe, tmp_path / "mug.safetensors")), f"{tmp_path}/new/small.safetensors"
    assert main(["prune", source, "--keep", "0.25", "--output", output]) == 0
    assert capsys.readouterr().out.startswith("kept ") and read_concept_file(output).config.pruned
    for options in ([], ["--keep", "0.5", "--bytes", "10KB"], ["--keep", "2"], ["--bytes", "few"], ["--bytes", "0"]):
        assert main(["prune", source, "--output", output, *options]) == 2
    assert main(["prune", source, "--keep", "0.5", "--output", source]) == 2
