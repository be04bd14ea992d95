"""Warm starts: a run begins from a concept, or from the mean of the most similar concepts of a library.

Zhao et al., "Voting from Nearest Tasks: Meta-Vote Pruning of Pre-trained Models for Downstream Tasks", arXiv
2301.11560, which starts a pruned model from those of the nearest tasks, carried over to atoms.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftConfig
from torch import Tensor, nn

from atomdiff.concepts.atom_changes import trained_on
from atomdiff.concepts.compatibility import DERIVED_BASE, check_base, compare_base
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file
from atomdiff.concepts.library import ConceptLibrary
from atomdiff.concepts.sources import describe_source
from atomdiff.pipelines.save import read_atoms
from atomdiff.pipelines.token_names import group_placeholder_tokens, placeholder_tokens
from atomdiff.training.config import TrainConfig
from atomdiff.training.loop import set_learning_rates
from atomdiff.training.method import ADAPTER_NAME
from atomdiff.training.resume import put_back, state_of
from atomdiff.training.run import Run
from atomdiff.training.saving import result_path
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import adapter_configs, atom_tensors
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file
from atomdiff.utils.progress import log
from atomdiff.utils.untrusted import list_some

_MAY_DIFFER = {"num_atoms", "pruned"}  # of the settings of atoms: a change on some can be made on others


class _Source(NamedTuple):
    """A concept that a run starts from."""

    path: Path
    weight: float
    more: dict[str, Any]
    """What the metadata says besides: name and similarity in a library."""


def check_init_from(config: TrainConfig, adapter: PeftConfig | None) -> None:
    """Check before a run that it can start from `init_from`, as far as that can be told without the base.

    Raises:
        UserError: It cannot.
    """
    if config.init_from is None:
        return
    path = Path(config.init_from)
    if not isinstance(adapter, AtomConfig):
        raise UserError(f"init_from={config.init_from!r}, adapter={config.adapter!r}: expected an adapter of atoms")
    if not path.is_dir():
        _fit(config, adapter, read_concept_file(path), config.init_from)
        return
    library = ConceptLibrary(path)
    if all(library.info(name).is_lora for name in library):
        loras = f"no concepts of atoms there, only {len(library)} LoRA" if len(library) else "no concepts there"
        raise UserError(f"init_from={config.init_from!r}: found {loras}; expected *.atoms.safetensors")


def warm_start(run: Run, take_step: Callable[[Run, int], float]) -> None:
    """Give a run that has not begun the start that `init_from` says, and note in `run.start` what it was made of.

    Of a folder, the concepts most similar to what `init_probe_steps` steps of a cold start learn are chosen; then all
    is as it was before those steps, and the run begins from the mean of the concepts, weighted by their similarities.
    Deltas are brought to the run's own atoms; layers that no concept has begin without a change, words that none has as
    in a cold start, words that some have from the mean of those. The optimizer begins anew.

    Args:
        run: The run.
        take_step: Trains one step, of this number.

    Raises:
        UserError: The concept, or none of those in the folder that are similar, fits the run.
    """
    config = run.config
    path = Path(str(config.init_from))
    sources = _nearest(run, path, take_step) if path.is_dir() else [_Source(path, 1.0, {})]
    starts = [(_read(run, source.path), source.weight) for source in sources]
    _write_start(run, starts)
    for source, (concept, _) in zip(sources, starts, strict=True):
        run.start.append(describe_source(source.path, concept, source.weight) | source.more)


def _nearest(run: Run, folder: Path, take_step: Callable[[Run, int], float]) -> list[_Source]:
    """Choose concepts of a folder by a probe, after which the run is as before."""
    config = run.config
    cold = copy.deepcopy(state_of(run))
    is_main = run.accelerator.is_main_process
    if is_main:
        log(f"looking for similar concepts in {folder}: {config.init_probe_steps} steps of a cold start")
    set_learning_rates(run.optimizer, 1.0)
    for step in range(1, config.init_probe_steps + 1):
        take_step(run, step)
    chosen: list[Any] = [_choose(run, folder) if is_main else None]
    broadcast_object_list(chosen)
    put_back(run, cold)
    sources: list[_Source] = chosen[0]
    return sources


def _choose(run: Run, folder: Path) -> list[_Source]:
    """The concepts of a folder that are most like what the run has learned, and that it can start from."""
    config, models = run.config, _models(run)
    configs = {name: adapter_configs(model)[ADAPTER_NAME] for name, model in models.items()}
    layers, fingerprints = read_atoms(ADAPTER_NAME, models, configs)
    adapter = next(iter(configs.values()))
    own = result_path(adapter, Path(config.output_dir) / config.name).resolve()  # of an earlier run
    library = ConceptLibrary(folder)
    try:
        similar = library.similar(ConceptFile(adapter, layers, fingerprints), max(len(library), 1))
    except UserError as error:
        raise UserError(f"init_from={config.init_from!r}: {error}") from error
    kinds = {kind for tensors in layers.values() for kind in tensors}
    is_linear = all(kind.endswith(("_delta", "_basis")) for kind in kinds)  # a mean of products is no product of means
    most = config.init_concepts if is_linear else 1
    found: list[tuple[str, Path, float]] = []
    reason = ""
    for name, similarity in similar:
        path = library.info(name).path
        if similarity <= 0 or len(found) == most:
            break
        if path.resolve() == own:
            continue
        try:
            _fit(config, adapter, library[name], name, layers)
            found.append((name, path, similarity))
        except UserError as error:
            reason = reason or str(error)
    if not found and reason:
        raise UserError(f"init_from={config.init_from!r}: no similar concept fits; the most similar: {reason}")
    total = sum(similarity for *_, similarity in found)
    named = ", ".join(f"{name} ({similarity:.3f})" for name, _, similarity in found)
    log(f"starting from the mean of {named}" if found else "no concept is similar: the run starts cold")
    return [
        _Source(path, similarity / total, {"name": name, "similarity": similarity}) for name, path, similarity in found
    ]


def check_start(run: Run, checkpoint: str) -> None:
    """Check that a resumed run has the start that its checkpoint says; nothing is read from it any more.

    Raises:
        UserError: It started from something else.
    """
    path = None if run.config.init_from is None else Path(run.config.init_from)
    if path is not None and path.is_dir():
        library = ConceptLibrary(path)
        names = [each["name"] for each in run.start]
        now = [hash_file(library.info(name).path) if name in library else "" for name in names]
    else:
        now = [] if path is None else [hash_file(path)]
    if now == [each["sha256"] for each in run.start]:
        return
    started = list_some([each["name"] for each in run.start]) or "nothing"
    raise UserError(
        f"{checkpoint}: started from {started}, init_from={run.config.init_from!r} now has other files. Restore them, "
        "or start without resume_from_checkpoint in another output_dir"
    )


def _fit(
    config: TrainConfig,
    adapter: AtomConfig,
    concept: ConceptFile,
    name: str,
    layers: Container[str] | None = None,
) -> ConceptFile:
    """Return a concept with the trigger words of a run that starts from it.

    Args:
        config: The run.
        adapter: Its atoms.
        concept: Where it starts from.
        name: Of the concept, for messages.
        layers: Those that the run adapts, if they are known.

    Raises:
        UserError: It has other atoms, layers or words than the run trains.
    """
    if not concept.layers:
        raise UserError(f"{name} has no atoms to start from, only trigger words")
    if layers is not None and (others := sorted(module for module in concept.layers if module not in layers)):
        raise UserError(f"{name} adapts {list_some(others)}, which the run does not: choose an adapter that does")
    own, wanted = concept.config.shaping(), adapter.shaping()
    if differing := [key for key in wanted if key not in _MAY_DIFFER and own[key] != wanted[key]]:
        found = ", ".join(f"{key}={own[key]!r}, not {wanted[key]!r}" for key in differing)
        raise UserError(f"{name} has other atoms than the run trains ({found}): choose an adapter with its settings")
    groups = list(group_placeholder_tokens(concept.tokens).values())
    words = [subject.trigger_word for subject in config.subjects] if config.train_token else []
    expected = [placeholder_tokens(word, config.num_vectors) for word in words]
    groups.sort(key=lambda group: expected.index(group) if group in expected else len(expected))
    several_differ = len(expected) > 1 and groups != expected
    if groups and ([*map(len, groups)] != [*map(len, expected)] or several_differ):
        found = ", ".join(f"{group[0]} of {len(group)} vectors" for group in groups)
        trained = ", ".join(f"{group[0]} of {len(group)}" for group in expected) or "none"
        raise UserError(f"{name} has the trigger words {found}; the run trains {trained}: choose as many of each")
    renamed = {
        new: concept.tokens[old]
        for group, of_run in zip(groups, expected, strict=False)
        for old, new in zip(group, of_run, strict=True)
    }
    return dataclasses.replace(concept, tokens=renamed)


def _read(run: Run, path: Path) -> ConceptFile:
    """Read a concept that the run starts from, and check that it is of the run's base."""
    models = _models(run)
    adapter = adapter_configs(next(iter(models.values())))[ADAPTER_NAME]
    layers = {f"{part}.{module}" for part, model in models.items() for module in atom_tensors(model, ADAPTER_NAME)}
    concept = _fit(run.config, adapter, read_concept_file(path), str(path), layers)
    _, left_out, distance = compare_base(concept, models, allow_mismatch=True)
    if left_out or distance > DERIVED_BASE:
        how = f"{left_out[0]} do not fit" if left_out else f"at distance {distance:.3g}, not below {DERIVED_BASE}"
        raise UserError(
            f"init_from={run.config.init_from!r}: {path.name} was made on another base than the run's ({how}): "
            "start from a concept of this base"
        )
    return check_base(concept, models)[0]


