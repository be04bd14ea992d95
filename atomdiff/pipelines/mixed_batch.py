"""Mixed batches: every sample of a batch has concepts of its own."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from atomdiff.bases.find import find_base
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.caller import find_caller
from atomdiff.pipelines.hooks import Hook, before_calls
from atomdiff.pipelines.kept_directions import kept_directions
from atomdiff.pipelines.models import locked, pipeline_models
from atomdiff.pipelines.step_schedule import StepSchedule, schedule_of
from atomdiff.pipelines.switch import read_adapter_weights
from atomdiff.tuner import adapter_state, checks
from atomdiff.tuner.mixed_batch import BatchLayout
from atomdiff.tuner.ranking import Directions
from atomdiff.utils.errors import UserError, warn

Sample = str | Mapping[str, Any] | None


@contextmanager
def mixed_batch(pipe: Any, samples: Sequence[Sample], *, components: Collection[str] | None = None) -> Iterator[None]:
    """Generate one batch in which every prompt has its own concepts; weights stay as they are.

    Call the pipeline with one prompt a sample. Guidance and `num_images_per_prompt` work as ever. Trigger words are the
    loaded concepts' own, so two concepts with the same word are loaded with different ones. Only the thread that opens
    it mixes: others generate as before, or mix samples of their own. Where they also load or switch concepts, `locked`
    keeps them from it meanwhile.

    Args:
        pipe: a pipeline with the concepts loaded, of any variant of atoms or adapters of activations; merged or not.
        samples: for each prompt the name of its concept, a mapping name -> adapter weight as `set_active` takes it, or
            None for the bare base.
        components: names of the models to mix in, such as "unet", where no others are called meanwhile; None: all.

    Warns:
        UserWarning: the models were called in other threads only.

    Raises:
        UserError: there is no such concept, or its method cannot be mixed; or, in the pipeline's call, there is not one
            prompt a sample.
    """
    if isinstance(samples, (str, Mapping)) or not samples:
        expected = "a list, for each prompt a concept's name, or None for the base"
        raise UserError(f"found the samples {samples!r}; give {expected}")
    with ExitStack() as undo:
        calls = _Calls()
        with locked(pipe):
            weights = [{} if sample is None else read_adapter_weights(pipe, sample) for sample in samples]
            parts = pipe.components
            models = pipeline_models(pipe)
            if components is not None:
                models = {name: model for name, model in models.items() if name in components}
            _check_models(models, {name for sample in weights for name in sample})
            _check_kept(models, weights)
            kept = kept_directions(pipe, weights)
            denoiser = find_base(parts).denoiser
            if parts.get(denoiser) is None:
                raise UserError(f"this {type(pipe).__name__} has no {denoiser}, whose batches could be mixed")
            if denoiser in models and (schedule := schedule_of(models[denoiser])) is not None:
                schedule.paused.value = True  # it would write weights that no sample has
                undo.callback(setattr, schedule.paused, "value", None)
            for component, model in models.items():
                layers, batch = adapter_state.mixable_layers(model), BatchLayout(len(weights))
                undo.callback(_end, layers)
                mix = partial(_mix, component, layers, batch, weights, kept)
                called = parts[component]
                mix(0.0 if component == denoiser else None)
                if component == denoiser:
                    undo.callback(before_calls(called, calls.here(partial(_count_images, batch))))
                elif layers or component.startswith("text_encoder"):
                    undo.callback(before_calls(called, calls.here(partial(_check_prompts, batch))))
                if component == denoiser and any(weight.steps for sample in weights for weight in sample.values()):
                    undo.callback(StepSchedule(pipe, mix, calls.here).remove)
        yield
        calls.check()


def _check_models(models: Mapping[str, nn.Module], names: set[str]) -> None:
    """Check that these concepts can be mixed in the models."""
    layers = [layer for model in models.values() for layer in adapter_state.mixable_layers(model).values()]
    if any(layer.mixed_batch is not None for layer in layers):
        raise UserError("there is a mixed batch in this pipeline already: leave its `with` block first")
    for model in models.values():
        checks.check_in_memory(model)
        _refuse_others(model, names)


def _check_kept(models: Mapping[str, nn.Module], samples: Sequence[Mapping[str, AdapterWeight]]) -> None:
    """Check that only concepts of atoms are to be kept in part."""
    partly = {name for sample in samples for name, weight in sample.items() if weight.keep != 1}
    for model in models.values():
        for name, config in adapter_state.adapter_configs(model).items():
            if name in partly and not adapter_state.is_atoms(config):
                raise UserError(f"{name!r} is not an atom concept: only those can be kept in part")


def _mix(
    component: str,
    layers: Mapping[str, Any],
    batch: BatchLayout,
    weights: Sequence[Mapping[str, AdapterWeight]],
    kept: Sequence[Mapping[str, Directions]],
    progress: float | None,
) -> None:
    """Let each sample have its adapter weights, and what is kept of its concepts, in the layers of a component."""
    for path, layer in layers.items():
        module = f"{component}.{adapter_state.module_path(path)}"
        of_layer = [{name: weight.at(module, progress) for name, weight in sample.items()} for sample in weights]
        layer.mix(batch, of_layer, [{name: of.get(module, {}) for name, of in sample.items()} for sample in kept])


class _Calls:
    """Tells the calls of the thread that mixes from those of others."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._threads: set[int] = set()

    def here(self, hook: Hook) -> Hook:
        """A hook that acts in this thread only."""

        def run(*args: Any) -> None:
            self._threads.add(threading.get_ident())
            if threading.get_ident() == self._thread:
                hook(*args)

        return run

    def check(self) -> None:
        """Warn if all calls came from other threads, whose batches were not mixed."""
        if self._threads and self._thread not in self._threads:
            warn(
                "the pipeline was called only in threads other than that of its mixed_batch, so nothing was mixed: "
                "open mixed_batch in the thread that generates"
            )


