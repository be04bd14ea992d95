"""Similar concepts and duplicates of a library: by the changes of atoms, whatever the atoms that a file has."""

import dataclasses
import shutil
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from atomdiff.cli.main import main
from atomdiff.concepts import similarity_index
from atomdiff.concepts.atom_changes import changes_of
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file
from atomdiff.concepts.library import SIMILARITY_FILE, ConceptLibrary
from atomdiff.concepts.prune import PruneConfig, prune_file
from atomdiff.concepts.similarity import group_duplicates
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from tests.concepts.library_files import SVD, make, write


def cosine_by_hand(one, other):
    """Of S = D.T @ dD of all layers, by NumPy."""
    vectors = []
    for concept in (one, other):
        tensors = [(of, name) for _, of in sorted(concept.layers.items()) for name in ("atom", "channel")]
        tensors = [(of[f"{name}_basis"], of[f"{name}_delta"]) for of, name in tensors if f"{name}_delta" in of]
        vectors.append(np.concatenate([(d.double().numpy().T @ dd.double().numpy()).ravel() for d, dd in tensors]))
    return vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])


def test_the_most_similar_come_first_with_their_cosines(tmp_path):
    mug = make()
    others = {f"c{number}": make(number + 1, mug, number / 10) for number in range(9)}
    library = write(tmp_path, mug=mug, **others)
    found = library.similar("mug", k=4)
    assert [name for name, _ in found] == ["c8", "c7", "c6", "c5"]
    for name, similarity in library.similar(mug, k=10)[1:]:
        assert similarity == pytest.approx(cosine_by_hand(mug, others[name]), abs=1e-6)
    assert library.similar(mug, k=1) == [("mug", pytest.approx(1))]


def test_signs_order_and_rotation_of_stored_atoms_do_not_count(tmp_path):
    mug, other = make(), make(1)
    layers = {}
    for module, tensors in mug.layers.items():
        turned = torch.eye(9)[torch.randperm(9, generator=torch.Generator().manual_seed(2))] * torch.tensor(
            [1, -1, 1] * 3
        )
        layers[module] = tensors | {name: turned @ tensors[name] for name in ("atom_delta", "atom_basis")}
    same = dataclasses.replace(mug, layers=layers)
    assert not torch.equal(layers["unet.conv_in"]["atom_delta"], mug.layers["unet.conv_in"]["atom_delta"])
    found = write(tmp_path, mug=mug, same=same, other=other).similar("mug")
    assert found == [("same", pytest.approx(1)), ("other", pytest.approx(cosine_by_hand(mug, other), abs=1e-6))]


def test_layers_that_one_concept_lacks_count_as_unchanged(tmp_path):
    mug = make()
    last = "unet.conv_out"
    part = dataclasses.replace(mug, layers={last: mug.layers[last]}, fingerprint={last: mug.fingerprint[last]})
    elsewhere = make(1, shapes={"unet.conv_mid": {"atom": 9}})
    library = write(tmp_path, mug=mug, part=part, elsewhere=elsewhere)
    expected = changes_of(part).norm / changes_of(mug).norm
    assert 0.3 < expected < 0.9
    for one, other in (("mug", "part"), ("part", "mug")):
        assert library.similar(one) == [(other, pytest.approx(expected, abs=1e-6))]
    prune_file(PruneConfig(f"{tmp_path}/mug.atoms.safetensors", f"{tmp_path}/half.atoms.safetensors", keep=0.5))
    library.refresh()
    assert library.similar("half")[0] == ("mug", pytest.approx(library.similar("mug")[0].similarity, abs=1e-6))


def test_what_cannot_be_compared_is_left_out_or_refused(tmp_path):
    mug, shapes = make(), {"unet.conv_in": {"atom": 9, "channel": 16}}
    recursion = AtomConfig(channel_block=1, recursion=1, basis="dct")
    mixed = {"recursion_delta": torch.ones(9, 1, 9), "recursion_mix": torch.ones(3, 9, 1)}
    one_layer = {"unet.conv_in": [3.0, 1.0]}
    library = write(
        tmp_path,
        mug=mug,
        alike=make(1, mug, 0.5),
        other_base=make(1, mug, 0.5, base=1.1),
        nearly_same_base=make(1, mug, 0.5, base=1.001),
        other_blocks=make(1, config=AtomConfig(), shapes=shapes),
        dct=make(1, config=AtomConfig(channel_block=2, basis="dct")),
        recursive=ConceptFile(recursion, {"unet.conv_in": mixed}, one_layer),
        word=ConceptFile(SVD, {}, {}, {"sks": {"text_encoder": torch.ones(4)}}),
        zero=dataclasses.replace(mug, layers={m: {k: 0 * t for k, t in of.items()} for m, of in mug.layers.items()}),
    )
    assert {name for name, _ in library.similar("mug")} == {"alike", "nearly_same_base"}
    for name, reason in (
        ("recursive", "without recursion"),
        ("word", "no atoms, only trigger words"),
        ("zero", "all its deltas are zero"),
        ("dct", "none of the 9 concepts .* can be compared with the concept 'dct': expected some of the same base"),
    ):
        with pytest.raises(UserError, match=reason):
            library.similar(name)


