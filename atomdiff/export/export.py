"""What the concepts in a pipeline change, in forms that other programs read: a pipeline, differences, a LoRA."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atomdiff.concepts.kohya import (
    as_written,
    is_sdxl,
    layer_name,
    metadata,
    named_rows,
    save_tensors,
    unread_by,
    zero_layers,
)
from atomdiff.export.low_rank import low_rank
from atomdiff.export.report import ExportedLayer, ExportReport
from atomdiff.pipelines.adapter_weight import command_line_weights
from atomdiff.pipelines.differences import layer_differences, without_adapters
from atomdiff.pipelines.load import list_atoms, load_concept, pipeline_models, unload_atoms
from atomdiff.pipelines.open import open_pipeline, refuse_other_pipelines
from atomdiff.pipelines.placeholder_tokens import token_id, tokens_in
from atomdiff.pipelines.portable import save_portable
from atomdiff.pipelines.scheduler import ScheduleConfig, common_scheduler, describe_scheduler, pipeline_scheduler
from atomdiff.pipelines.switch import set_weights
from atomdiff.pipelines.token_names import group_placeholder_tokens
from atomdiff.sampling.batching import Concept, given_concepts, schedules
from atomdiff.tuner import adapter_state
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.choices import PredictionType
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import PathText, check_writable, expand_paths, refuse_overlap

_Embeddings = dict[str, dict[str, Tensor]]  # word -> rows (n, hidden), named as in a file
_HALVES = (torch.float16, torch.bfloat16)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    """Strength of each concept: a number, 1 is as trained; or JSON, by block of the model:
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
        _check_rank(self.rank)


def export_concepts(config: ExportConfig) -> ExportReport:
    """Load a base with concepts and export them.

    Raises:
        UserError: the base or a concept cannot be used, or cannot be written in that form.
    """
    _check_output(config)
    given = given_concepts(config.concepts, config.weights, config.trigger_words)
    sources = {f"the concept {concept.file}": concept.path for concept, _ in given}
    refuse_overlap({"output": config.output}, {"the base": config.pretrained_model_name_or_path, **sources})
    check_writable(Path(config.output).parent, f"output={config.output!r}", Path(config.output).name)
    dtype = config.dtype or ("float32" if config.to == "pipeline" else "float16")
    written = getattr(torch, dtype)
    if config.to != "pipeline" and (words := _words_alone([concept for concept, _ in given])) is not None:
        path = _file(config.output)
        return ExportReport(path, embeddings=_save_embeddings(path.parent, f"{path.stem}-", words, written))
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
        load_concept(pipe, concept.path, name, trigger_word=concept.trigger_word)
        if concept.read is None and _widened(pipe, name):
            unload_atoms(pipe, name)
            load_concept(pipe, concept.path, name, trigger_word=concept.trigger_word)
        strengths[name] = strength
    set_weights(pipe, strengths)
    if config.to == "pipeline":
        report = export_pipeline(pipe, config.output)
        if written != torch.float32:
            print(f"open it with dtype=torch.{dtype}: diffusers mixes precisions without")
        return report
    phrase = ", ".join(concept.phrase for concept, _ in given if concept.phrase)
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
        _check_free(Path(config.output))
        return
    path = _file(config.output)
    if path.is_dir():
        raise UserError(f"output={str(path)!r} is a folder: give the name of a file")
    for source in (config.pretrained_model_name_or_path, *config.concepts):
        if path.exists() and Path(source).exists() and path.samefile(source):
            raise UserError(f"output={str(path)!r} is what is exported from: give another name")


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} is there already: give a new or empty folder")


