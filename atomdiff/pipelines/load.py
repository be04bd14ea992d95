"""Concepts in a diffusers pipeline: load, save, list, merge and take out again."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn

from atomdiff.bases.find import find_base
from atomdiff.concepts import hub, peft_folder
from atomdiff.concepts.compatibility import fingerprint
from atomdiff.concepts.concept_file import DeltaFile, write_delta_file
from atomdiff.concepts.modelspec import model_spec
from atomdiff.pipelines import model_calls
from atomdiff.pipelines.adapter_names import derived_name, given_name
from atomdiff.pipelines.concept_parts import attach_parts, read_parts, take_fitting_tokens, warn_of_left_out
from atomdiff.pipelines.placeholder_tokens import (
    PlaceholderToken,
    add_placeholder_tokens,
    check_addable,
    has_words,
    look_again,
    remove_placeholder_tokens,
    set_token_embedding,
    tokens_in,
)
from atomdiff.pipelines.scheduler import (
    ScheduleConfig,
    describe_scheduler,
    fitting_scheduler,
    pipeline_scheduler,
    scheduler_code,
)
from atomdiff.pipelines.token_names import group_placeholder_tokens, placeholder_tokens
from atomdiff.tuner import adapter_state, attach, merging
from atomdiff.tuner.config import AtomConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.versions import atomdiff_version


@dataclass(frozen=True)
class LoadedConcept:
    """One concept in a pipeline."""

    name: str
    """Name of its adapter."""
    method: str
    """PEFT method, such as ATOMS or LORA; empty where it is only a word."""
    layers: dict[str, int]
    """Component -> number of adapted layers."""
    active: bool
    """Whether its adapter acts on pictures."""
    merged: bool
    """Whether it is written into the weights."""
    trigger_words: tuple[str, ...]
    """Words that it brought."""


def load_atoms(
    pipe: Any,
    path: str | os.PathLike[str] | DeltaFile,
    adapter_name: str | None = None,
    *,
    allow_base_mismatch: bool = False,
    trigger_word: str | None = None,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> str:
    """Load a concept and make it the active one; a merged pipeline is restored.

    The file is checked before anything changes, and a load that fails leaves the pipeline as it was. From the Hub only
    safetensors and JSON files are downloaded, and nothing in them is executed.

    Args:
        pipe: a diffusers pipeline.
        path: a delta file, a LoRA file of another program (kohya, LyCORIS, diffusers), or a directory written by PEFT,
            of any method, with or without a trained word; a directory or a repository on the Hub, "user/repo", with one
            of these in it. What exists on this disk goes first. Or a
            concept in memory, such as `ConceptLibrary` gives.
        adapter_name: name for `pipe.set_adapters`; None: that of the file or repository up to its first dot,
            with a number where no adapter can have it or one has it already.
        allow_base_mismatch: load even if the concept was made on a wholly different base, and of it what fits.
        trigger_word: word to use in prompts instead of the file's.
        weight_name: the file to take where a directory or repository holds several concepts.
        subfolder: folder of the concept within the directory or repository.
        revision: branch, tag or commit of the repository; None: its main branch.
        token: access token for the Hub; None: the one logged in with.
        cache_dir: where downloads are kept; None: the Hub client's cache.
        local_files_only: take what was downloaded before, without asking the Hub.
        force_download: download again what was downloaded before.

    Returns:
        The adapter's name.

    Warns:
        UserWarning: the base differs somewhat from the one that the concept was made on; the distance is stated. Or
            parts of the concept cannot be loaded here; they are named. Or the pipeline's scheduler does not draw what
            the concept was trained to predict; the line that changes it is stated.

    Raises:
        UserError: there is no such file or repository, it is damaged or does not fit the pipeline, or a name or word is
            taken.
    """
    return load_concept(
        pipe,
        path,
        adapter_name,
        allow_base_mismatch=allow_base_mismatch,
        trigger_word=trigger_word,
        warns_of_scheduler=True,
        weight_name=weight_name,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )


def load_concept(
    pipe: Any,
    path: str | os.PathLike[str] | DeltaFile,
    adapter_name: str | None = None,
    *,
    allow_base_mismatch: bool = False,
    trigger_word: str | None = None,
    warns_of_scheduler: bool = False,
    **where: Any,
) -> str:
    """As `load_atoms`; it warns of the scheduler only where that is wanted."""
    if isinstance(path, DeltaFile):
        if adapter_name is None:
            raise UserError("found a concept in memory without a name: give adapter_name")
        place, found_name = None, adapter_name
    else:
        place, found_name = hub.locate(path, **where)
    tidy(pipe)
    models, taken = pipeline_models(pipe), _taken_names(pipe)
    if adapter_name is None:
        name = derived_name(found_name, models.values(), taken)
    else:
        name = given_name(adapter_name, models.values(), taken)
    for model in models.values():
        adapter_state.check_restorable(model)
    source = path if isinstance(path, DeltaFile) else cast(Path, place)
    parts = read_parts(source, models, find_base(models).denoiser, allow_base_mismatch, stacklevel=4)
    parts.tokens = renamed_tokens(parts.tokens, trigger_word)
    take_fitting_tokens(parts, pipe, allow_base_mismatch)
    left_over = _left_over(pipe, name)
    check_addable(pipe, list(parts.tokens), left_over)
    if warns_of_scheduler:
        _warn_of_scheduler(pipe, name, parts.schedule)
    try:
        with attach.rollback_on_error(models.values(), name):
            attach_parts(parts, models, name, allow_base_mismatch)
            warn_of_left_out(name, parts.left_out, 3)
            remove_placeholder_tokens(pipe, left_over)
            add_placeholder_tokens(pipe, parts.tokens, owner=name)
            carriers = [model for model in models.values() if _has(model, name)]
            for word, vectors in parts.tokens.items():
                set_token_embedding(pipe, word, vectors)
                entry = tokens_in(pipe)[word]
                entry.came_with, entry.loaded_by = WeakSet(carriers) if carriers else None, ref(pipe)
    except BaseException as error:
        remove_placeholder_tokens(pipe, _words_of(pipe, [name]))
        if isinstance(error, Exception):  # PEFT answers strange settings with any of them
            raise UserError(f"cannot load {place or repr(name)}: {error}") from error
        raise
    restore(pipe)
    for model in models.values():
        adapter_state.activate(model, [name])
        adapter_state.compute_coefficients(model, name)
    _adopt_calls(pipe)
    return name


def save_atoms(
    pipe: Any,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    trigger_phrase: str = "",
    training: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Save a concept: its adapter in all components, and the embeddings of its trigger words and those added by hand.

    Args:
        pipe: the pipeline.
        path: the file to write, by custom `<concept>.atoms.safetensors`; for other methods than atoms the directory.
        adapter_name: the adapter to save.
        trigger_phrase: what to write in a prompt to get the concept.
        training: JSON-ready facts about the run; of its "config" the settings of the scheduler are looked at again when
            the concept is loaded.
        base_model: name or path of the base; None: as the pipeline was loaded.
        dtype: of the stored numbers; float32 keeps every bit of them. (Other methods keep their own.)

    Returns:
        `path`.

    Raises:
        UserError: there is no such adapter or word, its settings differ between components, or a value is not finite.
    """
    path = Path(path)
    tidy(pipe)
    models = pipeline_models(pipe)
    configs = {
        part: adapter_state.adapter_configs(m)[adapter_name] for part, m in models.items() if _has(m, adapter_name)
    }
    tokens = {
        word: entry.vectors
        for word, entry in tokens_in(pipe).items()
        if entry.vectors and entry.owner in (None, adapter_name)
    }
    if not configs and not tokens:
        raise UserError(f"there is no concept {adapter_name!r} to save; there are: {_names(pipe)}")
    if any(not isinstance(config, AtomConfig) for config in configs.values()):
        adapters = {
            part: (config, adapter_state.peft_tensors(models[part], adapter_name)) for part, config in configs.items()
        }
        facts = {"training": json.dumps(training)} if training else {}
        peft_folder.write(path, adapters, tokens, find_base(models).denoiser, facts)
        return path
    config = next(iter(configs.values()), AtomConfig())
    if any(other.shaping() != config.shaping() for other in configs.values()):
        raise UserError(
            f"{adapter_name!r} has other atoms in {' than in '.join(configs)}, but a file holds one AtomConfig: "
            "add the adapter to all of them with the same num_atoms, basis and channel blocks"
        )
    if any(other.modules_to_save for other in configs.values()):
        raise UserError(
            f"{adapter_name!r} trains whole modules ({config.modules_to_save}), and a concept file holds atoms and "
            "words only: save it with PEFT's save_pretrained, or leave modules_to_save out"
        )
    layers = {
        f"{part}.{module}": tensors
        for part in configs
        for module, tensors in adapter_state.atom_tensors(models[part], adapter_name).items()
    }
    weights = {
        f"{part}.{module}": w for part in configs for module, w in adapter_state.base_weights(models[part]).items()
    }
    delta = DeltaFile(
        config=config,
        layers=layers,
        fingerprint={module: fingerprint(weights[module], config, module.partition(".")[2]) for module in layers},
        tokens=tokens,
        base_model=str(getattr(pipe.config, "_name_or_path", "") or "") if base_model is None else base_model,
        trigger_phrase=trigger_phrase,
        training=dict(training or {}),
        modelspec=model_spec(pipe, title=path.name.partition(".")[0], trigger_phrase=trigger_phrase),
        atomdiff_version=atomdiff_version(),
    )
    write_delta_file(path, delta, dtype)
    return path