def test_directions_that_layers_share_are_compared_by_the_deltas_that_they_make(tmp_path):
    config = AtomConfig(basis="dct", channel_block=1, share="kind", share_count=2)
    plain = AtomConfig(basis="dct", channel_block=1)
    generator, shapes = torch.Generator().manual_seed(0), {"unet.conv_in": {"atom": 9}, "unet.conv_out": {"atom": 9}}
    shared, mixes = torch.randn(2, 9, 9, generator=generator), torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    fingerprint = make(shapes=shapes).fingerprint
    layers = {m: {"atom_mix": mix, "atom_shared": shared} for m, mix in zip(fingerprint, mixes, strict=True)}
    deltas = {m: {"atom_delta": mix[0] * shared[0] + mix[1] * shared[1]} for m, mix in zip(layers, mixes, strict=True)}
    library = write(
        tmp_path, one=ConceptFile(config, layers, fingerprint), same=ConceptFile(plain, deltas, fingerprint)
    )
    assert library.similar("one") == [("same", pytest.approx(1))]


def test_sparse_atoms_are_compared_where_they_are_the_same(tmp_path):
    config = AtomConfig(basis="sparse", channel_block=1)
    one = make(config=config, shapes={"unet.conv_in": {"atom": 9}})
    basis = one.layers["unet.conv_in"]["atom_basis"]
    other = dataclasses.replace(one, layers={"unet.conv_in": {"atom_delta": torch.eye(9), "atom_basis": basis}})
    elsewhere = make(1, config=config, shapes={"unet.conv_in": {"atom": 9}})
    delta = one.layers["unet.conv_in"]["atom_delta"]
    expected = float(delta.trace() / delta.norm() / 3)
    assert write(tmp_path, one=one, other=other, elsewhere=elsewhere).similar("one") == [
        ("other", pytest.approx(expected, abs=1e-6))
    ]


def test_files_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    read_files = []
    monkeypatch.setattr(
        similarity_index, "read_concept_file", lambda path: read_files.append(path.name[:3]) or read_concept_file(path)
    )
    mug = make()
    library = write(tmp_path, mug=mug, ant=make(1, mug, 0.5), bee=make(2, mug, 0.2))
    assert not (tmp_path / SIMILARITY_FILE).exists()  # a library that is never compared does not pay
    first = library.similar("mug")
    assert [name for name, _ in first] == ["ant", "bee"] and sorted(read_files) == ["ant", "bee", "mug"]
    read_files.clear()
    assert ConceptLibrary(tmp_path).similar("mug") == first and read_files == []
    write(tmp_path, bee=make(3, mug, 0.9), cat=make(4, mug, 0.7))
    (tmp_path / "ant.atoms.safetensors").unlink()
    assert library.similar("mug") == first and read_files == []  # as of the last scan
    library.refresh()
    assert [name for name, _ in library.similar("mug")] == ["bee", "cat"] and read_files == ["bee", "cat"]
    assert [name for name, _ in ConceptLibrary(tmp_path).similar("mug")] == ["bee", "cat"]
    (tmp_path / SIMILARITY_FILE).write_bytes(b"damaged")
    assert [name for name, _ in ConceptLibrary(tmp_path).similar("mug")] == ["bee", "cat"] and len(read_files) == 5


def test_few_new_concepts_of_many_are_not_written(tmp_path):
    mug = make()
    library = write(tmp_path, mug=mug, **{f"c{number:03}": make(number + 1, mug, 0.1) for number in range(200)})
    library.similar("mug")
    before = (tmp_path / SIMILARITY_FILE).stat().st_mtime_ns
    library = write(tmp_path, near=make(999, mug, 0.9), nearer=make(998, mug, 0.95))
    assert [name for name, _ in library.similar("mug", 2)] == ["nearer", "near"]
    assert (tmp_path / SIMILARITY_FILE).stat().st_mtime_ns == before
    library = write(tmp_path, nearest=make(997, mug, 0.99))
    assert [name for name, _ in library.similar("mug", 2)] == ["nearest", "nearer"]
    assert (tmp_path / SIMILARITY_FILE).stat().st_mtime_ns > before


