"""One denoiser for the batches of several subjects: each sample has the adapter of its own subject."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atomdiff.bases.base import PromptEmbeds
from atomdiff.training.batch_loss import Samples
from atomdiff.training.model import TrainingModel
from atomdiff.tuner.adapter_state import adapter_layers


class JointDenoiser:
    """Predicts for samples of several models together, which differ in what is trained of them alone.

    It is a copy of the first model's denoiser with the same memory. Each of its adapter layers calls, for the samples
    of a model, the layer of that model, so that an adapter of any method computes as it does alone, and has gradients
    from its own samples alone. All else is computed for all samples at once. (A weight for each sample in one grouped
    product, as in mixed batches, was no faster on a CPU, and would keep these weights for the backward pass.)

    Args:
        models: Their denoisers and text encoders get the frozen weights of the first one, in its memory.
    """

    def __init__(self, models: Sequence[TrainingModel]) -> None:
        self._models = list(models)
        for model in models[1:]:
            share_weights(models[0], model)
        first = models[0].denoiser
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*first.parameters(), *first.buffers())}
        self._denoiser = copy.deepcopy(first, shared)
        self._parts: list[tuple[int, int]] = []  # number of a model, and how many samples it has
        layers = adapter_layers(self._denoiser)
        for path, layer in layers.items():
            if not any(path.startswith(f"{outer}.") for outer in layers):  # which calls those within
                own = [model.denoiser.get_submodule(path) for model in models]
                layer.forward = partial(self._call_own, own)

    def predict(self, parts: Sequence[tuple[int, Samples]]) -> list[Tensor]:
        """Return the predictions (batch, c, h, w) for the samples of some models, each with its number.

        The latents of all have one size. The backward pass comes before the next call: with gradient checkpointing it
        calls layers again.
        """
        self._parts = [(number, len(samples.prompts)) for number, samples in parts]
        embeds = [self._models[number].encode_prompts(samples.prompts) for number, samples in parts]
        latents, timesteps, time_ids = _joined([samples for _, samples in parts])
        base = self._models[0].base
        prediction = base.denoise(self._denoiser, latents, timesteps, _joined_embeds(embeds), time_ids)
        return list(prediction.float().split([size for _, size in self._parts]))

    @torch.no_grad()
    def predict_base(self, parts: Sequence[tuple[int, Samples]]) -> list[Tensor]:
        """Return what the base predicts for the samples of some models; arguments and result are those of `predict`."""
        embeds = [self._models[number].encode_base_prompts(samples.prompts) for number, samples in parts]
        latents, timesteps, time_ids = _joined([samples for _, samples in parts])
        prediction = self._models[0].denoise_with_base(latents, timesteps, _joined_embeds(embeds), time_ids)
        return list(prediction.split([len(samples.prompts) for _, samples in parts]))

    def _call_own(self, layers: Sequence[nn.Module], *args: Any, **kwargs: Any) -> Tensor:
        """Call the layer of each model with its own samples."""
        sizes = [size for _, size in self._parts]

        def split(value: Any) -> Sequence[Any]:
            if isinstance(value, Tensor) and value.ndim and len(value) == sum(sizes):
                return value.split(sizes)
            return [value] * len(sizes)

        each_args = zip(*map(split, args), strict=True)
        split_kwargs = {name: split(value) for name, value in kwargs.items()}
        outputs = []
        for index, ((number, _), own) in enumerate(zip(self._parts, each_args, strict=True)):
            own_kwargs = {name: values[index] for name, values in split_kwargs.items()}
            outputs.append(layers[number](*own, **own_kwargs))
        return torch.cat(outputs)


def share_weights(first: TrainingModel, model: TrainingModel) -> None:
    """Let a model have its frozen weights, where they equal those of another, in the memory of that one.

    Embedding tables stay, as a run writes its trigger word into them.
    """
    trained = {*first.trained_parameters(), *model.trained_parameters()}
    tables = {id(encoder.get_input_embeddings().weight) for encoder in model.text_encoders.values()}  # type: ignore[operator]
    known = dict(first.named_parameters())
    for name, parameter in model.named_parameters():
        other = known.get(name)
        if other is None or name in trained or id(parameter) in tables or parameter.data_ptr() == other.data_ptr():
            continue
        if torch.equal(parameter, other):
            parameter.data = other.data


def _joined(each: Sequence[Samples]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and time ids of all samples."""
    return (
        torch.cat([samples.latents for samples in each]),
        torch.cat([samples.timesteps for samples in each]),
        torch.cat([samples.time_ids for samples in each]),
    )


def _joined_embeds(each: Sequence[PromptEmbeds]) -> PromptEmbeds:
    pooled = [embeds.pooled_prompt_embeds for embeds in each if embeds.pooled_prompt_embeds is not None]
    return PromptEmbeds(torch.cat([embeds.prompt_embeds for embeds in each]), torch.cat(pooled) if pooled else None)