def unload_atoms(pipe: Any, adapter_name: str | None = None) -> None:
    """Take a concept out, or all of them with None: weights, tokenizers and embedding tables are as before, to the bit.

    A merged pipeline is restored; the other concepts stay loaded. With None, words of concepts that another pipeline
    loaded into models of its own stay for it.

    Raises:
        UserError: there is no such concept.
    """
    tidy(pipe)
    if adapter_name is not None and adapter_name not in concept_names(pipe):
        raise UserError(f"there is no concept {adapter_name!r} to unload; there are: {_names(pipe)}")
    restore(pipe)
    names = concept_names(pipe) if adapter_name is None else [adapter_name]
    words = _words_of(pipe, names)
    if adapter_name is None:
        words = [word for word, entry in tokens_in(pipe).items() if not _is_of_another(pipe, entry)]
    for model in pipeline_models(pipe).values():
        for name in names:
            if _has(model, name):
                attach.delete_adapter(model, name)
    remove_placeholder_tokens(pipe, words)
    _adopt_calls(pipe)


def merge(pipe: Any) -> None:
    """Write the active concepts with their weights into the base weights: pictures then cost what the base's cost.

    Untouched weights are kept aside, so that `restore` is exact: adapted layers take twice their memory meanwhile.
    Later changes of weights or of active concepts have no effect until the next `merge` or `restore`; `set_active` does
    all at once.
    """
    tidy(pipe)
    models = pipeline_models(pipe)
    for model in models.values():
        adapter_state.check_writable(model)
    stop_schedule(pipe)
    for model in models.values():
        merging.merge(model)


