"""Load concepts into a diffusers pipeline and unload them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet, ref

from torch import Tensor

from atomdiff.bases.find import find_base
from atomdiff.concepts import hub
from atomdiff.concepts.concept_file import DeltaFile
from atomdiff.pipelines.adapter_names import derived_name, given_name
from atomdiff.pipelines.concept_parts import attach_parts, read_parts, take_fitting_tokens, warn_of_left_out
from atomdiff.pipelines.loaded_concepts import (
    adopt_calls,
    belongs_to_other_pipeline,
    concept_names,
    has_adapter,
    leftover_tokens,
    name_concepts,
    refresh,
    taken_names,
    tokens_of,
)
from atomdiff.pipelines.merge import restore
from atomdiff.pipelines.models import locked, pipeline_models
from atomdiff.pipelines.placeholder_tokens import (
    add_placeholder_tokens,
    check_addable,
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
from atomdiff.pipelines.token_names import rename_tokens
from atomdiff.tuner import adapter_state, attach, checks
from atomdiff.utils.errors import UserError


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
        path: a concept file, a LoRA file of another program (kohya, LyCORIS, diffusers), or a directory that PEFT
            wrote, of any method, with or without token embeddings; a directory or a repository on the Hub, "user/repo",
            with one of these in it. What exists on this disk goes first. Or a concept in memory, such as
            `ConceptLibrary` gives.
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
            parts of the concept cannot be loaded here; they are named. Or the pipeline's scheduler does not fit
            what the concept was trained to predict; the line that changes it is stated.

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
    if isinstance(path, DeltaFile) and adapter_name is None:
        raise UserError("found a concept in memory without a name: give adapter_name")
    source, found_name = (path, "") if isinstance(path, DeltaFile) else hub.locate(path, **where)
    with locked(pipe):
        refresh(pipe)
        models, taken = pipeline_models(pipe), taken_names(pipe)
        if adapter_name is None:
            name = derived_name(found_name, models.values(), taken)
        else:
            name = given_name(adapter_name, models.values(), taken)
        for model in models.values():
            checks.check_restorable(model)
        parts = read_parts(source, models, find_base(models).denoiser, allow_base_mismatch, stacklevel=4)
        parts.tokens = rename_tokens(parts.tokens, trigger_word)
        take_fitting_tokens(parts, pipe, allow_base_mismatch)
        leftover = leftover_tokens(pipe, name)
        check_addable(pipe, list(parts.tokens), leftover)
        if warns_of_scheduler:
            _warn_of_scheduler(pipe, name, parts.schedule)
        with _rollback_on_error(pipe, name, repr(name) if isinstance(source, DeltaFile) else str(source)):
            attach_parts(parts, models, name, allow_base_mismatch)
            warn_of_left_out(name, parts.left_out, 3)
            remove_placeholder_tokens(pipe, leftover)
            _add_tokens(pipe, parts.tokens, name)
        restore(pipe)
        for model in models.values():
            adapter_state.activate(model, [name])
            adapter_state.compute_coefficients(model, name)
        adopt_calls(pipe)
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
        restore(pipe)
        names = concept_names(pipe) if adapter_name is None else [adapter_name]
        words = tokens_of(pipe, names)
        if adapter_name is None:
            words = [word for word, entry in tokens_in(pipe).items() if not belongs_to_other_pipeline(pipe, entry)]
        for model in pipeline_models(pipe).values():
            for name in names:
                if has_adapter(model, name):
                    attach.delete_adapter(model, name)
        remove_placeholder_tokens(pipe, words)
        adopt_calls(pipe)


def _warn_of_scheduler(pipe: Any, name: str, schedule: ScheduleConfig | None) -> None:
    """Warn if the pipeline's scheduler does not fit what a concept was trained to predict."""
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
