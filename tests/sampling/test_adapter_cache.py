"""The concepts in a pipeline during a large job; the images are tested in test_sample.py."""

from collections import Counter

import pytest
import torch

import atomdiff
from atomdiff.concepts.concept_file import ConceptFile, write_concept_file
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.pipelines.loaded_concepts import list_atoms
from atomdiff.pipelines.placeholder_tokens import tokens_in
from atomdiff.sampling import adapter_cache
from atomdiff.sampling.adapter_cache import AdapterCache
from atomdiff.sampling.prompt_requests import read_requests
from atomdiff.utils.errors import UserError

NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture
def library(tiny_pipe, tmp_path):
    """Five concepts called "sks" whose embeddings are 1, 2, 3 ...; "dog" has only that."""
    tiny_pipe.unet.add_adapter(atomdiff.AtomConfig(target_modules=["conv_in"], channel_block=1))
    tiny_pipe.unet.conv_in.atom_delta["default"].data.fill_(0.1)
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "library" / "any.atoms.safetensors")
    concept = ConceptLibrary(path.parent)["any"]
    atomdiff.unload_atoms(tiny_pipe)
    path.unlink()
    for number, name in enumerate(NAMES, start=1):
        layers, fingerprint = ({}, {}) if name == "dog" else (concept.layers, concept.fingerprint)
        tokens = {"sks": {"text_encoder": torch.full((32,), float(number))}}
        contents = ConceptFile(concept.config, layers, fingerprint, tokens, trigger_phrase=f"sks {name}")
        write_concept_file(path.parent / f"{name}.atoms.safetensors", contents)
    return ConceptLibrary(path.parent)


@pytest.fixture
def loads(monkeypatch):
    """Counts how often each concept is loaded, by the name of its adapter."""
    counted, load = Counter(), adapter_cache.load_concept

    def count(pipe, source, name, **settings):
        counted[name.partition("-")[0]] += 1
        return load(pipe, source, name, **settings)

    monkeypatch.setattr(adapter_cache, "load_concept", count)
    return counted


@pytest.fixture
def lines(library):
    """One line for each concept, by name; "" uses none."""
    found = read_requests(["sks", *(f"sks <atoms:{name}>" for name in NAMES)], library=library)
    return dict(zip(("", *NAMES), found, strict=True))


def test_a_switch_that_fails_is_not_taken_for_done(tiny_pipe, lines, monkeypatch):
    cache = AdapterCache(tiny_pipe)
    weights = {}
    for name in ("bee", "ant"):
        with cache.use([lines[name]]):
            weights[name] = tiny_pipe.unet.conv_in.base_layer.weight.clone()
    layer_type = type(tiny_pipe.unet.conv_in)
    write = layer_type.write

    def fail(self, *args):
        write(self, *args)
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(layer_type, "write", fail)
        with pytest.raises((UserError, RuntimeError), match="out of memory"), cache.use([lines["bee"]]):
            pass
    with cache.use([lines["ant"]]):
        assert torch.equal(tiny_pipe.unet.conv_in.base_layer.weight, weights["ant"])
        assert tiny_pipe.unet.conv_in.active_adapters[0].startswith("ant")


def embedding(pipe, word):
    (token,) = pipe.tokenizer.encode(word, add_special_tokens=False)
    return pipe.text_encoder.get_input_embeddings().weight[token].mean().item()


def test_every_line_is_spelled_with_the_embedding_of_its_concept(tiny_pipe, lines, monkeypatch):
    monkeypatch.setattr(adapter_cache, "MAX_LOADED", 3)
    before = tiny_pipe.text_encoder.get_input_embeddings().weight.clone()
    cache = AdapterCache(tiny_pipe)
    for batch in (("ant", "bee", ""), ("cat", "dog"), ("eel", "ant", "dog"), ("bee", "cat")):
        with cache.use([lines[name] for name in batch]):
            spelled = {name: cache.replace_trigger_words(lines[name], "sks") for name in batch}
            assert len(set(spelled.values())) == len(batch)
            for name, word in spelled.items():
                assert word == "sks" if not name else embedding(tiny_pipe, word) == NAMES.index(name) + 1
    table = tiny_pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[: len(before)], before) and len(table) <= len(before) + 3 == 3 + len(before)
    assert len(tokens_in(tiny_pipe)) == 3


