"""Where the result of a run is written, and how: a concept file, the folder of a PEFT adapter, or a pipeline."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from peft import PeftConfig

from atomdiff.concepts.concept_file import CONCEPT_SUFFIX
from atomdiff.concepts.sources import INIT_FROM
from atomdiff.pipelines.placeholder_tokens import set_token_embedding
from atomdiff.pipelines.portable import save_portable
from atomdiff.pipelines.save import save_atoms
from atomdiff.training.base_model import all_parts_loaded
from atomdiff.training.method import ADAPTER_NAME
from atomdiff.training.run import Run
from atomdiff.tuner import AtomConfig
from atomdiff.utils.atomic import new_folder, write_result
from atomdiff.utils.errors import UserError

# Parts of Stable Diffusion pipelines, in a folder that one was saved to.
_PIPELINE_ENTRIES = (
    "model_index.json vae unet text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler safety_checker "
    "feature_extractor image_encoder"
).split()


def result_path(adapter: PeftConfig | None, path: Path) -> Path:
    """Return where `save_trained` writes to: `path`, with the suffix of a concept file if it will be one."""
    return path.with_name(f"{path.name}{CONCEPT_SUFFIX}") if isinstance(adapter, AtomConfig) else path


def check_result_path(path: Path, adapter: PeftConfig | None, read: Iterable[str | None]) -> None:
    """Refuse a path for `save_trained` that holds what the run reads, or something else than a result.

    Raises:
        UserError: It is such a path.
    """
    target = path.resolve()
    for name in filter(None, read):
        source = Path(name).resolve()
        if source.exists() and (source.is_relative_to(target) or target.is_relative_to(source)):
            advice = "name another output_dir, or rename instance_data_dir, whose name it has"
            raise UserError(f"{path}: the result would replace {name!r}, which the run reads; {advice}")
    if adapter is None and path.is_dir() and any(path.iterdir()) and not (path / "model_index.json").is_file():
        raise UserError(f"{path}: holds something other than a pipeline; move it away, or name another output_dir")


def save_trained(pipe: StableDiffusionPipeline, adapter: PeftConfig | None, path: Path, **metadata: Any) -> None:
    """Save the adapter of a complete pipeline, with metadata for `save_atoms`; with full tuning all of the pipeline."""
    if adapter is None:
        write_pipeline(pipe, path)
    else:
        save_atoms(pipe, path, adapter_name=ADAPTER_NAME, **metadata)


def write_pipeline(pipe: Any, folder: Path) -> None:
    """Save a pipeline whole or not at all; of what the folder holds, only the parts of another pipeline are replaced.

    Raises:
        WriteError: It cannot be written.
    """
    with new_folder(folder, own=(*_PIPELINE_ENTRIES, *pipe.components)) as unfinished:
        save_portable(pipe, unfinished)


def save_result(
    run: Run, adapter: PeftConfig | None, path: Path, step: int, final_loss: float, trained_with: dict[str, Any]
) -> None:
    """Write what was trained in `step` steps, the trigger words included.

    And how: with which config snapshot, to which average loss at the run's end.

    Raises:
        WriteError: It cannot be written there; if it can be in the folder for temporary files, the message says where.
    """
    with complete_pipeline(run):
        metadata = concept_metadata(run, step, final_loss, trained_with)
        write_result(path, lambda target: save_trained(run.pipe, adapter, target, **metadata))


@contextmanager
def complete_pipeline(run: Run) -> Iterator[None]:
    """Put the trigger words that were trained into the pipeline, which has all of its parts for a while."""
    for word, embeddings in run.model.learned_embeddings().items():
        set_token_embedding(run.pipe, word, embeddings)
    with all_parts_loaded(run.config, run.pipe):
        yield


def concept_metadata(run: Run, step: int, final_loss: float, trained_with: dict[str, Any]) -> dict[str, Any]:
    """Return what `save_atoms` is told of a run."""
    training = {
        "config": trained_with,
        "steps": step,
        "seed": run.config.seed,
        "image_count": run.dataset.num_instance_images,
        "final_loss": final_loss,
        **({INIT_FROM: run.start} if run.start else {}),
    }
    base_model = run.config.pretrained_model_name_or_path
    return {"trigger_phrase": run.config.trigger_phrase, "training": training, "base_model": base_model}