def restore(pipe: Any) -> None:
    """Undo `merge` and `set_active`: every weight has the bits it had; concepts stay loaded, and act unmerged."""
    tidy(pipe)
    models = pipeline_models(pipe)
    for model in models.values():
        adapter_state.check_restorable(model)
    stop_schedule(pipe)
    for model in models.values():
        merging.restore(model)


def stop_schedule(pipe: Any) -> None:
    """Stop writing weights before denoising steps; those of the last one stay."""
    for model in pipeline_models(pipe).values():
        if (schedule := vars(model).pop("_atomdiff_schedule", None)) is not None:
            schedule.remove()


def list_atoms(pipe: Any) -> list[LoadedConcept]:
    """The concepts in a pipeline, of any PEFT method, in the order they came."""
    tidy(pipe)
    return [_concept(pipe, name) for name in concept_names(pipe)]


def pipeline_models(pipe: Any) -> dict[str, nn.Module]:
    """Component name -> model, for all parts that are models; of what `torch.compile` gave the model within."""
    parts = {name: getattr(part, "_orig_mod", part) for name, part in pipe.components.items()}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def tidy(pipe: Any) -> None:
    """Look at what there is before it is believed: others delete adapters, too, and leave parts of them behind."""
    look_again(pipe)
    for model in pipeline_models(pipe).values():
        attach.remove_leftovers(model)
    _adopt_calls(pipe)


def _adopt_calls(pipe: Any) -> None:
    """Let diffusers' own calls know of the concepts that are loaded by now, if there are any."""
    loaded = bool(concept_names(pipe))
    for part in [*pipeline_models(pipe).values(), *(part for name, part in pipe.components.items() if "token" in name)]:
        if loaded and (has_words(part) or (isinstance(part, nn.Module) and adapter_state.adapter_configs(part))):
            model_calls.adopt(part)
            if isinstance(part, nn.Module):
                merging.keep_when_merged(part)
        elif part is not None:
            model_calls.release(part)


