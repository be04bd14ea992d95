"""What a concept file holds, as text."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any, cast

from torch import Tensor

from atomdiff.atoms.atom_basis import ATOM_BASES
from atomdiff.atoms.sparse import sparse_quality
from atomdiff.atoms.variants import PARAMETER_NAMES, atoms_of, variant_of
from atomdiff.concepts import peft_folder
from atomdiff.concepts.compatibility import compare_base, weights_below
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file, trained_tensors
from atomdiff.concepts.layer_choice import count_by_block
from atomdiff.concepts.lora_file import has_lora_keys
from atomdiff.concepts.parameter_count import group_table
from atomdiff.concepts.sources import label_sources
from atomdiff.pipelines.models import pipeline_models
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import printable, read_safetensors_header


def describe(path: str | os.PathLike[str], base: Any = None) -> str:
    """Describe a concept as a readable table.

    Args:
        path: the file, or the folder of a PEFT adapter.
        base: a diffusers pipeline to measure the distance to, or the folder of one; None: no distance. With it,
            the quality of sparse coefficients is stated.

    Raises:
        UserError: the file is damaged, or does not fit the base.
    """
    if os.path.isdir(path):
        return _describe_folder(Path(path))
    if has_lora_keys(read_safetensors_header(path)[1]):
        raise UserError(f"{path} is a LoRA file of another program, not a concept file; load_atoms takes it as it is")
    concept = read_concept_file(path)
    trained = trained_tensors(concept)
    vectors = [vector for of in concept.tokens.values() for vector in of.values()]
    spec = concept.modelspec
    rows = {
        "concept": spec.get("title") or Path(path).name,
        "trigger phrase": concept.trigger_phrase or "-",
        "trigger words": ", ".join(concept.tokens) or "-",
        "base": concept.base_model or "-",
        "made for": ", ".join(filter(None, map(spec.get, ("architecture", "resolution", "prediction_type")))) or "-",
        "written": f"{spec.get('date', '-')} by atomdiff {concept.atomdiff_version or '-'}",
        "method": _method(concept),
        "parameters": f"{_count(trained) + _count(vectors):,} trained ({_count(vectors):,} in trigger words)",
        "bytes": f"{Path(path).stat().st_size:,}",
        "training": _training(concept) or "-",
        **label_sources(concept.training),
    }
    if selected := concept.training.get("selected_layers"):
        rows["selected layers"] = f"{selected}: {count_by_block(concept.layers)}"
    if base is not None:
        models = pipeline_models(_open(base))
        fitting, left_out, distance = compare_base(concept, models, allow_mismatch=True)
        rows["distance"] = f"{distance:.3g} (0: made on this base)"
        if left_out:
            rows["does not fit"] = "; ".join(left_out)
        if ATOM_BASES[concept.config.basis].has_coefficients:
            rows["coefficients"] = _coefficient_quality(fitting, weights_below(fitting, models))
    return "\n".join([*_lines(rows), "", *_layer_table(concept)])


def _describe_folder(path: Path) -> str:
    adapters, tokens, _ = peft_folder.read(path, None, denoiser="")
    vectors = peft_folder.count_trained({}, tokens)
    methods = {cast(Any, config).peft_type.value: None for config, _ in adapters.values()}
    rows = {
        "concept": path.name,
        "trigger words": ", ".join(tokens) or "-",
        "method": ", ".join(methods) or "token embeddings",
        "parameters": f"{peft_folder.count_trained(adapters, tokens):,} trained ({vectors:,} in trigger words)",
        "bytes": f"{sum(file.stat().st_size for file in path.rglob('*') if file.is_file()):,}",
    }
    groups = Counter((kind, tuple(tensor.shape)) for kind, tensor in peft_folder.trained_tensors(adapters))
    return "\n".join([*_lines(rows), "", *group_table(dict(groups))])


def _lines(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"{label:<{width}}  {printable(value)}" for label, value in rows.items()]


def _method(concept: ConceptFile) -> str:
    if not concept.layers:
        return "token embeddings"
    config = concept.config
    atoms = "all atoms" if config.num_atoms is None else f"{config.num_atoms} atoms"
    if config.pruned:
        atoms += ", pruned"
    return f"{atoms}, basis {config.basis}, {variant_of(config).label(config)}, layers {config.target_modules}"


def _layer_table(concept: ConceptFile) -> list[str]:
    groups: dict[tuple[str, tuple[int, ...]], set[int]] = {}
    for module, kinds in concept.layers.items():
        for kind, tensor in kinds.items():
            if kind in PARAMETER_NAMES:
                group = f"{module.partition('.')[0]} {kind}", tuple(tensor.shape)
                groups.setdefault(group, set()).add(id(tensor))  # one that layers share counts once
    return group_table({group: len(tensors) for group, tensors in groups.items()})


def _training(concept: ConceptFile) -> str:
    plain = {key: value for key, value in concept.training.items() if not isinstance(value, (dict, list))}
    plain.pop("selected_layers", None)  # which has a line of its own
    return ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in plain.items())


def _count(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _open(base: Any) -> Any:
    if not isinstance(base, (str, os.PathLike)):
        return base
    from atomdiff.pipelines.config import BaseModelConfig
    from atomdiff.pipelines.open import open_base

    return open_base(BaseModelConfig(pretrained_model_name_or_path=os.fspath(base)), None, field="base")


def _coefficient_quality(concept: ConceptFile, weights: Mapping[str, Tensor]) -> str:
    """How well the coefficients describe the base weights, as means over all atoms of all layers."""
    config, qualities = concept.config, []
    for module, tensors in concept.layers.items():
        weight = weights[module].detach()
        for atoms in atoms_of(config, module.partition(".")[2], weight.shape):
            basis = tensors.get(f"{atoms.name}_basis")
            if basis is None:  # pruned
                continue
            rows = atoms.view.rows(weight)
            coefficients = ATOM_BASES[config.basis].coefficients(rows, basis, config)
            qualities.append(sparse_quality(rows, basis, coefficients, config.sparsity))
    error, zeros = (
        mean(values) for values in zip(*((q.relative_error, q.zero_fraction) for q in qualities), strict=True)
    )
    return f"relative reconstruction error {error:.3g}, {100 * zeros:.3g} % zeros (means over layers)"
