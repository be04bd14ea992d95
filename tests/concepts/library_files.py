"""Concept files of a library, by the number that is in them, and how often they are read."""

import json
import threading
from collections import Counter
from pathlib import Path

import torch

from atomdiff.concepts import library as library_module
from atomdiff.concepts import library_index
from atomdiff.concepts.concept_file import ConceptFile, write_concept_file
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.tuner import AtomConfig

SECONDS = 30  # no thread waits longer: a test that would hang fails instead


def write_concept(folder, name, number=0.0, phrase="", words=("sks",), base_model="some/model", size=9):
    """A concept of one layer, all of whose numbers are `number`."""
    path = Path(folder) / f"{name}.atoms.safetensors"
    concept = ConceptFile(
        config=AtomConfig(channel_block=1, target_modules=["conv_in"]),
        layers={
            "unet.conv_in": {"atom_delta": torch.full((9, size), float(number)), "atom_basis": torch.zeros(9, size)}
        },
        fingerprint={"unet.conv_in": [3.0, 1.0]},
        tokens={word: {"text_encoder": torch.full((4,), float(number))} for word in words},
        base_model=base_model,
        trigger_phrase=phrase,
    )
    write_concept_file(path, concept)
    return path


def number_in(concept):
    """The number in a concept of `write_concept`."""
    return concept.layers["unet.conv_in"]["atom_delta"][0, 0].item()


def rewrite_header(path, change):
    """Change the header of a file, as a dict of JSON or as bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + size]))
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def rewrite_metadata(path, **values):
    """Change metadata of a file."""
    rewrite_header(path, lambda header: {**header, "__metadata__": {**header["__metadata__"], **values}})


SHAPES = {"unet.conv_in": {"atom": 9, "channel": 4}, "unet.conv_out": {"atom": 9}}
SVD = AtomConfig(channel_block=2)


def orthonormal(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def make(seed=0, like=None, share=0.0, config=SVD, shapes=SHAPES, base=1.0):
    """A concept with random deltas, to a share those of another one, and atoms of its own."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for module, sizes in shapes.items():
        for name, size in sizes.items():
            change = torch.randn(size, size, generator=generator)
            if like is not None:
                of = like.layers[module]
                change = (1 - share) * change + share * of[f"{name}_basis"].T @ of[f"{name}_delta"]
            atoms = orthonormal(size, generator)
            layers.setdefault(module, {})[f"{name}_delta"] = atoms @ change
            if config.stores_basis:
                layers[module][f"{name}_basis"] = atoms
    return ConceptFile(config, layers, {module: [3.0 * base, *[1.0] * 8] for module in shapes})


def write(folder, **concepts):
    for name, concept in concepts.items():
        write_concept_file(folder / f"{name}.atoms.safetensors", concept, torch.float32)
    return ConceptLibrary(folder)


class Reads:
    """Counts reads of a function that takes a path first, and can make them wait."""

    def __init__(self, monkeypatch, function):
        self.done = Counter()
        self.now = Counter()
        self.overlaps = 0
        self.before = lambda name: None
        self.after = lambda name: None
        self._lock = threading.Lock()
        module = library_module if hasattr(library_module, function) else library_index
        read = getattr(module, function)

        def counted(path):
            name = Path(path).name.partition(".")[0]
            with self._lock:
                self.done[name] += 1
                self.now[name] += 1
                self.overlaps += self.now[name] > 1
            try:
                self.before(name)
                value = read(path)
                self.after(name)
                return value
            finally:
                with self._lock:
                    self.now[name] -= 1

        monkeypatch.setattr(module, function, counted)
