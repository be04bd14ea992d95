"""Mixed batches: every row of a batch wears concepts of its own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from atomdiff.bases.find import find_base
from atomdiff.pipelines.adapter_weight import AdapterWeight, StepSchedule, before_calls
from atomdiff.pipelines.caller import find_caller
from atomdiff.pipelines.load import pipeline_models
from atomdiff.pipelines.switch import read_adapter_weights
from atomdiff.tuner import adapter_state
from atomdiff.tuner.batch_layout import BatchLayout
from atomdiff.utils.errors import UserError
from atomdiff.utils.thread_local import ThreadLocal

Row = str | Mapping[str, Any] | None
_LOCK = threading.Lock()  # of what several threads do to one pipeline


@contextmanager
def mixed_batch(pipe: Any, rows: Sequence[Row]) -> Iterator[None]:
    """Draw one batch in which every prompt has its own concepts; weights stay as they are.

    Call the pipeline with one prompt a row. Guidance and `num_images_per_prompt` work as ever. Trigger words are the
    loaded concepts' own, so two concepts with the same word are loaded with different ones. Only the thread that opens
    it mixes: others generate as before, or mix rows of their own.

    Args:
        pipe: a pipeline with the concepts loaded, of any variant of atoms; merged or not.
        rows: for each prompt the name of its concept, a mapping name -> strength as `set_active` takes it, or None for
            the bare base.

    Warns:
        UserWarning: the models were called in other threads only.

    Raises:
        UserError: there is no such concept, or it is none of atoms; or, in the pipeline's call, there is not one prompt
            a row.
    """
    if isinstance(rows, (str, Mapping)) or not rows:
        raise UserError(f"found the rows {rows!r}; give a list, for each prompt a concept's name, or None for the base")
    wanted = [_strengths(pipe, row) for row in rows]
    models = pipeline_models(pipe)
    if any(
        layer.mixed_batch is not None
        for model in models.values()
        for layer in adapter_state.atom_layers(model).values()
    ):
        raise UserError("there is a mixed batch in this pipeline already: leave its `with` block first")
    denoiser = find_base(models).denoiser
    for model in models.values():
        adapter_state.check_in_memory(model)
        _refuse_others(model, {name for row in wanted for name in row})
    with ExitStack() as undo:
        if (schedule := vars(models[denoiser]).get("_atomdiff_schedule")) is not None:
            schedule.paused.value = True  # it would write weights that no row wears
            undo.callback(setattr, schedule.paused, "value", None)
        noted, calls = undo.enter_context(_noted_latents(pipe)), _Calls()
        for part, model in models.items():
            layers, batch = adapter_state.atom_layers(model), BatchLayout(len(wanted))
            undo.callback(_end, layers)

            def mix(progress: float | None, part: str = part, layers: Any = layers, batch: BatchLayout = batch) -> None:
                for path, layer in layers.items():
                    of_samples = [{n: s.at(f"{part}.{path}", progress) for n, s in row.items()} for row in wanted]
                    layer.mix(batch, of_samples)

            mix(0.0 if part == denoiser else None)
            if part == denoiser:
                check = calls.here(partial(_count_images, batch, pipe, noted))
                undo.callback(before_calls(pipe.components[part], check))
            elif layers or part.startswith("text_encoder"):
                undo.callback(before_calls(pipe.components[part], calls.here(partial(_check_prompts, batch))))
            if part == denoiser and any(strength.steps for row in wanted for strength in row.values()):
                schedule = StepSchedule(pipe, pipe.components[part], mix, calls.here)
                undo.callback(schedule.remove)
        yield
        calls.check()


class _Calls:
    """Tells the calls of the thread that mixes from those of others."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._threads: set[int] = set()

    def here(self, hook: Callable[..., None]) -> Callable[..., None]:
        """A hook that acts in this thread only."""

        def run(*args: Any) -> None:
            self._threads.add(threading.get_ident())
            if threading.get_ident() == self._thread:
                hook(*args)

        return run

    def check(self) -> None:
        """Warn if all calls came from other threads, whose rows were not mixed."""
        if self._threads and self._thread not in self._threads:
            warnings.warn(
                "the pipeline was called in other threads than that of its mixed_batch only, and no rows were mixed: "
                "open mixed_batch in the thread that generates",
                stacklevel=5,
            )