def _models(run: Run) -> dict[str, nn.Module]:
    """The models that the run trains atoms of, by component."""
    models = {run.model.base.denoiser: run.model.denoiser} | dict(run.model.text_encoders.items())
    return {name: model for name, model in models.items() if ADAPTER_NAME in adapter_configs(model)}


@torch.no_grad()
def _write_start(run: Run, concepts: Sequence[tuple[ConceptFile, float]]) -> None:
    """Write the mean of concepts, whose weights make 1, into the trained parameters of a run."""
    for own, mean in [*_adapter_means(run, concepts), *_embedding_means(run, concepts)]:
        own.copy_(mean)
    if run.ema is not None:
        for average, parameter in zip(run.ema.shadow_params, run.trainable.values(), strict=True):
            average.copy_(parameter)


def _adapter_means(run: Run, concepts: Sequence[tuple[ConceptFile, float]]) -> list[tuple[Tensor, Tensor]]:
    """Trained tensors of the run's adapter, and the mean for each; layers that a concept lacks count as unchanged."""
    means: dict[int, tuple[Tensor, Tensor]] = {}  # by parameter
    for concept, weight in concepts:
        values = _adapter_values(run, concept)
        for own, tensor in {own.data_ptr(): (own, tensor) for own, tensor in values}.values():  # layers may share some
            _check_shape(run, own, tensor)
            _, mean = means.setdefault(own.data_ptr(), (own, torch.zeros(tensor.shape, dtype=torch.float64)))
            mean += weight * tensor.double()
    return list(means.values())


