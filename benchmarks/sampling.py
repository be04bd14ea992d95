"""How the toybox is sampled best: scheduler, steps and guidance, one changed at a time, on concepts of tuning subjects.

    python -m benchmarks.sampling --processes 2

The concepts are trained at the learning rates of their methods. Prompts and seeds are the same for every setting. The
result file has the mean similarity of the images to photos that were not trained on, by method, with standard errors
over subjects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atomdiff.evaluate.encoders import ImageEncoder
from atomdiff.evaluate.protocol import load_protocol
from atomdiff.evaluate.similarity import similarities
from atomdiff.evaluate.suite import PromptSuite, generate_images, open_adapted, read_subject
from atomdiff.serving.schedulers import named_scheduler
from atomdiff.utils.assets import find_asset
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.experiments import make_trial, own_rate
from benchmarks.result_file import command_line, write_result
from benchmarks.trial_figures import check_protocols, summarize
from benchmarks.trial_runner import run_concepts
from benchmarks.trials import Trial, concept_path


@dataclass(frozen=True)
class SamplingConfig:
    """Sample concepts in several ways."""

    methods: tuple[str, ...] = ("atoms/default", "lora/attention_r16")
    """Methods that the concepts are trained with."""
    subjects: tuple[str, ...] = ()
    """Subjects to train. Default: all of the protocol."""
    schedulers: tuple[str, ...] = ("dpm++_2m", "euler_ancestral")
    """Schedulers besides the base's own."""
    steps: tuple[int, ...] = (25, 40)
    """Numbers of steps besides that of `run`."""
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 2.5, 4.0)
    """Guidance scales besides that of `run`."""
    images_per_prompt: int = 4
    """Images of each prompt."""
    processes: int = 1
    """Training runs at a time."""
    run: str = "configs/demo.yaml"
    """Settings of the training runs and of sampling."""
    tuning_dir: str = "samples/tuning_subjects"
    """A folder of photos for each subject."""
    protocol: str = "toybox_tuning"
    """Protocol that has the prompts."""
    work_dir: str = "out/sampling"
    """Folder of the runs; finished ones are not repeated."""
    output: str = "benchmarks/results/sampling.json"
    """The result file."""


def settings_of(config: SamplingConfig) -> dict[str, dict[str, Any]]:
    """Return by name what differs from the settings of the run, and the name of another scheduler than the base's."""
    return {
        "as it is": {},
        **{name: {"scheduler": name} for name in config.schedulers},
        **{f"{steps} steps": {"num_inference_steps": steps} for steps in config.steps},
        **{f"guidance {scale:g}": {"guidance_scale": scale} for scale in config.guidance_scales},
    }


def train_concepts(config: SamplingConfig) -> dict[str, list[Trial]]:
    """Return the finished trials of each method.

    Raises:
        UserError: one has failed.
    """
    subjects = config.subjects or tuple(load_protocol(config.protocol).subjects)
    check_protocols((config.protocol,), subjects, Path(config.tuning_dir))
    trials = {
        method: [
            make_trial(
                method,
                own_rate(method),
                Path(config.tuning_dir) / subject,
                (config.protocol,),
                0,
                config.run,
                config.work_dir,
            )
            for subject in subjects
        ]
        for method in config.methods
    }
    run_concepts([trial for each in trials.values() for trial in each], config.processes)
    return trials


def similarity_by_setting(
    config: SamplingConfig, trial: Trial, settings: Mapping[str, dict[str, Any]], judge: ImageEncoder
) -> dict[str, float]:
    """Return the mean similarity of a concept's images to the unseen photos of its subject, by setting."""
    from diffusers import StableDiffusionPipeline

    from atomdiff.utils.precision import autocast, compute_device

    run, device = trial.config(), compute_device()
    photos = Path(config.tuning_dir)
    prompts = load_protocol(config.protocol).subject(trial.subject, None, photos, alone=False).prompts
    texts = tuple(prompt.text for prompt in prompts)
    usual = {"num_inference_steps": run.num_inference_steps, "guidance_scale": run.guidance_scale}
    suite = PromptSuite(trial.subject, texts, (), images_per_prompt=config.images_per_prompt, **usual)
    references = judge.embed(read_subject(photos / trial.subject)[1])
    pipe = StableDiffusionPipeline.from_pretrained(find_asset(run.pretrained_model_name_or_path))
    pipe = open_adapted(pipe.to(device), concept_path(trial)).to(device)
    pipe.set_progress_bar_config(disable=True)
    own, found = pipe.scheduler, {}
    for name, changes in settings.items():
        changes = {**changes}
        scheduler = changes.pop("scheduler", None)
        pipe.scheduler = own if scheduler is None else named_scheduler(scheduler, own)
        asked = replace(suite, **changes)
        images = generate_images(asked, pipe, run.trigger_phrase, name, autocast(device, run.mixed_precision)).subject
        found[name] = float(similarities(judge.embed(images), references).mean())
    return found


def make_table(figures: Mapping[str, Mapping[str, Any]], methods: Sequence[str]) -> str:
    """Return the similarities as a Markdown table."""
    lines = [f"| | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for name in figures[methods[0]]:
        cells = [figures[method][name] for method in methods]
        shown = [f"{c['mean']:.3f} ± {c['standard_error'] or 0:.3f}" for c in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(config: SamplingConfig) -> None:
    """Train what is missing, sample, and write the result file."""
    quiet_libraries()
    from atomdiff.toybox.judge import load_judge

    settings, judge, figures = settings_of(config), load_judge(), {}
    for method, trials in train_concepts(config).items():
        found = {trial.subject: [similarity_by_setting(config, trial, settings, judge)] for trial in trials}
        figures[method] = summarize(found)
    write_result(config.output, command_line("sampling", config, ("work_dir", "output", "processes")), figures)
    print(make_table(figures, config.methods))


if __name__ == "__main__":
    main(parse_config(SamplingConfig, prog="python -m benchmarks.sampling"))
