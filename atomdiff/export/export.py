"""What the concepts in a pipeline change, in forms that other programs read: a pipeline, differences, a LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from atomdiff.export.embeddings import embeddings_without_base, save_embeddings
from atomdiff.export.lora import check_rank, export_lora
from atomdiff.export.merged_delta import export_diff, file_path
from atomdiff.export.pipeline_folder import check_empty, export_pipeline
from atomdiff.export.report import ExportReport
from atomdiff.pipelines.adapter_weight import command_line_weights
from atomdiff.pipelines.load import load_concept, pipeline_models, unload_atoms
from atomdiff.pipelines.open import open_pipeline, refuse_other_pipelines
from atomdiff.pipelines.scheduler import ScheduleConfig, common_scheduler, describe_scheduler, pipeline_scheduler
from atomdiff.pipelines.switch import set_weights
from atomdiff.sampling.concept_source import open_sources, schedules
from atomdiff.tuner import adapter_state
from atomdiff.utils.choices import PredictionType
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import PathText, check_writable, expand_paths, refuse_overlap

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ExportConfig:
    """Write concepts, with their weights, to a file or folder that other programs read.

    Raises:
        UserError: a field has a value that cannot be used.
    """

    pretrained_model_name_or_path: PathText
    """The base: a folder or a Hub id."""
    concepts: tuple[PathText, ...]
    """Concepts: files, directories written by PEFT, or user/repo on the Hub."""
    to: Literal["pipeline", "diff", "lora"]
    """pipeline: a diffusers folder with the concepts merged in. diff: the exact differences of the weights, as large as
    the weights, for ComfyUI, Stable Diffusion WebUI and InvokeAI. lora: their best approximation of a rank, for these
    and diffusers."""
    output: PathText
    """The folder (pipeline) or the .safetensors file (diff, lora) to write."""
    rank: int = 16
    """Rank of the LoRA."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the written numbers. Default: float16; of a pipeline float32, as others have to be opened with their
    dtype."""
    weights: tuple[float | dict[Any, Any], ...] = ()
    """AdapterWeight of each concept: a number, 1 is as trained; or JSON, by block of the model:
    '{"weight": 0.8, "blocks": {"down": 0.5, "up.1": 0}}'. Default: 1 each."""
    trigger_words: tuple[str, ...] = ()
    """Word to use for each concept, where two come with the same one. Default: their own."""
    revision: str | None = None
    """Revision of a base on the Hub."""
    variant: str | None = None
    """Variant of the base's files, such as fp16."""
    single_file_config: PathText | None = None
    """Folder or Hub id of a pipeline whose configs describe a base that is one checkpoint file. Default: the one that
    diffusers finds out, from the Hub."""
    prediction_type: PredictionType | None = None
    """What a pipeline's scheduler says is predicted. Default: what the concepts were trained to predict, else what the
    base's scheduler config says."""
    rescale_betas_zero_snr: bool | None = None
    """Whether the noise schedule of a pipeline ends in pure noise. Default: as for prediction_type."""

    def __post_init__(self) -> None:
        expand_paths(self)
        for strength in command_line_weights(self.concepts, self.weights, self.trigger_words):
            if strength.steps:
                raise UserError(
                    f"found steps={dict(strength.steps)} in weights: what is exported is the same at every denoising "
                    "step; leave steps out"
                )
        if not self.concepts:
            raise UserError("found no concept; give --concepts")
        ScheduleConfig(self.prediction_type)  # refuses what it does not know
        for name in ("prediction_type", "rescale_betas_zero_snr"):
            if self.to != "pipeline" and getattr(self, name) is not None:
                found = f"{name}={getattr(self, name)!r}: a file of {self.to} has no scheduler"
                raise UserError(f"{found}; leave it out, or export a pipeline")
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
    check_writable(Path(config.output).parent, f"output={config.output!r}", Path(config.output).name)
    dtype = config.dtype or ("float32" if config.to == "pipeline" else "float16")
    written = getattr(torch, dtype)
    if config.to != "pipeline" and (words := embeddings_without_base([concept for concept, _ in given])) is not None:
        path = file_path(config.output)
        return ExportReport(path, embeddings=save_embeddings(path.parent, f"{path.stem}-", words, written))
    refuse_other_pipelines(
        config.pretrained_model_name_or_path, revision=config.revision, single_file_config=config.single_file_config
    )
    pipe = open_pipeline(
        config.pretrained_model_name_or_path,
        written if config.to == "pipeline" else None,
        revision=config.revision,
        variant=config.variant,
        single_file_config=config.single_file_config,
    )
    _set_scheduler(config, pipe, schedules(given))
    strengths = {}
    for number, (concept, strength) in enumerate(given, start=1):
        name = f"concept{number}"
        load_concept(pipe, concept.path, name, trigger_word=concept.new_trigger_word)
        if concept.read is None and _widened(pipe, name):
            unload_atoms(pipe, name)
            load_concept(pipe, concept.path, name, trigger_word=concept.new_trigger_word)
        strengths[name] = strength
    set_weights(pipe, strengths)
    if config.to == "pipeline":
        report = export_pipeline(pipe, config.output)
        if written != torch.float32:
            print(f"open it with dtype=torch.{dtype}: diffusers mixes precisions without")
        return report
    phrase = ", ".join(concept.trigger_phrase for concept, _ in given if concept.trigger_phrase)
    if config.to == "diff":
        return export_diff(pipe, config.output, dtype=written, trigger_phrase=phrase)
    return export_lora(pipe, config.output, config.rank, dtype=written, trigger_phrase=phrase)


def _widened(pipe: Any, name: str) -> bool:
    """Cast the layers below an adapter to float32, whose dtype other methods than atoms give to their parameters."""
    layers = [layer for model in pipeline_models(pipe).values() for layer in adapter_state.adapter_layers(model, name)]
    narrow = [base for layer in layers if (base := layer.get_base_layer()).weight.dtype in _HALVES]
    for base in narrow:
        base.float()
    return bool(narrow)


def _check_output(config: ExportConfig) -> None:
    """Refuse an output that is in the way, before anything is loaded: a folder in use, or what is read."""
    if config.to == "pipeline":
        check_empty(Path(config.output))
        return
    path = file_path(config.output)
    if path.is_dir():
        raise UserError(f"output={str(path)!r} is a folder: give the name of a file")
    for source in (config.pretrained_model_name_or_path, *config.concepts):
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise UserError(f"output={str(path)!r} is what is exported from: give another name")


def _set_scheduler(config: ExportConfig, pipe: Any, concepts: list[tuple[str, ScheduleConfig]]) -> None:
    """Give the pipeline the scheduler that its concepts are drawn with, and print where that is not the base's."""
    base = pipe.scheduler
    asked = ScheduleConfig(config.prediction_type, config.rescale_betas_zero_snr)
    if config.to == "pipeline":
        advice = "export them by themselves, or choose for all with prediction_type and rescale_betas_zero_snr"
        found, how = common_scheduler(concepts, base, asked, advice), "so in the folder"
        pipe.scheduler = pipeline_scheduler(pipe, found)
    else:
        how = "choose the like where you draw with the file"
        try:
            found = pipe.scheduler = common_scheduler(concepts, base, advice="choose one where you draw with the file")
        except UserError as error:  # drawing is up to others
            print(error)
            return
    if found is not base:
        print(f"trained for {describe_scheduler(pipe.scheduler)}, not the base's {describe_scheduler(base)}: {how}")
