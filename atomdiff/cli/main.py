"""The command line: `atomdiff <verb>`, one thin function a verb."""

import io
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from atomdiff.cli.run_program import run_program
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config, parse_values_with_overrides, parse_with_overrides
from atomdiff.utils.progress import log
from atomdiff.utils.quiet import quiet_libraries

_DIFFERENT = 3  # exit status of a repetition with another result


def train(args: Sequence[str]) -> None:
    """Train one or more concepts from images."""
    from atomdiff.training.config import load_config

    config = load_config(args, prog="atomdiff train")
    quiet_libraries()
    if config.subjects_per_batch > 1:
        from atomdiff.training.together import describe_results, train_subjects

        print(describe_results(train_subjects(config)))
        return
    from accelerate import PartialState

    from atomdiff.training import dreambooth
    from atomdiff.training.preflight import check_runs
    from atomdiff.training.resume import finished_before

    runs = config.runs()
    finished: dict[str, Path | None] = {}
    if len(runs) > 1:  # a single one is checked when it begins
        check_runs(runs)
        if config.resume_from_checkpoint == "latest":
            finished = {run.name: finished_before(run) for run in runs}
    for run in runs:
        if finished.get(run.name):
            log(f"{run.name}: finished already")
            continue
        written = dreambooth.train(run)
        PartialState().print(f"saved {written}")
    PartialState().destroy_process_group()


def rerun(args: Sequence[str]) -> int:
    """Repeat a training run by its record, and compare the results."""
    from atomdiff.training.config.rerun import RerunConfig

    config = parse_config(RerunConfig, args, prog="atomdiff rerun", positional="folder")
    quiet_libraries()
    from accelerate import PartialState

    from atomdiff.training.rerun import repeat_run

    compared = repeat_run(config)
    PartialState().print(compared.describe())
    PartialState().destroy_process_group()
    return 0 if compared.agrees(config.tolerance) else _DIFFERENT


def tune(args: Sequence[str]) -> None:
    """Search the settings of a training run by its validation loss."""
    from atomdiff.training.config.tune import TuneConfig

    config = parse_with_overrides(TuneConfig, args, prog="atomdiff tune")
    quiet_libraries()
    from atomdiff.training.launch import check_packages

    check_packages(config)
    from atomdiff.training.tuning.search import tune as search

    print(search(config).describe())


def fleet(args: Sequence[str]) -> None:
    """Train many subjects of a table on several workers."""
    from dataclasses import fields

    from atomdiff.training.config import TrainConfig
    from atomdiff.training.config.fleet import FleetConfig, FleetOptions

    values = parse_values_with_overrides(FleetOptions, args, prog="atomdiff fleet")
    config = FleetConfig(**{field.name: values[field.name] for field in fields(FleetConfig)})
    quiet_libraries()
    from atomdiff.training.fleet.fleet import train_fleet

    report = train_fleet(config, {field.name: values[field.name] for field in fields(TrainConfig)})
    print(report.describe())
    if failed := report.count("failed"):
        raise UserError(f"failed subjects: {failed}; the report has the errors, the same command tries them again")