def _file(output: str | os.PathLike[str]) -> Path:
    path = Path(output)
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def _words_alone(concepts: list[Concept]) -> _Embeddings | None:
    """The embeddings of concepts that are only words, which need no base; None: there are others."""
    words: _Embeddings = {}
    for concept in concepts:
        delta = concept.read() if concept.read is not None else None
        if delta is None or delta.layers:
            return None
        sdxl = "-xl-" in delta.modelspec.get("architecture", "")
        encoders = ["text_encoder", "text_encoder_2"] if sdxl else ["text_encoder"]
        if any(sorted(vectors) != encoders for vectors in delta.tokens.values()):
            return None
        groups = group_placeholder_tokens(delta.tokens)
        if groups.keys() & words.keys():
            return None
        for word, group in groups.items():
            rows = {encoder: torch.stack([delta.tokens[each][encoder] for each in group]) for encoder in encoders}
            words[word] = named_rows(rows, sdxl)
    return words


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


def export_pipeline(pipe: Any, folder: str | os.PathLike[str]) -> ExportReport:
    """Save a pipeline with its active concepts merged in, the words of all that are loaded in its text encoders.

    The pipeline is unmerged afterwards, with all concepts loaded; the files have its dtype. Words of active
    concepts are also embedding files in the folder's `embeddings`, for programs that take a checkpoint made of it.

    Raises:
        UserError: the folder is not empty.
    """
    folder = Path(folder)
    _check_free(folder)
    words = _words(pipe)  # of what is active, while there are layers to ask
    written = pipe.components["text_encoder"].dtype if words else torch.float32
    with without_adapters(pipe):
        with new_folder(folder) as unfinished:
            longer = save_portable(pipe, unfinished)
            embeddings = _save_embeddings(unfinished / "embeddings", "", words, written)
    embeddings = {word: folder / file.relative_to(unfinished) for word, file in embeddings.items()}
    return ExportReport(folder, embeddings=embeddings, longer_tables=longer, is_folder=True)