def concept_names(pipe: Any) -> list[str]:
    """The names of the concepts in a pipeline, in the order they came."""
    adapters = [name for model in pipeline_models(pipe).values() for name in adapter_state.adapter_configs(model)]
    owners = [word.owner for word in tokens_in(pipe).values() if word.owner is not None]
    return list(dict.fromkeys(adapters + owners))


def _concept(pipe: Any, name: str) -> LoadedConcept:
    models = {component: model for component, model in pipeline_models(pipe).items() if _has(model, name)}
    methods = [adapter_state.adapter_configs(model)[name].peft_type.value for model in models.values()]
    layers = {component: adapter_state.adapter_layers(model, name) for component, model in models.items()}
    everywhere = [layer for found in layers.values() for layer in found]
    return LoadedConcept(
        name=name,
        method=methods[0] if methods else "",
        layers={component: len(found) for component, found in layers.items()},
        active=any(name in layer.active_adapters and not layer.disable_adapters for layer in everywhere),
        merged=any(name in layer.merged_adapters for layer in everywhere),
        trigger_words=tuple(word for word, entry in tokens_in(pipe).items() if entry.owner == name),
    )


def _warn_of_scheduler(pipe: Any, name: str, schedule: ScheduleConfig | None) -> None:
    """Warn if the pipeline's scheduler does not draw what a concept was trained to predict."""
    scheduler = pipe.components.get("scheduler")
    if scheduler is None or schedule is None:
        return
    try:
        wanted = fitting_scheduler(schedule, scheduler)
    except UserError as error:
        warnings.warn(f"{name!r} was trained with another scheduler than this pipeline can have: {error}", stacklevel=4)
        return
    if wanted is not scheduler:
        wanted = pipeline_scheduler(pipe, wanted)
        warnings.warn(
            f"{name!r} was trained for {describe_scheduler(wanted)}, but the pipeline has "
            f"{describe_scheduler(scheduler)}; run\n"
            f"import diffusers; {scheduler_code(wanted, scheduler)}",
            stacklevel=4,
        )


def _has(model: nn.Module, name: str) -> bool:
    return name in adapter_state.adapter_configs(model)


def _names(pipe: Any) -> str:
    return ", ".join(map(repr, concept_names(pipe))) or "none"


def renamed_tokens(tokens: dict[str, dict[str, Tensor]], word: str | None) -> dict[str, dict[str, Tensor]]:
    """The tokens of a concept under another word, all of its vectors; None: as they are.

    Raises:
        UserError: there is not exactly one to rename.
    """
    if word is None:
        return tokens
    groups = group_placeholder_tokens(tokens)
    if len(groups) != 1:
        raise UserError(f"trigger_word={word!r} renames one word, but the concept has {len(groups)}: leave it out")
    ((_, group),) = groups.items()
    new = dict(zip(group, placeholder_tokens(word, len(group)), strict=True))
    return {new[old]: vectors for old, vectors in tokens.items()}


def _taken_names(pipe: Any) -> list[str]:
    """The names of concepts that are there: those of which others have left only words are free."""
    loaded = {name for model in pipeline_models(pipe).values() for name in adapter_state.adapter_configs(model)}
    return [
        name
        for name in concept_names(pipe)
        if name in loaded or len(_left_over(pipe, name)) < len(_words_of(pipe, [name]))
    ]


def _left_over(pipe: Any, name: str) -> list[str]:
    """The words of a concept whose layers others have taken away everywhere."""
    words = {word: tokens_in(pipe)[word].came_with for word in _words_of(pipe, [name])}
    return [word for word, models in words.items() if models is not None and not any(_has(m, name) for m in models)]


def _words_of(pipe: Any, owners: Collection[str]) -> list[str]:
    return [word for word, entry in tokens_in(pipe).items() if entry.owner in owners]


def _is_of_another(pipe: Any, word: PlaceholderToken) -> bool:
    """Whether a word's concept lies in models of another pipeline alone, which loaded it there."""
    if word.came_with is None or word.loaded_by is None or word.loaded_by() is pipe:
        return False
    carriers = {model for model in word.came_with if word.owner is not None and _has(model, word.owner)}
    return bool(carriers) and carriers.isdisjoint(pipeline_models(pipe).values())
