"""`atomdiff export`: concepts as a pipeline, weight differences or a LoRA, for other programs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from atomdiff.export.diff import export_diff
from atomdiff.export.embeddings import embeddings_without_base, save_embeddings
from atomdiff.export.kohya import file_path
from atomdiff.export.lora import check_rank, export_lora
from atomdiff.export.pipeline_folder import export_pipeline
from atomdiff.export.report import ExportReport
from atomdiff.pipelines.adapter_weight import command_line_weights
from atomdiff.pipelines.config import BaseModelConfig, SchedulerConfig
from atomdiff.pipelines.load import load_concept, unload_atoms
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.open import open_base
from atomdiff.pipelines.scheduler import ScheduleConfig, common_scheduler, describe_scheduler, pipeline_scheduler
from atomdiff.pipelines.switch import set_weights
from atomdiff.sampling.concept_source import open_sources, schedules
from atomdiff.sampling.config import ConceptsConfig
from atomdiff.tuner import adapter_state
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import PathText, check_empty, check_writable, refuse_overlap

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ExportConfig(SchedulerConfig, ConceptsConfig, BaseModelConfig):
    """Write concepts, with their weights, to a file or folder that other programs read."""

    pretrained_model_name_or_path: PathText
    """Base model: a folder, a Hub id, or a checkpoint file (.safetensors, .ckpt)."""
    concepts: tuple[PathText, ...]
    """Concepts: concept or LoRA files, PEFT folders, or user/repo on the Hub."""
    to: Literal["pipeline", "diff", "lora"]
    """Format. pipeline: a diffusers folder with the concepts merged into the weights. diff: the exact differences of
    the weights, as large as the weights, for ComfyUI, Stable Diffusion WebUI and InvokeAI. lora: a low-rank
    approximation of the differences, for these and diffusers."""
    output: PathText
    """Folder (pipeline) or .safetensors file (diff, lora) to write."""
    rank: int = 16
    """Rank of the LoRA."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision to save in. Default: float16; for a pipeline float32, as any other has to be named to open it."""

    def check(self) -> None:
        """Check that the concepts can be exported in this format."""
        if not self.concepts:
            raise UserError("found no concept; give --concepts")
        weights = command_line_weights(self.concepts, self.weights)
        if steps := next((weight.steps for weight in weights if weight.steps), None):
            raise UserError(f"weights: steps={dict(steps)} cannot be exported; leave steps out")
        if not any(weight.weight for weight in weights):
            raise UserError("weights: all are 0, so there is nothing to export; give one concept another weight")
        for name in ("prediction_type", "rescale_betas_zero_snr"):
            if self.to != "pipeline" and getattr(self, name) is not None:
                found = f"{name}={getattr(self, name)!r}: a file of {self.to} has no scheduler"
                raise UserError(f"{found}; leave it out, or use --to pipeline")
        check_rank(self.rank)


def export_concepts(config: ExportConfig) -> ExportReport:
    """Load a base with concepts and export them.

    Raises:
        UserError: the base or a concept cannot be used, or cannot be written in that form.
    """
    _check_output(config)
    given = open_sources(config.concepts, config.weights, config.trigger_words)
    sources = {f"the concept {concept.file}": concept.path for concept, _ in given}
    refuse_overlap({"output": config.output}, {"the base": config.pretrained_model_name_or_path, **sources})
    output = Path(config.output) if config.to == "pipeline" else file_path(config.output)
    check_writable(output.parent, f"output={config.output!r}", output.name)
    dtype = config.dtype or ("float32" if config.to == "pipeline" else "float16")
    written = getattr(torch, dtype)
    if config.to != "pipeline" and (words := embeddings_without_base([concept for concept, _ in given])) is not None:
        path = file_path(config.output)
        return ExportReport(path, embeddings=save_embeddings(path.parent, f"{path.stem}-", words, written))
    pipe = open_base(config, written if config.to == "pipeline" else None)
    _set_scheduler(config, pipe, schedules(given))
    weights = {}
    for number, (concept, weight) in enumerate(given, start=1):
        name = f"concept{number}"
        load_concept(pipe, concept.path, name, trigger_word=concept.new_trigger_word)
        _check_mergeable(pipe, name, concept.file)
        if not concept.is_atoms and _cast_to_float32(pipe, name):
            unload_atoms(pipe, name)
            load_concept(pipe, concept.path, name, trigger_word=concept.new_trigger_word)
        weights[name] = weight
    set_weights(pipe, weights)
    if config.to == "pipeline":
        report = export_pipeline(pipe, config.output)
        if written != torch.float32:
            print(f"open it with dtype=torch.{dtype}: without, diffusers mixes precisions")
        return report
    phrase = ", ".join(concept.trigger_phrase for concept, _ in given if concept.trigger_phrase)
    if config.to == "diff":
        return export_diff(pipe, config.output, dtype=written, trigger_phrase=phrase)
    return export_lora(pipe, config.output, config.rank, dtype=written, trigger_phrase=phrase)


def _check_mergeable(pipe: Any, name: str, file: str) -> None:
    """Refuse an adapter of activations, by the file that it comes from, before anything is merged."""
    for model in pipeline_models(pipe).values():
        layers = adapter_state.adapter_layers(model, name).values()
        if not all(map(adapter_state.changes_weights, layers)):
            method = adapter_state.adapter_configs(model)[name].peft_type.value
            raise UserError(
                f"{file} is a {method} adapter, which cannot be exported: what it adds depends on its input, so that "
                "no weight has its effect; use it as it is, by load_atoms or atomdiff sample"
            )


def _cast_to_float32(pipe: Any, name: str) -> bool:
    """Cast an adapter's base layers to float32, as PEFT loads adapters in their dtype; tell whether any were cast."""
    models = pipeline_models(pipe).values()
    layers = [layer for model in models for layer in adapter_state.adapter_layers(model, name).values()]
    bases = [layer.get_base_layer() for layer in layers if adapter_state.changes_weights(layer)]
    half = [base for base in bases if base.weight.dtype in _HALVES]
    for base in half:
        base.float()
    return bool(half)


def _check_output(config: ExportConfig) -> None:
    """Refuse an output folder that is not empty, and an output file that is an input, before anything is loaded."""
    if config.to == "pipeline":
        check_empty(config.output, "output")
        return
    path = file_path(config.output)
    if os.path.isdir(path):
        raise UserError(f"output={str(path)!r} is a folder: give the name of a file")
    for source in (config.pretrained_model_name_or_path, *config.concepts):
        if os.path.exists(path) and os.path.exists(source) and path.samefile(source):
            raise UserError(f"output={str(path)!r} is also an input: give another name")


def _set_scheduler(config: ExportConfig, pipe: Any, concepts: list[tuple[str, ScheduleConfig]]) -> None:
    """Set the scheduler that the concepts were trained for, and print where it is not the base's."""
    base = pipe.scheduler
    asked = ScheduleConfig(config.prediction_type, config.rescale_betas_zero_snr)
    if config.to == "pipeline":
        advice = "export them separately, or set prediction_type and rescale_betas_zero_snr for all"
        found, how = common_scheduler(concepts, base, asked, advice), "the folder has the former"
        pipe.scheduler = pipeline_scheduler(pipe, found)
    else:
        how = "choose one like that where you use the file"
        try:
            found = pipe.scheduler = common_scheduler(concepts, base, advice="choose one where you use the file")
        except UserError as error:  # other programs choose the scheduler
            print(error)
            return
    if found is not base:
        print(f"trained for {describe_scheduler(pipe.scheduler)}, not the base's {describe_scheduler(base)}: {how}")