@pytest.mark.slow
def test_those_used_last_stay(tiny_pipe, lines, loads, monkeypatch):
    monkeypatch.setattr(adapter_cache, "MAX_LOADED", 3)
    cache = AdapterCache(tiny_pipe)
    for batch in ("ant", "bee", "cat", "ant", "eel", "ant", "cat", "bee"):  # eel puts bee out, bee eel
        with cache.use([lines[batch]]):
            assert any(concept.name.startswith(batch) and concept.merged for concept in list_atoms(tiny_pipe))
        assert len(list_atoms(tiny_pipe)) <= 3
    assert loads == {"ant": 1, "bee": 2, "cat": 1, "eel": 1}


def test_what_a_batch_needs_stays_and_what_it_does_not_makes_room(tiny_pipe, lines, loads, monkeypatch):
    monkeypatch.setattr(adapter_cache, "MAX_LOADED", 2)
    cache = AdapterCache(tiny_pipe)
    for batch in (("ant", "bee"), ("ant", "cat"), ("eel", "cat", "ant")):
        with cache.use([lines[name] for name in batch]):
            assert {concept.name.partition("-")[0] for concept in list_atoms(tiny_pipe)} == set(batch)
    assert max(loads.values()) == 1


def test_weights_are_written_once_for_batches_alike(tiny_pipe, lines, monkeypatch):
    written, write = [], adapter_cache.set_active
    monkeypatch.setattr(adapter_cache, "set_active", lambda pipe, used: written.append(list(used)) or write(pipe, used))
    base = tiny_pipe.unet.conv_in.weight.clone()
    cache = AdapterCache(tiny_pipe)
    batches = [("ant", "ant"), ("ant",), ("", "ant"), ("ant",), ("",), ("ant",), ("ant", "bee"), ("ant",), ("ant",)]
    for batch in batches:
        with cache.use([lines[name] for name in batch]):
            changed = not torch.equal(tiny_pipe.unet.conv_in.base_layer.weight, base)
            assert changed == (batch[:1] == ("ant",) and batch[-1:] == ("ant",)) or len(set(batch)) > 1
    assert written == [["ant-1"], [], ["ant-1"], ["ant-1"]]  # a load restores the weights


def test_a_concept_that_does_not_fit_is_named_with_its_file(tiny_pipe, library):
    contents = library["ant"]
    layers = {module.replace("conv_in", "conv_inn"): kinds for module, kinds in contents.layers.items()}
    fingerprint = {module: next(iter(contents.fingerprint.values())) for module in layers}
    write_concept_file(library.folder / "odd.atoms.safetensors", ConceptFile(contents.config, layers, fingerprint))
    tokens = {"sks": {"text_encoder": torch.ones(3)}}
    write_concept_file(library.folder / "short.atoms.safetensors", ConceptFile(contents.config, {}, {}, tokens))
    for name, message in (("odd", "no unet.conv_inn"), ("short", r"the embedding of 'sks' has shape \(3,\)")):
        lines = read_requests([f"sks <atoms:{name}>"], library=library)
        with pytest.raises(UserError, match=rf"the concept '{name}' \(.*{name}.atoms.safetensors\): .*{message}"):
            with AdapterCache(tiny_pipe).use(lines):
                pass


def test_a_concept_in_memory_loads_as_its_file_does(tiny_pipe, library):
    path = library.folder / "bee.atoms.safetensors"
    with pytest.raises(UserError, match="in memory without a name: give adapter_name"):
        atomdiff.load_atoms(tiny_pipe, library["bee"])
    assert atomdiff.load_atoms(tiny_pipe, library["bee"], "memory", trigger_word="zwx") == "memory"
    atomdiff.load_atoms(tiny_pipe, path, "file", trigger_word="qwx")
    layer = tiny_pipe.unet.conv_in
    assert torch.equal(layer.adapted_weight(["memory"]), layer.adapted_weight(["file"]))
    assert not torch.equal(layer.adapted_weight(["memory"]), layer.unmerged_weight())
    assert embedding(tiny_pipe, "zwx") == embedding(tiny_pipe, "qwx") == 2
    with pytest.raises(UserError, match="'memory' is loaded already"):
        atomdiff.load_atoms(tiny_pipe, library["ant"], "memory")
