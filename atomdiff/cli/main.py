"""The command line: `atomdiff <verb>`, one thin function a verb."""

import contextlib
import io
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.paths import PathText, expand_paths
from atomdiff.utils.progress import log
from atomdiff.utils.quiet import quiet_libraries

_PATIENCE = 20.0  # seconds in which a launcher ends the other processes, once one has ended


def train(args: Sequence[str]) -> None:
    """Train a concept from photos, or several."""
    from atomdiff.training.config import load_config

    config = load_config(args, prog="atomdiff train")
    quiet_libraries()
    from accelerate import PartialState

    from atomdiff.training import dreambooth
    from atomdiff.training.preflight import look_first

    runs = config.runs()
    if len(runs) > 1:  # a lone one is looked at when it begins
        look_first(runs)
    for run in runs:
        written = dreambooth.train(run)
        PartialState().print(f"saved {written}")
    PartialState().destroy_process_group()


def sample(args: Sequence[str]) -> None:
    """Draw prompts, with any number of concepts."""
    from atomdiff.sampling.config import SampleConfig
    from atomdiff.sampling.sample import save_samples

    config = parse_config(SampleConfig, args, prog="atomdiff sample")
    quiet_libraries()
    try:
        folder = save_samples(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command draws what is missing") from None
    from accelerate import PartialState

    PartialState().print(f"the pictures, grid.png and manifest.json are in {folder}")


@dataclass(frozen=True)
class InspectConfig:
    """Show what a concept file holds, or what an adapter would take on a base."""

    file: PathText | None = None
    """The concept file."""
    base: PathText | None = None
    """With a file, a base to measure its distance to: a folder or a Hub id. With --config, the architecture: sd-1.5,
    sd-2.1, sdxl, resnet-50, convnext-base, or a folder or Hub id; its weights are not needed."""
    config: PathText | None = None
    """What to count numbers and bytes of: a JSON file with the settings of any PEFT method, or atoms, or full."""

    def __post_init__(self) -> None:
        """Refuse what names neither or both."""
        expand_paths(self)
        if (self.file is None) == (self.config is None):
            raise UserError("give a concept file, or --base and --config to count what an adapter takes")
        if self.config is not None and self.base is None:
            raise UserError(f"--config {self.config} needs --base: what it is to be counted on, such as sd-1.5")


def inspect(args: Sequence[str]) -> None:
    """Show what a concept file holds, or what an adapter would take on a base."""
    config = parse_config(InspectConfig, args, prog="atomdiff inspect", positional="file")
    quiet_libraries()
    if config.file is not None:
        from atomdiff.cli.summary import describe

        print(describe(config.file, config.base))
    elif config.config is not None and config.base is not None:
        from atomdiff.concepts.parameter_count import count_numbers, describe_count
        from atomdiff.tuner.read_config import read_adapter

        print(describe_count(count_numbers(config.base, read_adapter(config.config))))


def export(args: Sequence[str]) -> None:
    """Write concepts for other programs: a pipeline, weight differences or a LoRA."""
    from atomdiff.export.export import ExportConfig, export_concepts
    from atomdiff.export.report import describe_export

    config = parse_config(ExportConfig, args, prog="atomdiff export")
    quiet_libraries()
    print(describe_export(export_concepts(config)))


def extract(args: Sequence[str]) -> None:
    """Find the atoms that best explain a fully tuned model."""
    from atomdiff.export.extract import ExtractConfig, extract_concept
    from atomdiff.export.extraction import describe_extraction

    config = parse_config(ExtractConfig, args, prog="atomdiff extract")
    quiet_libraries()
    print(describe_extraction(extract_concept(config)))
    print(f"saved {config.output}")


def demo(args: Sequence[str]) -> None:
    """Train on a folder of photos, draw, measure: the whole path on the embedded model."""
    from atomdiff.cli.demo import DemoConfig, describe_report, run_demo

    config = parse_config(DemoConfig, args, prog="atomdiff demo")
    log("loading torch and diffusers")
    quiet_libraries()
    print(describe_report(run_demo(config)))


def doctor(args: Sequence[str]) -> None:
    """Show what a bug report needs: versions, device, precision, optional packages, memory, disk, caches."""
    from atomdiff.cli.doctor import DoctorConfig, examine

    parse_config(DoctorConfig, args, prog="atomdiff doctor")
    print(examine())


VERBS = {verb.__name__: verb for verb in (train, sample, inspect, export, extract, demo, doctor)}


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        args: the command line without the program's name; by default that of this process.

    Returns:
        The exit status: 0; 1 for a bug and 2 for a mistake in what was asked, each told in one line; 130 if stopped;
        141 if nobody reads the output any more.
    """
    args = sys.argv[1:] if args is None else list(args)
    for stream in (sys.stdout, sys.stderr):  # file names and prompts may hold what the terminal's encoding has not
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


def run_program(name: str, work: Callable[[], None]) -> int:
    """Do the work of a program called `name`; return its exit status, as `main` says.

    What goes wrong in one of several processes goes wrong in the others too, or cuts them off; so only one tells of it:
    the first of them if it meets a mistake or is stopped. All else waits, and the launcher ends the processes that wait
    as soon as one has ended. Asked to stop, it waits for all of them instead; so the others then end without a word.
    """
    first = os.environ.get("RANK", "0") == "0"  # from the launcher, if there is one
    several = os.environ.get("WORLD_SIZE", "1") != "1"

    def tell(message: str) -> None:
        if not first:
            time.sleep(_PATIENCE)
        print(message, file=sys.stderr)

    try:
        try:
            work()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has gone, as head does
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        return 141
    except (UserError, OSError) as error:
        tell(f"{name}: error: {error}")
        return 2
    except SystemExit as end:
        if not isinstance(end.code, str):  # --help
            raise
        tell(end.code)
        return 2
    except KeyboardInterrupt as stop:
        if first:
            print(str(stop) or "stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if several and first:
            time.sleep(_PATIENCE)
        tell(f"{name}: {_unforeseen(error)}")
        return 1
    return 0


def _unforeseen(error: Exception) -> str:
    """Say in one line what happened that no check has foreseen; its traceback goes to a file."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"error: out of memory ({what}); take smaller images or batches, or shorten the list of prompts"
    told = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="atomdiff-error-", suffix=".txt", delete=False
        ) as file:
            file.write(told)
    except OSError:
        return f"error: {what}. This is a bug in atomdiff; please report it with these lines:\n{told}"
    return f"error: {what}. This is a bug in atomdiff; please report it with {file.name}"


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _usage() -> str:
    verbs = "\n".join(f"  {name:<9}{verb.__doc__}" for name, verb in VERBS.items())
    return f"usage: atomdiff VERB [OPTIONS]\n\n{verbs}\n\natomdiff VERB --help lists the options; atomdiff --version."