def _end(layers: Mapping[str, Any]) -> None:
    for layer in layers.values():
        layer.mixed_batch = None


def _count_images(batch: BatchLayout, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Find out how many images there are a sample; guidance gives each group of them the same order."""
    latent = _first_tensor(args, kwargs)
    if latent.ndim == 5:
        raise UserError("found videos in mixed_batch, which mixes images alone: use set_active for one after another")
    size = len(latent)
    caller = find_caller(model)  # not always the pipeline that `mixed_batch` was given: others share its models
    latents = caller.latents if caller is not None else None
    if latents:
        groups = max(size // latents, 1)
    else:
        guided = caller is not None and getattr(caller.pipe, "do_classifier_free_guidance", False)
        groups = 2 if guided and size > batch.samples else 1
    batch.images, left = divmod(size, batch.samples * groups)
    if left or not batch.images or (latents and size % latents):
        raise UserError(f"found a batch of {size} for {batch.samples} samples of mixed_batch; give one prompt a sample")


def _check_prompts(batch: BatchLayout, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Several prompts a sample look to a denoiser like several images of each."""
    size = len(_first_tensor(args, kwargs))
    if size != batch.samples:
        raise UserError(f"found {size} prompts for {batch.samples} samples of mixed_batch; give one prompt a sample")


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim)


def _refuse_others(model: nn.Module, names: set[str]) -> None:
    """Refuse adapters of other methods, which cannot act by sample."""
    layers = [layer for layer in adapter_state.other_layers(model) if not adapter_state.can_mix(layer)]
    unable = {name for layer in layers for name in layer._all_available_adapter_names()}
    for name, config in adapter_state.adapter_configs(model).items():
        if name in names & unable:
            raise UserError(
                f"{name!r} is a {config.peft_type.value} adapter: only concepts of atoms, and adapters of activations, "
                "mix in one batch"
            )
    for layer in layers:
        acting = layer.merged_adapters or ([] if layer.disable_adapters else layer.active_adapters)
        if set(acting) & set(layer._all_available_adapter_names()):
            raise UserError(
                f"the adapters {acting} of another method act on all samples; "
                "make only concepts of atoms active: atomdiff.restore(pipe), then pipe.set_adapters([...])"
            )