def export_diff(
    pipe: Any, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16, trigger_phrase: str = ""
) -> ExportReport:
    """Save what the active concepts change, whole: kohya's and LyCORIS's keys `.diff` (weights) and `.diff_b` (biases).

    Args:
        pipe: a pipeline with concepts of any PEFT method; a merged one is restored.
        path: the file; `.safetensors` is appended where it is missing. Embeddings of words are written beside it.
        dtype: of the written numbers.
        trigger_phrase: what to write in a prompt to get the concept.

    Raises:
        UserError: there is nothing to export, or it has no form in such a file; or a value is too large for `dtype`.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for difference in layer_differences(pipe):
        name = layer_name(pipe, difference.component, difference.module)
        weight = difference.parameters["weight"]
        tensors[f"{name}.diff"] = as_written(weight, dtype, name)
        if (bias := difference.parameters.get("bias")) is not None and bias.any():
            tensors[f"{name}.diff_b"] = as_written(bias, dtype, name)
        residual = float((weight.cpu() - tensors[f"{name}.diff"].float()).norm())
        layers.append(ExportedLayer(name, tuple(weight.shape), None, float(weight.norm()), residual))
    return _write(pipe, Path(path), tensors, layers, dtype, trigger_phrase)


def export_lora(
    pipe: Any,
    path: str | os.PathLike[str],
    rank: int = 16,
    *,
    dtype: torch.dtype = torch.float16,
    trigger_phrase: str = "",
) -> ExportReport:
    """Save the best approximation of a rank to what the active concepts change, with kohya's keys.

    A weight (out, in/groups, ...) becomes `lora_up` (out, r, 1, ...) and `lora_down` (r, in/groups, ...), r being
    `rank` or what the layer allows, and `alpha` `rank`; grouped convolutions so, too, as programs that merge read them.

    Args:
        pipe: a pipeline with concepts of any PEFT method; a merged one is restored.
        path: the file; `.safetensors` is appended where it is missing. Embeddings of words are written beside it.
        rank: of every layer, at least 1.
        dtype: of the written numbers.
        trigger_phrase: what to write in a prompt to get the concept.

    Raises:
        UserError: there is nothing to export, or it has no form in such a file; or a value is too large for `dtype`.
    """
    _check_rank(rank)
    tensors: dict[str, Tensor] = {}
    layers, biases = [], []
    for difference in layer_differences(pipe):
        name = layer_name(pipe, difference.component, difference.module)
        if isinstance(difference.layer, _TRANSPOSED):
            raise UserError(f"{name} is a transposed convolution, which has no LoRA in other programs: use --to diff")
        if (bias := difference.parameters.get("bias")) is not None and bias.any():
            biases.append(name)
        weight = difference.parameters["weight"]
        if not weight.any():
            continue
        matrix = weight.flatten(1)
        factors = low_rank(matrix, rank)
        scale = rank / len(factors[1])  # alpha / r, by which programs multiply what they load
        up, down = (as_written(factor / scale**0.5, dtype, name) for factor in factors)
        missed = matrix.cpu() - scale * up.float() @ down.float()
        tensors[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
        tensors[f"{name}.lora_down.weight"] = down.reshape(-1, *weight.shape[1:])
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))  # diffusers mistakes alphas that differ between layers
        size, residual = float(weight.norm()), float(missed.norm())
        layers.append(ExportedLayer(name, tuple(weight.shape), len(down), size, residual))
    return _write(pipe, Path(path), tensors, layers, dtype, trigger_phrase, rank, biases)


def _write(
    pipe: Any,
    path: Path,
    tensors: dict[str, Tensor],
    layers: list[ExportedLayer],
    dtype: torch.dtype,
    trigger_phrase: str,
    rank: int | None = None,
    biases: list[str] | None = None,
) -> ExportReport:
    path, words = _file(path), _words(pipe)
    if not tensors and not words:
        raise UserError("found nothing to export: no active concept changes the pipeline; load one, or give it weight")
    if tensors:
        tensors = tensors | zero_layers(pipe, tensors, float(rank or 1))
        save_tensors(path, tensors, metadata(pipe, path.stem, trigger_phrase, rank))
    embeddings = _save_embeddings(path.parent, f"{path.stem}-", words, dtype)
    unread = unread_by([layer.name for layer in layers], whole=rank is None)
    return ExportReport(path, tuple(layers), embeddings, tuple(biases or ()), unread)


def _words(pipe: Any) -> _Embeddings:
    """The trigger words of active concepts, as their rows in the embedding tables."""
    inactive = {concept.name for concept in list_atoms(pipe) if concept.layers and not concept.active}
    by_owner: dict[str | None, list[str]] = {}
    for word, entry in tokens_in(pipe).items():
        if entry.vectors and entry.owner not in inactive:
            by_owner.setdefault(entry.owner, []).append(word)
    groups = [group_placeholder_tokens(words) for words in by_owner.values()]
    return {word: embedding_rows(pipe, group) for found in groups for word, group in found.items()}


def _save_embeddings(folder: Path, prefix: str, words: _Embeddings, dtype: torch.dtype) -> dict[str, Path]:
    """Write a file for each word, named as every system allows. Returns word -> its file."""
    files: dict[str, Path] = {}
    for word, rows in words.items():
        name, taken = prefix + re.sub(r"[^\w.-]", "_", word), {file.stem.lower() for file in files.values()}
        names = chain([name], (f"{name}-{number}" for number in count(2)))
        files[word] = folder / f"{next(each for each in names if each.lower() not in taken)}.safetensors"
        save_tensors(files[word], {key: as_written(row, dtype, word) for key, row in rows.items()}, {})
    return files


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise UserError(f"rank={rank}: expected at least 1")


def embedding_rows(pipe: Any, words: Sequence[str]) -> dict[str, Tensor]:
    """The rows (n, hidden) of n words in the embedding tables, named as in files for ComfyUI and others."""
    rows = {}
    for encoder in ("text_encoder", "text_encoder_2"):
        if pipe.components.get(encoder) is not None:
            table, known = getattr(pipe, encoder).get_input_embeddings().weight.detach(), tokens_in(pipe)
            own = [known[word].vectors if word in known else {} for word in words]  # not rounded to the table's dtype
            found = [table[token_id(pipe, word, encoder)] for word in words]
            rows[encoder] = torch.stack([mine.get(encoder, row.float()) for mine, row in zip(own, found, strict=True)])
    return named_rows(rows, is_sdxl(pipe))