def sample(args: Sequence[str]) -> None:
    """Generate images from prompts, with any number of concepts."""
    from atomdiff.sampling.config import SampleConfig
    from atomdiff.sampling.sample import save_samples

    config = parse_config(SampleConfig, args, prog="atomdiff sample")
    quiet_libraries()
    try:
        folder = save_samples(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command generates what is missing") from None
    from accelerate import PartialState

    PartialState().print(f"the images, grid.png and manifest.json are in {folder}")
    PartialState().destroy_process_group()


def serve(args: Sequence[str]) -> None:
    """Serve images over HTTP, with the concepts of a library."""
    from atomdiff.serving.config import ServeConfig

    config = parse_config(ServeConfig, args, prog="atomdiff serve")
    quiet_libraries()
    from atomdiff.serving import server

    server.serve(config)


def inspect(args: Sequence[str]) -> None:
    """Show the contents of a concept file, or count the parameters of an adapter on a base model."""
    from atomdiff.cli.inspect import InspectConfig, inspect_concept

    config = parse_config(InspectConfig, args, prog="atomdiff inspect", positional="file")
    quiet_libraries()
    print(inspect_concept(config))


def evaluate(args: Sequence[str]) -> None:
    """Measure concepts: subject fidelity, prompt match, diversity, drift."""
    from atomdiff.cli.evaluate import evaluate_concepts
    from atomdiff.evaluate.config import EvaluateConfig

    config = parse_config(EvaluateConfig, args, prog="atomdiff evaluate")
    quiet_libraries()
    if summary := evaluate_concepts(config):
        print(summary)
    from accelerate import PartialState

    PartialState().destroy_process_group()


def export(args: Sequence[str]) -> None:
    """Write concepts for other programs: a pipeline, weight differences or a LoRA."""
    from atomdiff.export.export import ExportConfig, export_concepts
    from atomdiff.export.report import describe_export

    config = parse_config(ExportConfig, args, prog="atomdiff export")
    quiet_libraries()
    print(describe_export(export_concepts(config)))


def extract(args: Sequence[str]) -> None:
    """Fit a concept to the difference of a fully tuned model from its base."""
    from atomdiff.export.extract import ExtractConfig, extract_concept
    from atomdiff.export.extraction import describe_extraction

    config = parse_config(ExtractConfig, args, prog="atomdiff extract")
    quiet_libraries()
    print(describe_extraction(extract_concept(config)))
    print(f"saved {config.output}")


def prune(args: Sequence[str]) -> None:
    """Write a smaller concept file, with the most important directions of a concept."""
    from atomdiff.concepts.prune import PruneConfig, describe_pruned, prune_file

    config = parse_config(PruneConfig, args, prog="atomdiff prune", positional="file")
    quiet_libraries()
    print(describe_pruned(prune_file(config)))


def similar(args: Sequence[str]) -> None:
    """Show the concepts of a library that are most like one, or its duplicates."""
    from atomdiff.cli.similar import SimilarConfig, describe_similar

    config = parse_config(SimilarConfig, args, prog="atomdiff similar", positional="file")
    quiet_libraries()
    print(describe_similar(config))


def average(args: Sequence[str]) -> None:
    """Write the average of concepts that were trained from one start."""
    from atomdiff.concepts.average import AverageConfig, average_files

    config = parse_config(AverageConfig, args, prog="atomdiff average", positional="files")
    quiet_libraries()
    average_files(config)
    print(f"saved {config.output}: the average of {len(config.files)} concepts")


def demo(args: Sequence[str]) -> None:
    """Train on a folder of images, generate and measure, all on the embedded model."""
    from atomdiff.cli.demo import DemoConfig, describe_report, run_demo

    config = parse_config(DemoConfig, args, prog="atomdiff demo")
    log("loading torch and diffusers")
    quiet_libraries()
    print(describe_report(run_demo(config)))


def classify(args: Sequence[str]) -> None:
    """Tune an image classifier on folders of images."""
    from atomdiff.classify.config import ClassifyConfig

    config = parse_with_overrides(ClassifyConfig, args, prog="atomdiff classify")
    quiet_libraries()
    from accelerate import PartialState

    from atomdiff.classify.train import train_classifier

    report = train_classifier(config)
    shown = {split: accuracy for split, accuracy in report["accuracy"].items() if accuracy is not None}
    accuracies = ", ".join(f"{split} {accuracy:.3f}" for split, accuracy in shown.items())
    PartialState().print(f"saved {config.output_dir}/classifier; accuracy: {accuracies}")
    PartialState().destroy_process_group()


def ui(args: Sequence[str]) -> None:
    """Open a page in the browser to train, try and keep concepts without code."""
    from atomdiff.ui.config import UiConfig
    from atomdiff.ui.page import serve_page

    config = parse_config(UiConfig, args, prog="atomdiff ui")
    quiet_libraries()
    serve_page(config)


def doctor(args: Sequence[str]) -> None:
    """Show what a bug report needs: versions, device, precision, optional packages, memory, disk, caches."""
    from atomdiff.cli.doctor import DoctorConfig, examine

    parse_config(DoctorConfig, args, prog="atomdiff doctor")
    print(examine())


_TRAINING = (train, rerun, tune, fleet)
_FILES = (inspect, similar, export, extract, prune, average)
_VERBS = (*_TRAINING, sample, serve, evaluate, *_FILES, classify, demo, ui, doctor)
VERBS: dict[str, Callable[[Sequence[str]], int | None]] = {verb.__name__: verb for verb in _VERBS}


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        args: the command line without the program's name; by default that of this process.

    Returns:
        The exit status: 0; 1 for a bug and 2 for wrong input, each reported in one line; 3 if `rerun` gives another
        result; 130 if stopped; 141 if the output is no longer read.
    """
    args = sys.argv[1:] if args is None else list(args)
    for stream in (sys.stdout, sys.stderr):  # file names and prompts may hold what the terminal's encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if args == ["--version"]:
        print(f"atomdiff {version('atomdiff')}")
        return 0
    if not args or args[0] not in VERBS:
        asked = args[:1] in (["-h"], ["--help"])
        print(_usage(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries tell their developers
        warnings.filterwarnings("default", module="atomdiff")
        warnings.showwarning = _show_warning
        return run_program(f"atomdiff {args[0]}", lambda: VERBS[args[0]](args[1:]))


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _usage() -> str:
    verbs = "\n".join(f"  {name:<9}{verb.__doc__}" for name, verb in VERBS.items())
    return f"usage: atomdiff COMMAND [OPTIONS]\n\n{verbs}\n\n`atomdiff COMMAND --help` lists the options of one."
