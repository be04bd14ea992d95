"""Load concepts into a diffusers pipeline and unload them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet, ref

from torch import Tensor

from atomdiff.concepts import hub
from atomdiff.concepts.concept_file import ConceptFile
from atomdiff.pipelines.adapter_names import derived_name, given_name
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.concept_parts import attach_parts, read_parts, warn_of_left_out
from atomdiff.pipelines.kept_directions import keep_directions, kept_directions
from atomdiff.pipelines.loaded_concepts import (
    belongs_to_other_pipeline,
    concept_names,
    has_adapter,
    leftover_tokens,
    name_concepts,
    refresh,
    taken_names,
    tokens_of,
    update_overrides,
)
from atomdiff.pipelines.models import locked, pipeline_models
from atomdiff.pipelines.placeholder_tokens import (
    add_placeholder_tokens,
    check_addable,
    remove_placeholder_tokens,
    set_token_embedding,
    tokens_in,
)
from atomdiff.pipelines.scheduler import warn_of_scheduler
from atomdiff.pipelines.switch import restore
from atomdiff.tuner import adapter_state, attach, checks
from atomdiff.utils.errors import UserError


def load_atoms(
    pipe: Any,
    path: str | os.PathLike[str] | ConceptFile,
    adapter_name: str | None = None,
    *,
    keep: float = 1.0,
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
        path: a concept file, a LoRA file of another program (kohya, LyCORIS, diffusers), or a directory that PEFT
            wrote, of any method, with or without token embeddings; a directory or a repository on the Hub, "user/repo",
            with one of these in it. What exists on this disk goes first. Or a concept in memory, such as
            `ConceptLibrary` gives.
        adapter_name: name for `pipe.set_adapters`; None: that of the file or repository up to its first dot,
            with a number where no adapter can have it or one has it already.
        keep: share of the concept that acts, its most important directions first, until the next `set_active`: 1 is all
            of it, 0 is the base.
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
            parts of the concept cannot be loaded here; they are named. Or the pipeline's scheduler does not fit
            what the concept was trained to predict; the line that changes it is stated.

    Raises:
        UserError: there is no such file or repository, it is damaged or does not fit the pipeline, or a name or word is
            taken.
    """
    source: Path | ConceptFile
    if isinstance(path, ConceptFile):
        if adapter_name is None:
            raise UserError("found a concept in memory without a name: give adapter_name")
        source, default_name = path, ""
    else:
        source, default_name = hub.locate(
            path,
            weight_name=weight_name,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    return load_concept(
        pipe, source, adapter_name, default_name, allow_base_mismatch, trigger_word, keep, warns_of_scheduler=True
    )


def load_concept(
    pipe: Any,
    source: Path | ConceptFile,
    adapter_name: str | None,
    default_name: str = "",
    allow_base_mismatch: bool = False,
    trigger_word: str | None = None,
    keep: float = 1.0,
    *,
    warns_of_scheduler: bool = False,
) -> str:
    """As `load_atoms`, of a concept in memory or on this disk, which without `adapter_name` is named as `default_name`.

    Who chooses the scheduler by what the concepts were trained for leaves `warns_of_scheduler` out.
    """
    weight = AdapterWeight(keep=keep)
    with locked(pipe):
        refresh(pipe)
        models = pipeline_models(pipe)
        if adapter_name is None:
            name = derived_name(default_name, models.values(), taken_names(pipe))
        else:
            name = given_name(adapter_name, models.values(), taken_names(pipe))
        for model in models.values():
            checks.check_extensible(model)
            checks.check_restorable(model)
        parts = read_parts(pipe, source, trigger_word, allow_base_mismatch)
        if keep < 1 and not all(adapter_state.is_atoms(config) for config, _ in parts.adapters.values()):
            raise UserError(f"keep={keep}: {source} is not an atom concept, and only those can be kept in part")
        leftover = leftover_tokens(pipe, name)
        check_addable(pipe, list(parts.tokens), leftover)
        if warns_of_scheduler and parts.schedule is not None:
            warn_of_scheduler(pipe, name, parts.schedule)
        with _rollback_on_error(pipe, name, repr(name) if isinstance(source, ConceptFile) else str(source)):
            attach_parts(parts, models, name, allow_base_mismatch)
            warn_of_left_out(name, parts.left_out)
            remove_placeholder_tokens(pipe, leftover)
            _add_tokens(pipe, parts.tokens, name)
        restore(pipe)
        for model in models.values():
            adapter_state.activate(model, [name])
            adapter_state.compute_coefficients(model, name)
        update_overrides(pipe)
        keep_directions(models, *kept_directions(pipe, [{name: weight}]))
    return name


@contextmanager
def _rollback_on_error(pipe: Any, name: str, source: str) -> Iterator[None]:
    """Take the adapter and the tokens of a concept out again if adding them fails."""
    try:
        with attach.rollback_on_error(pipeline_models(pipe).values(), name):
            yield
    except BaseException as error:
        remove_placeholder_tokens(pipe, tokens_of(pipe, [name]))
        if isinstance(error, Exception):  # PEFT answers strange settings with any of them
            raise UserError(f"cannot load {source}: {error}") from error
        raise


def _add_tokens(pipe: Any, tokens: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
    """Add the placeholder tokens of a concept whose adapter is in the models already."""
    add_placeholder_tokens(pipe, tokens, owner=name)
    carriers = [model for model in pipeline_models(pipe).values() if has_adapter(model, name)]
    for token, vectors in tokens.items():
        set_token_embedding(pipe, token, vectors)
        entry = tokens_in(pipe)[token]
        entry.came_with, entry.loaded_by = WeakSet(carriers) if carriers else None, ref(pipe)


def unload_atoms(pipe: Any, adapter_name: str | None = None) -> None:
    """Take a concept out, or all of them with None: weights, tokenizers and embedding tables are as before, to the bit.

    A merged pipeline is restored; the other concepts stay loaded. With None, placeholder tokens of concepts that
    another pipeline loaded into models of its own stay for it.

    Raises:
        UserError: there is no such concept.
    """
    with locked(pipe):
        refresh(pipe)
        if adapter_name is not None and adapter_name not in concept_names(pipe):
            raise UserError(f"there is no concept {adapter_name!r} to unload; there are: {name_concepts(pipe)}")
        for model in pipeline_models(pipe).values():
            checks.check_extensible(model)
        restore(pipe)
        names = concept_names(pipe) if adapter_name is None else [adapter_name]
        tokens = tokens_of(pipe, names)
        if adapter_name is None:
            tokens = [token for token, entry in tokens_in(pipe).items() if not belongs_to_other_pipeline(pipe, entry)]
        for model in pipeline_models(pipe).values():
            for name in names:
                if has_adapter(model, name):
                    attach.delete_adapter(model, name)
        remove_placeholder_tokens(pipe, tokens)
        update_overrides(pipe)