def _adapter_values(run: Run, concept: ConceptFile) -> list[tuple[Tensor, Tensor]]:
    """Trained tensors of the run's adapter, and what a concept has for each, on the run's atoms.

    In a layer that it lacks a random mix of directions that are not zero any more would be a change: it gets zeros.
    """
    values: list[tuple[Tensor, Tensor]] = []
    missing: list[tuple[Tensor, Tensor]] = []  # mixes, and the directions that they mix
    for component, model in _models(run).items():
        for module, own in atom_tensors(model, ADAPTER_NAME).items():
            tensors = concept.layers.get(f"{component}.{module}", {})
            try:
                trained = trained_on({kind: each.cpu() for kind, each in own.items()}, tensors, concept.config.basis)
            except UserError as error:
                raise UserError(f"init_from={run.config.init_from!r}: {module}: {error}") from error
            values += [(own[kind], tensor) for kind, tensor in trained.items()]
            shared = {kind: kind.replace("_shared", "_mix") for kind in own if kind.endswith("_shared")}
            missing += [(own[mix], own[kind]) for kind, mix in shared.items() if mix not in trained]
    written = {own.data_ptr() for own, tensor in values if tensor.any()}
    return values + [(mix, torch.zeros_like(mix)) for mix, shared in missing if shared.data_ptr() in written]


def _embedding_means(run: Run, concepts: Sequence[tuple[ConceptFile, float]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Token embeddings of the run, and for each the mean of the concepts that have it."""
    for row, token in enumerate(run.model.placeholder_tokens):
        for encoder, embeddings in run.model.token_embeddings.items():
            tokens = [(concept.tokens.get(token, {}), weight) for concept, weight in concepts]
            found = [(vectors[encoder], weight) for vectors, weight in tokens if encoder in vectors]
            for vector, _ in found:
                _check_shape(run, embeddings.data[row], vector)
            if found:
                total = sum(weight for _, weight in found)
                parts = [weight / total * vector.double() for vector, weight in found]
                yield embeddings.data[row], torch.stack(parts).sum(0)


def _check_shape(run: Run, own: Tensor, tensor: Tensor) -> None:
    if own.shape != tensor.shape:
        found = f"found tensors of shape {tuple(tensor.shape)}, the run trains {tuple(own.shape)}"
        raise UserError(f"init_from={run.config.init_from!r}: {found}; choose an adapter with its num_atoms")