def _strengths(pipe: Any, row: Row) -> dict[str, AdapterWeight]:
    return {} if row is None else read_adapter_weights(pipe, row)


def _end(layers: Mapping[str, Any]) -> None:
    for layer in layers.values():
        layer.mixed_batch = None


class _Watch:
    """Notes, for each thread, how many latents a pipeline makes, one an image, before guidance makes groups of them."""

    of: dict[int, _Watch] = {}

    def __init__(self, pipe: Any) -> None:
        self.noted, self.users, self._pipe = ThreadLocal(), 0, pipe
        # The guidance of an earlier call says nothing about calls of the model itself.
        kept = ("prepare_latents", "_guidance_scale")
        self._own = {key: vars(pipe).pop(key) for key in kept if key in vars(pipe)}
        prepare: Any = self._own.get("prepare_latents", getattr(pipe, "prepare_latents", None))

        def note(*args: Any, **kwargs: Any) -> Any:
            made = prepare(*args, **kwargs)
            if (noted := self.noted.value) is not None:
                noted[:] = [len(made[0] if isinstance(made, tuple) else made)]
            return made

        if callable(prepare):
            vars(pipe)["prepare_latents"] = note

    def remove(self) -> None:
        """Give the pipeline back what it had."""
        vars(self._pipe).pop("prepare_latents", None)
        vars(self._pipe).update({key: self._own[key] for key in self._own if key not in vars(self._pipe)})


@contextmanager
def _noted_latents(pipe: Any) -> Iterator[list[int]]:
    """Note how many latents the pipeline makes in this thread: two groups of them with guidance, or more."""
    noted: list[int] = []
    with _LOCK:
        watch = _Watch.of.get(id(pipe)) or _Watch(pipe)
        _Watch.of[id(pipe)] = watch
        watch.users += 1
    try:
        watch.noted.value = noted
        yield noted
    finally:
        watch.noted.value = None
        with _LOCK:
            watch.users -= 1
            if not watch.users:
                del _Watch.of[id(pipe)]
                watch.remove()


def _count_images(
    batch: BatchLayout,
    pipe: Any,
    noted: Sequence[int],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Find out how many images there are a row; guidance gives each group of them the same order."""
    size = _batch_size(args, kwargs)
    caller = find_caller(model)  # not always the pipeline that `mixed_batch` was given: others share its models
    made = caller.latents if caller is not None and caller.latents else next(iter(noted), None)
    if made:
        groups = max(size // made, 1)
    else:  # the model is called directly
        guided = getattr(caller.pipe if caller else pipe, "do_classifier_free_guidance", False) and size > batch.samples
        groups = 2 if guided else 1
    batch.images, left = divmod(size, batch.samples * groups)
    if left or not batch.images or (made and size % made):
        raise UserError(f"found a batch of {size} for {batch.samples} rows of mixed_batch; give one prompt a row")


def _check_prompts(batch: BatchLayout, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Several prompts a row look to a denoiser like several images of each."""
    size = _batch_size(args, kwargs)
    if size != batch.samples:
        raise UserError(f"found {size} prompts for {batch.samples} rows of mixed_batch; give one prompt a row")


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim)


def _refuse_others(model: nn.Module, names: set[str]) -> None:
    """Refuse adapters of other methods, which cannot act by row."""
    for name, config in adapter_state.adapter_configs(model).items():
        if name in names and not adapter_state.is_atoms(config):
            raise UserError(f"{name!r} is a {config.peft_type.value} adapter: only concepts of atoms mix in one batch")
    for layer in adapter_state.other_layers(model):
        acting = layer.merged_adapters or ([] if layer.disable_adapters else layer.active_adapters)
        if set(acting) & set(layer._all_available_adapter_names()):
            raise UserError(
                f"the adapters {acting} of another method act on all rows; "
                "make only concepts of atoms active: atomdiff.restore(pipe), then pipe.set_adapters([...])"
            )
