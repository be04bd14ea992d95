"""How files hold the layers of `share="kind"`: a table of the layers, and the values of all of them as one tensor.

A safetensors header takes about 70 bytes a tensor, and a module's name and fingerprint about 100: more than a layer has
parameters. So the table is compressed, and its fingerprints are reduced to two values a layer.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import MAX_HEADER_BYTES, MAX_SINGULAR_VALUE

TABLE, VALUES = "layer_table", "layer_values"
KEYS = frozenset({TABLE, VALUES})
"""Keys of the two tensors."""
REDUCED_LENGTH = 2
"""Values of a reduced fingerprint, of rows that have as many."""

_NAMES = ("atom", "channel")  # of atoms
_NUMBER = r"\d[0-9.e+-]{0,15}"
_SIZE = r"-|[1-9]\d{0,5}x[1-9]\d{0,5}"
_LINE = re.compile(rf"({_SIZE}) ({_SIZE}) (\S.*) ({_NUMBER}(?:,{_NUMBER})?)", re.ASCII)

Layers = Mapping[str, Mapping[str, Tensor]]


class _Kind(NamedTuple):
    """Layers that share directions; kinds come in the order of these fields."""

    component: str
    name: str
    """First part of the tensors' names."""
    num_atoms: int
    size: int


def reduce_fingerprint(values: Sequence[float]) -> list[float]:
    """The largest of a row's singular values, descending, and the norm of all others; a reduced one stays as it is."""
    if len(values) <= REDUCED_LENGTH:
        return list(values)
    return [*values[: REDUCED_LENGTH - 1], math.hypot(*values[REDUCED_LENGTH - 1 :])]


def pack(layers: Layers, fingerprint: Mapping[str, Sequence[float]]) -> tuple[bytes, Tensor]:
    """Pack layers.

    Args:
        layers: module -> `<name>_mix` (n,) and `<name>_shared` (n, m, d).
        fingerprint: module -> singular values of the base weight's rows.

    Returns:
        The table, and the values (elements,): of each kind of layers its directions (n, m, d), and the mixes of its
        layers (layers, n).

    Raises:
        UserError: layers of one kind have other directions.
    """
    modules = sorted(layers)
    sizes = {module: [_size(layers[module], name) for name in _NAMES] for module in modules}
    lines = [" ".join([*sizes[m], m, ",".join(map(_digits, reduce_fingerprint(fingerprint[m])))]) for m in modules]
    parts: list[Tensor] = []
    for kind, of_kind in _kinds(sizes):
        first = layers[of_kind[0]][f"{kind.name}_shared"]
        for module in of_kind:
            if not torch.equal(layers[module][f"{kind.name}_shared"], first):
                raise UserError(
                    f"{module} has other directions than the layers of its kind before it, and a file with "
                    "share='kind' holds them once: train or load the concept in one piece"
                )
        parts += [first.flatten(), *(layers[module][f"{kind.name}_mix"] for module in of_kind)]
    return zlib.compress("".join(f"{line}\n" for line in lines).encode(), 9), torch.cat(
        parts
    ) if parts else torch.zeros(0)


def unpack(
    table: Tensor, values: Tensor, num_directions: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[float]]]:
    """Undo `pack`; the layers of a kind share one tensor of directions.

    Args:
        table: from a file, uint8 (bytes,).
        values: from a file, (elements,).
        num_directions: n.

    Returns:
        Layers, and their reduced fingerprints.

    Raises:
        ValueError: the table is damaged, or does not fit the values.
    """
    sizes, fingerprint = _read_table(table)
    layers: dict[str, dict[str, Tensor]] = {module: {} for module in sizes}
    kinds = list(_kinds(sizes))
    counts = [num_directions * n for kind, of_kind in kinds for n in (kind.num_atoms * kind.size, len(of_kind))]
    if values.shape != (sum(counts),):
        raise ValueError(f"{VALUES} has shape {tuple(values.shape)}, and the layers need {sum(counts):,} values")
    parts = iter(values.split(counts))
    for kind, of_kind in kinds:
        shared = next(parts).reshape(num_directions, kind.num_atoms, kind.size)
        for module, mix in zip(of_kind, next(parts).reshape(-1, num_directions), strict=True):
            layers[module] |= {f"{kind.name}_mix": mix, f"{kind.name}_shared": shared}
    return layers, fingerprint


def _read_table(table: Tensor) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
    """Module -> size of each of its atoms, and -> reduced fingerprint.

    Raises:
        ValueError: the table is damaged, or larger than any header.
    """
    if table.ndim != 1:
        raise ValueError(f"{TABLE} has shape {tuple(table.shape)}, not one axis")
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(table.numpy().tobytes(), MAX_HEADER_BYTES).decode()
    except zlib.error as error:
        raise ValueError(f"{TABLE}: {error}") from error
    if not reader.eof or reader.unused_data:
        raise ValueError(f"{TABLE} is cut off, has something behind it, or has more than {MAX_HEADER_BYTES:,} bytes")
    sizes: dict[str, list[str]] = {}
    fingerprint: dict[str, list[float]] = {}
    *lines, end = text.split("\n")
    for line in lines:
        found = _LINE.fullmatch(line)
        numbers = [float(number) for number in found[4].split(",")] if found else []
        if not found or found[1] == found[2] == "-" or not all(0 <= each < MAX_SINGULAR_VALUE for each in numbers):
            raise ValueError(f"{TABLE} has the line {line!r}: expected the sizes of a layer's atoms, its name, numbers")
        sizes[found[3]], fingerprint[found[3]] = [found[1], found[2]], numbers
    if end or len(sizes) < len(lines) or list(sizes) != sorted(sizes):
        raise ValueError(f"{TABLE} has a layer twice, layers in another order than that of their names, or no end")
    return sizes, fingerprint


def _kinds(sizes: Mapping[str, Sequence[str]]) -> list[tuple[_Kind, list[str]]]:
    """The kinds of layers in their order, each with its modules in the order of their names."""
    kinds: dict[_Kind, list[str]] = {}
    for module in sorted(sizes):
        for name, size in zip(_NAMES, sizes[module], strict=True):
            if size != "-":
                num_atoms, _, length = size.partition("x")
                kind = _Kind(module.partition(".")[0], name, int(num_atoms), int(length))
                kinds.setdefault(kind, []).append(module)
    return sorted(kinds.items())


def _size(tensors: Mapping[str, Tensor], name: str) -> str:
    """The size (m, d) of a layer's atoms as the table has it."""
    shared = tensors.get(f"{name}_shared")
    return "-" if shared is None else f"{shared.shape[1]}x{shared.shape[2]}"


def _digits(value: float) -> str:
    return f"{value:.4g}"
