"""A concept is compared with the base before it is loaded."""

import pytest
import torch

from atomdiff.atoms.basis import dct_atoms
from atomdiff.concepts import compatibility
from atomdiff.concepts.compatibility import DERIVED_BASE, SAME_BASE, base_distance, fingerprint, fitting_part
from atomdiff.concepts.concept_file import ConceptFile
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError

CONFIG = AtomConfig(channel_block=2)


def base_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "unet.down.conv1": torch.randn(8, 4, 3, 3, generator=generator),
        "unet.mid.to_q": torch.randn(6, 4, generator=generator) * 3,
    }


def make_concept(**fields):
    conv = {"atom_delta": torch.ones(9, 9), "atom_basis": dct_atoms((3, 3), 9)}
    channels = {"channel_delta": torch.ones(4, 4), "channel_basis": dct_atoms((2, 2), 4)}
    prints = {m: fingerprint(w, CONFIG, m.partition(".")[2]) for m, w in base_weights().items()}
    layers = {"unet.down.conv1": conv | channels, "unet.mid.to_q": dict(channels)}
    return ConceptFile(**{"config": CONFIG, "layers": layers, "fingerprint": prints, **fields})


def test_a_fitting_base_passes():
    concept = make_concept()
    assert fitting_part(concept, base_weights(), ["unet"]) == (concept, [])
    assert base_distance(concept, base_weights()) == 0


def changed(name, **tensors):
    concept = make_concept()
    layers = {module: {**kinds, **(tensors if module == name else {})} for module, kinds in concept.layers.items()}
    return make_concept(layers={m: {k: t for k, t in kinds.items() if t is not None} for m, kinds in layers.items()})


def test_layers_that_do_not_fit_are_named():
    weights = base_weights()
    with pytest.raises(UserError, match=r"no unet.mid.to_q: .*another architecture"):
        fitting_part(make_concept(), {"unet.down.conv1": weights["unet.down.conv1"]}, ["unet"])
    with pytest.raises(UserError, match=r"unet.down.conv1 \(found .*takes .*\(5, 5\)"):
        fitting_part(make_concept(), weights | {"unet.down.conv1": torch.zeros(8, 4, 1, 5)}, ["unet"])
    for tensors in ({"channel_delta": torch.zeros(4, 3)}, {"channel_basis": None}, {"atom_delta": torch.zeros(1, 1)}):
        with pytest.raises(UserError, match=r"does not fit this base: unet.mid.to_q"):
            fitting_part(changed("unet.mid.to_q", **tensors), weights, ["unet"])
    prints = {module: values[:1] for module, values in make_concept().fingerprint.items()}
    with pytest.raises(UserError, match=r"does not fit"):
        fitting_part(make_concept(fingerprint=prints), weights, ["unet"])


def test_more_atoms_than_the_base_has_numbers_are_an_error_of_the_file():
    with pytest.raises(UserError, match="does not fit this base: num_atoms=10, but"):
        fitting_part(make_concept(config=AtomConfig(channel_block=2, num_atoms=10)), base_weights(), ["unet"])


def one_layer(weight, config, atoms, size):
    tensors = {kind: torch.ones(atoms, size) for kind in ("atom_delta", "atom_basis")}
    concept = ConceptFile(config, {"unet.conv": tensors}, {"unet.conv": [1.0] * size})
    fitting_part(concept, {"unet.conv": weight}, ["unet"])


def test_few_numbers_that_stand_for_large_matrices_are_refused():
    wide = AtomConfig(channel_block=32, joint=True, num_atoms=1)
    with pytest.raises(UserError, match="1 atoms of 9216 elements in unet.conv, which is too many"):
        one_layer(torch.zeros(32, 32, 3, 3), wide, 1, 32 * 32 * 9)
    with pytest.raises(UserError, match="73 atoms of 9 elements"):
        one_layer(torch.zeros(4, 4, 3, 3), AtomConfig(channel_block=1, basis="sparse", num_atoms=73), 73, 9)
    with pytest.raises(UserError, match="the sparse atoms of unet.conv are longer than 1"):
        one_layer(torch.zeros(4, 4, 3, 3), AtomConfig(channel_block=1, basis="sparse", num_atoms=12), 12, 9)


def test_only_some_of_many_wrong_layers_are_named():
    concept = make_concept()
    many = {f"unet.{i}.to_q": concept.layers["unet.mid.to_q"] for i in range(9)}
    with pytest.raises(UserError, match=r"no unet.0.to_q, unet.1.to_q, unet.2.to_q and 6 more"):
        fitting_part(make_concept(layers=many), {}, ["unet"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_is_recognised_in_any_dtype(dtype):
    rounded = {module: weight.to(dtype) for module, weight in base_weights().items()}
    assert base_distance(make_concept(), rounded) < SAME_BASE


def test_distance_grows_from_derived_to_other_bases():
    weights, noise = base_weights(), base_weights(seed=5)
    derived = {m: w + 0.1 * noise[m] for m, w in weights.items()}
    other = {m: 2 * noise[m] for m in weights}
    distances = [base_distance(make_concept(), base) for base in (weights, derived, other)]
    assert 0 == distances[0] < SAME_BASE < distances[1] < DERIVED_BASE < distances[2] <= 1
    assert base_distance(make_concept(), {m: torch.zeros_like(w) for m, w in weights.items()}) == 1


@pytest.mark.parametrize("change", ["in place", "past the version", "replaced"])
def test_a_weight_that_has_changed_has_another_fingerprint(change):
    weight = torch.randn(32, 32, 3, 3)
    config = AtomConfig(target_modules="conv")
    before = fingerprint(weight, config, "conv")
    assert fingerprint(weight, config, "conv") == before
    if change == "in place":
        weight[0, 0, 0, 1] += 100  # which is not among the values that are looked at
    elif change == "past the version":
        weight.data.mul_(2)
    else:
        weight = weight + 1
    assert fingerprint(weight, config, "conv") != before


def test_fingerprints_are_kept_as_they_were_and_not_without_end(monkeypatch):
    monkeypatch.setattr(compatibility, "_MOST_FINGERPRINTS", 2)
    monkeypatch.setattr(compatibility, "_FINGERPRINTS", {})
    config = AtomConfig(target_modules="conv")
    with torch.inference_mode():  # in which tensors have no version
        weights = [torch.randn(8, 4, 3, 3) for _ in range(3)]
    for weight in weights:
        fingerprint(weight, config, "conv").clear()
        assert len(fingerprint(weight, config, "conv")) == 9
        assert 1 <= len(compatibility._FINGERPRINTS) <= 2


class EmptiedByOthers(dict):
    """What a thread sees of a dictionary that another one empties after every access."""

    def __contains__(self, key):
        found = super().__contains__(key)
        self.clear()
        return found

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.clear()


@pytest.mark.parametrize("known", [False, True])
def test_fingerprints_can_be_forgotten_by_another_thread_at_any_time(monkeypatch, known):
    weight, config = torch.randn(8, 4, 3, 3), AtomConfig(target_modules="conv")
    monkeypatch.setattr(compatibility, "_FINGERPRINTS", {})
    expected = fingerprint(weight, config, "conv")
    forgetful = EmptiedByOthers(compatibility._FINGERPRINTS if known else {})
    monkeypatch.setattr(compatibility, "_FINGERPRINTS", forgetful)
    assert fingerprint(weight, config, "conv") == expected