def test_a_file_that_cannot_be_written_is_warned_of(tmp_path):
    mug = make()
    library = write(tmp_path, mug=mug, ant=make(1, mug, 0.5))
    (tmp_path / SIMILARITY_FILE).mkdir()  # in the way
    with pytest.warns(UserWarning, match="similarity.safetensors: cannot be written"):
        found = library.similar("mug")
    assert [name for name, _ in found] == ["ant"] and library.similar("mug") == found


def test_duplicates(tmp_path):
    mug, word = make(), ConceptFile(SVD, {}, {}, {"sks": {"text_encoder": torch.ones(4)}})
    tokens = dataclasses.replace(mug, tokens={"sks": {"text_encoder": torch.ones(4)}})
    cup = make(5)
    cups = make(6, cup, 0.97)
    same = {"copy": mug, "same_word": word}
    library = write(tmp_path, mug=mug, word=word, other=make(1), tokens=tokens, cup=cup, cups=cups, **same)
    assert library.duplicates() == [
        (("same_word", "word"), 1.0, True),
        (("copy", "mug", "tokens"), pytest.approx(1.0), False),
        (("cup", "cups"), pytest.approx(cosine_by_hand(cup, cups), abs=1e-6), False),
    ]
    assert ConceptLibrary(tmp_path).duplicates() == library.duplicates()  # from its file
    assert [group.names for group in library.duplicates(0.99999)] == [("same_word", "word"), ("copy", "mug", "tokens")]
    (_, everything) = library.duplicates(-1)
    assert everything.names == ("copy", "cup", "cups", "mug", "other", "tokens")
    least = min(cosine_by_hand(*pair) for pair in combinations((mug, make(1), cup, cups), 2))
    assert everything.similarity == pytest.approx(least, abs=1e-6)
    assert [group.names for group in library.duplicates(1.1)] == [("copy", "mug"), ("same_word", "word")]


def test_duplicates_are_found_beyond_the_rows_of_one_block(tmp_path, monkeypatch):
    monkeypatch.setattr(similarity_index, "_ROWS_AT_ONCE", 2)
    mug = make()
    library = write(
        tmp_path, a=mug, b=make(1), c=make(2), d=make(3), e=make(4, mug, 0.99), f=make(3, like=make(3), share=0.5)
    )
    assert [group.names for group in library.duplicates(0.99)] == [("d", "f"), ("a", "e")]


LAYERS = {f"unet.conv_{number}": {"atom": 9} for number in range(4)}


def without(concept, *modules):
    """A concept without some of its layers."""
    parts = (
        {module: of[module] for module in of if module not in modules} for of in (concept.layers, concept.fingerprint)
    )
    return dataclasses.replace(concept, layers=next(parts), fingerprint=next(parts))


def faint(concept, *modules):
    """A concept that nearly leaves some of its layers as they are."""
    weak = {m: {k: t * (1e-4 if k.endswith("_delta") else 1) for k, t in concept.layers[m].items()} for m in modules}
    return dataclasses.replace(concept, layers=concept.layers | weak)


def in_every_order(tmp_path, concepts, threshold=0.99):
    """The duplicates that a library finds whose files came one after the other, for each order."""
    found = []
    for number, order in enumerate(permutations(concepts)):
        folder = tmp_path / str(number)
        folder.mkdir()
        library = ConceptLibrary(folder)
        for name in order:
            write(folder, **{name: concepts[name]})
            library.refresh()
            library.duplicates(threshold)
        found.append(library.duplicates(threshold))
        assert ConceptLibrary(folder).duplicates(threshold) == found[-1]  # from its file
    return found


def same_groups(found):
    """Check that duplicates are the same but for rounding, and return the names."""
    for groups in found:
        assert [(group.names, pytest.approx(group.similarity, abs=1e-5)) for group in groups] == [
            group[:2] for group in found[0]
        ]
    return [group.names for group in found[0]]


@pytest.mark.slow
def test_duplicates_are_found_whatever_layers_they_lack_and_whenever_they_came(tmp_path):
    mug = faint(make(shapes=LAYERS), "unet.conv_0", "unet.conv_1")
    one, two = without(mug, "unet.conv_0"), without(mug, "unet.conv_1")
    other = make(1, shapes=LAYERS)
    concepts = {"mug": mug, "one": one, "two": two, "other": without(other, "unet.conv_2")}
    assert same_groups(in_every_order(tmp_path, concepts)) == [("mug", "one", "two")]
    (tmp_path / "apart").mkdir()
    library = write(tmp_path / "apart", one=one, two=two)
    assert [group.names for group in library.duplicates()] == [("one", "two")]


