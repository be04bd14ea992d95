"""README.md and docs/: commands are accepted, Python runs, links, files and figures are there."""

import dataclasses
import json
import math
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from peft import PeftConfig
from PIL import Image

from atomdiff.classify.config import ClassifyConfig
from atomdiff.cli.demo import DemoConfig
from atomdiff.cli.main import main
from atomdiff.cli.similar import SimilarConfig
from atomdiff.concepts.average import AverageConfig
from atomdiff.concepts.prune import PruneConfig
from atomdiff.evaluate.config import EvaluateConfig
from atomdiff.evaluate.metrics import METRICS, score
from atomdiff.evaluate.suite import Evaluation, GeneratedImages, PromptSuite
from atomdiff.export.export import ExportConfig
from atomdiff.export.extract import ExtractConfig
from atomdiff.sampling.config import SampleConfig
from atomdiff.serving.config import ServeConfig
from atomdiff.training.config import TrainConfig, load_config
from atomdiff.training.config.fleet import FleetOptions
from atomdiff.training.config.optimizer import OPTIMIZERS
from atomdiff.training.config.rerun import RerunConfig
from atomdiff.training.config.tune import TuneConfig
from atomdiff.training.optimizers import build_optimizer
from atomdiff.tuner import AtomConfig
from atomdiff.ui.config import UiConfig
from atomdiff.utils.options import parse_config, parse_values_with_overrides, parse_with_overrides
from benchmarks import methods as methods_benchmark
from benchmarks import methods_report, reproducibility, serving, tuning, tuning_rate
from benchmarks.compare_methods import CompareConfig
from benchmarks.screening import ScreeningConfig

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8") for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
}
CONCEPTS = ("out/demo/mug.atoms.safetensors", "out/robot/robot.atoms.safetensors")
VERBS = {
    "train": load_config,
    "train_dreambooth": load_config,
    "tune": lambda options: parse_with_overrides(TuneConfig, options),
    "fleet": lambda options: parse_values_with_overrides(FleetOptions, options),
    "rerun": lambda options: parse_config(RerunConfig, options, positional="folder"),
    "classify": lambda options: parse_with_overrides(ClassifyConfig, options),
    "train_classifier": lambda options: parse_with_overrides(ClassifyConfig, options),
    "sample": lambda options: parse_config(SampleConfig, options),
    "serve": lambda options: parse_config(ServeConfig, options),
    "evaluate": lambda options: parse_config(EvaluateConfig, options),
    "demo": lambda options: parse_config(DemoConfig, options),
    "export": lambda options: parse_config(ExportConfig, options),
    "extract": lambda options: parse_config(ExtractConfig, options),
    "similar": lambda options: parse_config(SimilarConfig, options, positional="file"),
    "average": lambda options: parse_config(AverageConfig, options, positional="files"),
    "ui": lambda options: parse_config(UiConfig, options),
    "prune": lambda options: parse_config(PruneConfig, options, positional="file"),
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands():
    text = "\n".join(block for page in PAGES for block in blocks(page, "sh")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def concept(tmp_path_factory):
    """The bytes of a concept file of the real base, whose deltas are zero."""
    import atomdiff
    from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
    from atomdiff.toybox.base import load_toybox

    pipe = load_toybox()
    add_placeholder_token(pipe, "sks")
    set_token_embedding(pipe, "sks", {"text_encoder": pipe.text_encoder.get_input_embeddings().weight[5].detach()})
    pipe.unet.add_adapter(atomdiff.AtomConfig(), "default")
    file = tmp_path_factory.mktemp("concept") / "mug.atoms.safetensors"
    atomdiff.save_atoms(pipe, file, "default", trigger_phrase="sks mug", base_model="samples/toybox-sd")
    return file.read_bytes()


@pytest.fixture
def clone(concept, tmp_path, monkeypatch):
    """A folder with the paths that the pages name, and the concepts that their commands train."""
    monkeypatch.chdir(tmp_path)
    for name in ("samples", "configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("my-photos", "my-images", "out/tuned", "out/demo", "out/robot", "dreambooth/dataset"):
        (tmp_path / name).mkdir(parents=True)
    for path in CONCEPTS:
        Path(path).write_bytes(concept)


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_make_commands_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {command[1] for command in commands() if command[0] == "make"}
    named |= {name for page in PAGES.values() for name in re.findall(r"`make ([\w-]+)`", page)}
    assert {"demo", "test", "check", "docs"} <= named <= set(targets)


@pytest.mark.slow
def test_every_command_is_accepted(clone, capsys):
    seen = set()
    for command in commands():
        if command[0] == "accelerate":
            launch = launch_command_parser().parse_args(command[2:])
            for file in filter(None, (launch.config_file, launch.training_script)):
                assert (ROOT / file).is_file()
            verb, options = Path(launch.training_script).stem, launch.training_script_args
        elif command[0] == "atomdiff":
            verb, options = command[1], command[2:]
        else:
            assert command[0] in ("make", "pre-commit", "."), command
            continue
        seen.add(verb)
        if verb == "inspect":
            main([verb, *options])
            assert ("sks mug" if options[0] in CONCEPTS else "17,524") in capsys.readouterr().out
        else:
            VERBS[verb](options)
    assert seen == {*VERBS, "inspect"}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(clone, page):
    names = {}
    for code in blocks(page, "python"):
        exec(code.replace(").images", ", num_inference_steps=1).images"), names)
    if "images" in names:
        assert names["images"][0].size == (128, 128)
    if "unload_atoms(pipe)  #" in code:
        assert not names["atomdiff"].list_atoms(names["pipe"])


def test_other_python_is_python():
    for page in PAGES:
        for code in blocks(page, "py"):
            compile(code, page, "exec")
            for line in re.findall(r"^from atomdiff\S* import .+", code, re.MULTILINE):
                exec(line, {})


def test_links_and_files_are_there():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
            assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), (page, link)
        for path in re.findall(
            r"(?<![\w/])(?:samples|configs|benchmarks|train_scripts|examples|atomdiff|tests)/[\w./-]+\w", text
        ):
            assert (ROOT / path).exists() or page == "CHANGELOG.md", (page, path)
    for path in re.findall(r"`([a-z]+/[\w/]*(?:\.py)?)`", PAGES["ARCHITECTURE.md"]):
        assert (ROOT / path).exists() or (ROOT / "atomdiff" / path).exists(), path


def test_names_of_modules_and_options_are_there():
    known = {"help", "version", "config", "file", "base", "nproc-per-node", "no-deps", "run", "part"}
    known |= {option[2:] for action in launch_command_parser()._actions for option in action.option_strings}
    kinds = (TrainConfig, ClassifyConfig, SampleConfig, EvaluateConfig, DemoConfig, ExportConfig, ExtractConfig)
    kinds += (PruneConfig, SimilarConfig, AverageConfig, RerunConfig, TuneConfig, FleetOptions, UiConfig, ServeConfig)
    kinds += (reproducibility.BenchmarkConfig, serving.BenchmarkConfig, tuning_rate.BenchmarkConfig)
    kinds += (CompareConfig, ScreeningConfig, tuning.BenchmarkConfig)
    for kind in kinds:
        known |= {field.name for field in dataclasses.fields(kind)}
    for page, text in PAGES.items():
        if page == "CHANGELOG.md":
            continue
        for name in re.findall(r"(?<![\w/-])atomdiff(?:\.[A-Za-z_]\w*)+(?!\w*[/\w])", text):
            assert pkgutil.resolve_name(name) is not None, (page, name)
        for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
            assert option in known, (page, option)


def test_the_page_on_the_method_names_every_setting():
    own, inherited = ({field.name for field in dataclasses.fields(config)} for config in (AtomConfig, PeftConfig))
    code = " ".join(re.findall(r"`([^`]*)`", PAGES["docs/method.md"]))
    assert own - inherited <= set(re.findall(r"\w+", code))


@pytest.mark.parametrize("name", ["metric", "optimizer"])
def test_what_the_pages_add_is_called(name, monkeypatch):
    names = {}
    exec(*blocks(f"docs/adding-{'an' if name[0] in 'aeiou' else 'a'}-{name}.md", "python"), names)
    if name == "metric":
        red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
        suite = PromptSuite("mug", ("{subject}",), (), images_per_prompt=1)
        evaluation = Evaluation(suite, None, [red], GeneratedImages([blue], []), GeneratedImages([red], []))
        monkeypatch.setitem(METRICS, "color_distance", names["color_distance"])
        scores = score(evaluation, {"color_distance": METRICS["color_distance"]})
        assert scores == {"color_distance": {"base": 0.6667, "concept": 0.0}}
    else:
        monkeypatch.setitem(OPTIMIZERS, "lion", names["lion"])
        command = "--pretrained_model_name_or_path base --instance_data_dir photos --class_name mug --optimizer lion"
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer, _ = build_optimizer(load_config(command.split()), {"adapter": [parameter]})
        parameter.square().sum().backward()
        optimizer.step()
        assert (parameter < 1).all()


USE_OF_THE_VARIANT = """
import torch
from peft import get_peft_model
from atomdiff import AtomConfig

for basis in ("svd", "dct", "sparse"):
    x = torch.randn(2, 4, 8, 8)
    config = AtomConfig(channel_block=1, target_modules="conv", scaled=True, basis=basis)
    model = get_peft_model(torch.nn.ModuleDict({"conv": torch.nn.Conv2d(4, 8, 3)}), config)
    layer = model.base_model.model["conv"]
    before = layer.base_layer(x)
    assert torch.allclose(layer(x), before, atol=1e-5)
    (gain,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert gain.shape == (9, 1)
    layer(x).square().sum().backward()
    gain.data -= gain.grad / gain.grad.norm()
    adapted = layer(x)
    assert not torch.allclose(adapted, before, atol=1e-3)
    layer.merge()
    assert torch.allclose(layer(x), adapted, atol=1e-4)
"""


@pytest.mark.slow
def test_the_variant_of_its_page_takes_the_places_that_it_says(tmp_path):
    page = "docs/adding-a-variant.md"
    shutil.copytree(ROOT / "atomdiff", tmp_path / "atomdiff", ignore=shutil.ignore_patterns("toybox", "__pycache__"))
    for file, marker, code in (
        ("variants.py", "VARIANTS: tuple", blocks(page, "python")[0].partition("Atoms\n")[2] + "\n\n"),
        ("variants.py", "(JointAtoms,", "(ScaledAtoms, "),
        ("settings.py", "    recursion: int | None = field(", f"    {blocks(page, 'py')[0]}"),
    ):
        path = tmp_path / "atomdiff" / "atoms" / file
        before, found_marker, after = path.read_text().partition(marker)
        assert found_marker
        path.write_text(before + code + marker.removeprefix("(" if code[0] == "(" else "") + after)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", USE_OF_THE_VARIANT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_figures_stand_in_the_result_files():
    checked = 0
    for page in ("README.md", "docs/benchmarks.md", "docs/method.md", "benchmarks/peft_image_gen/README.md"):
        measured = set()
        text = (ROOT / page).read_text("utf-8")
        text = text.partition(methods_report.START)[0] + text.partition(methods_report.END)[2]  # has a test of its own
        for above, line in pairwise(text.splitlines()):
            if files := re.findall(r"benchmarks/results/(?:[\w/-]+\.json|\w+/)", line):
                measured = set().union(*map(read_numbers, files))
            if not line.startswith("|") or not above.startswith("|"):
                continue
            for cell in line.split("|")[2:]:
                checked += check_figures(cell, measured)
    assert checked > 150


@pytest.mark.parametrize(
    ("page", "result", "quotes"),
    [
        ("libraries", "library", ["4.5 s", "22 MB", "10 ms", "1.2 µs"]),
        ("libraries", "library_similar", ["81 s", "14 ms", "1.4 µs", "162 MB", "8 s"]),
        ("method", "decompose", ["1.8 s", "18.4 s"]),
        ("method", "parameters", ["1,008 parameters", "0.0051"]),
        ("switching", "loading", ["1.08 GB"]),
    ],
)
def test_figures_in_sentences_stand_in_the_result_files(page, result, quotes):
    measured = read_numbers(f"benchmarks/results/{result}.json")
    for quote in quotes:
        assert quote in PAGES[f"docs/{page}.md"]
        assert check_figures(quote, measured) == 1


@pytest.mark.slow
def test_the_table_of_methods_is_that_of_its_result_file():
    measured = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text())["figures"]
    rows = [line for line in PAGES["docs/methods.md"].splitlines() if line.startswith("| `")]
    methods = dict.fromkeys(name.split(":")[0] for name in measured)
    assert rows == [methods_benchmark.row(method, measured) for method in methods] and len(rows) > 30
    for method in ("atoms/default", "lora/attention_r16", "vera/default"):
        counted = methods_benchmark.count(method)
        assert {f"{method}:{name}": value for name, value in counted.items()}.items() <= measured.items()


def test_the_comparison_of_methods_is_that_of_its_result_files():
    page, results = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results" / "methods"
    block = PAGES["docs/benchmarks.md"].partition(methods_report.START)[2].partition(methods_report.END)[0].strip()
    if results.is_dir():
        methods = methods_report.read_methods(results)
        plots = methods_report.plots(page, page.parent / "images")
        steps = methods_report.read_steps(results.parent / "training_step_toybox.json")
        assert block == f"{plots}\n\n{methods_report.make_table(methods, steps)}"
    else:
        assert block.startswith("Not measured yet")


def check_figures(text, measured):
    """Check that each figure of a text is among the measured numbers, to its decimals; return how many there are."""
    checked = list(figures(text))
    for figure, decimals, scales in checked:
        margin = 0.501 * 10**-decimals
        assert any(abs(number * scale - figure) < margin for number in measured for scale in scales), (text, figure)
    return len(checked)


def read_numbers(path):
    files = [*(ROOT / path).glob("*.json")] or [ROOT / path]
    return {number for file in files for number in numbers_in(json.loads(file.read_text()))}


def numbers_in(value):
    if isinstance(value, dict):
        for each in value.values():
            yield from numbers_in(each)
        if {"mug", "robot"} <= value.keys():  # the subjects of a trial, of which a table has the means
            both = zip(numbers_in(value["mug"]), numbers_in(value["robot"]), strict=True)
            yield from ((mug + robot) / 2 for mug, robot in both)
    elif isinstance(value, list):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, (int, float)) and math.isfinite(value):
        yield float(value)


def figures(cell):
    """The figures of a table's cell with their decimals, and what those in the file may be multiplied by."""
    units = {"GB": 1e-9, "MB": 1e-6, "KB": 1e-3, "%": 100}
    scales = [1, *(scale for unit, scale in units.items() if unit in cell)]
    cell = re.sub(r"`[^`]*`|[A-Za-z]\w*|\d+x\d+|MiB", " ", re.sub(r"\b\w* ?[=@*]+ ?\S*", " ", cell))
    for text in re.findall(r"(?<![\w.,])(?:\d[\d,]*(?:\.\d+)?|\.\d+)", cell):
        number = text.replace(",", "")
        yield float(number), len(number.partition(".")[2]), scales