@pytest.mark.slow
def test_a_concept_is_compared_with_all_that_it_can_be(tmp_path):
    """With those that cannot be compared with each other, too, and neither with those of another base."""
    shapes = {module: {**sizes, "channel": 16} for module, sizes in LAYERS.items()}
    whole = make(shapes=shapes, config=AtomConfig(channel_block=4))
    kernels = {m: {k: t for k, t in of.items() if k.startswith("atom")} for m, of in whole.layers.items()}
    channels = {size: {"channel_basis": torch.eye(size), "channel_delta": 1e-4 * torch.eye(size)} for size in (4, 16)}
    concepts = {
        name: ConceptFile(config, {m: of | channels.get(size, {}) for m, of in kernels.items()}, whole.fingerprint)
        for name, config, size in (
            ("part", AtomConfig(channel_block=1), 1),
            ("twos", SVD, 4),
            ("fours", AtomConfig(channel_block=4), 16),
        )
    }
    found = in_every_order(tmp_path, concepts | {"other_base": make(shapes=LAYERS, base=1.1)})
    assert same_groups(found) == [("fours", "part", "twos")]
    library = ConceptLibrary(tmp_path / "0")
    assert {name for name, _ in library.similar("fours")} == {name for name, _ in library.similar("twos")} == {"part"}
    assert {name for name, _ in library.similar("part")} == {"fours", "twos"}
    (tmp_path / "apart").mkdir()
    library = write(tmp_path / "apart", fours=concepts["fours"], twos=concepts["twos"])
    assert library.duplicates() == []  # nothing connects them


def test_concepts_without_a_layer_in_common_are_not_compared(tmp_path):
    mug = make(shapes=LAYERS)
    first, last = without(mug, "unet.conv_0", "unet.conv_1"), without(mug, "unet.conv_2", "unet.conv_3")
    found = in_every_order(tmp_path, {"mug": mug, "first": first, "last": last}, threshold=-1)
    for groups in found:
        assert [group.names for group in groups] == [("first", "last", "mug")]  # the mug connects them
        assert groups[0].similarity > 0.5  # which is no cosine of the two
    library = ConceptLibrary(tmp_path / "0")
    assert [name for name, _ in library.similar("first")] == ["mug"]


def test_concepts_of_any_layers_make_few_groups(tmp_path):
    mug = make(shapes=LAYERS)
    names = list(LAYERS)
    parts = [names[:1], names[1:2], names[2:], names[:2], names[1:3], names[3:], names[::2]]
    library = write(tmp_path, **{f"c{number}": without(mug, *part) for number, part in enumerate(parts)})
    library.duplicates()
    assert len(library._similarity_index()._groups) == 1


def test_pairs_make_groups():
    links = [("a", "b", 0.9), ("c", "d", 0.95), ("b", "c", 0.8), ("a", "d", 0.5), ("x", "y", 0.99)]
    contents = dict.fromkeys("abcdx", "one") | {"y": "other"}
    assert group_duplicates(links, contents) == [(("a", "b", "c", "d"), 0.5, True), (("x", "y"), 0.99, False)]


def test_the_command(tmp_path, tmp_path_factory, capsys):
    mug = make()
    write(tmp_path, mug=mug, copy=mug, ant=make(1, mug, 0.5), other=make(2, base=2.0))
    assert main(["similar", f"{tmp_path}/mug.atoms.safetensors", "--library", str(tmp_path), "--k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == " 1.0000  copy" and lines[1].endswith("  ant") and len(lines) == 3
    assert lines[2] == "not compared: 1 of another base, or with other kinds of atoms or layers"
    copy = shutil.copy(tmp_path / "mug.atoms.safetensors", tmp_path_factory.mktemp("elsewhere"))
    assert main(["similar", copy, "--library", str(tmp_path), "--k", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [" 1.0000  copy", " 1.0000  mug"]
    assert main(["similar", "mug", "--library", str(tmp_path)]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[:2]] == ["copy", "ant"]
    assert main(["similar", "--library", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "equal: copy, mug\n"
    (tmp_path / "copy.atoms.safetensors").unlink()
    assert main(["similar", "--library", str(tmp_path)]) == 0
    assert "no duplicates among 3 concepts" in capsys.readouterr().out
    for options in (["nothing", "--library", str(tmp_path)], ["--library", f"{tmp_path}/none"], ["mug"]):
        assert main(["similar", *options]) != 0


def test_changes_of_a_concept_on_a_gpu_are_on_the_cpu():
    with FakeTensorMode():
        tensors = {"atom_delta": torch.empty(9, 9, device="cuda"), "atom_basis": torch.empty(9, 9, device="cuda")}
        config = AtomConfig(channel_block=1)
        concept = ConceptFile(layers={"unet.conv": tensors}, config=config, fingerprint={})
        changes = changes_of(concept)
    assert {values.device.type for values in changes.values.values()} == {"cpu"}
