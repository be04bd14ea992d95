"""PEFT's image-generation benchmark with our experiments: they train as its run.py trains, and are what is counted."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import peft
import pytest
import torch
import yaml
from peft import LNTuningConfig, PeftModel, get_peft_model
from torch import nn

from atomdiff.cli.demo import training_config
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.errors import UserError
from benchmarks.peft_image_gen import rates, run
from benchmarks.peft_image_gen.count import Count, build_transformer, confirm, count, read_experiment, rounded_share
from tests.tiny_models import FLUX2, make_flux2_transformer

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks/results/peft_image_gen.json").read_text())
EXPERIMENTS = sorted(run.EXPERIMENTS.iterdir())
FAKE_PROGRAM = """
import sys, peft
from utils import HELLO
from peft import PeftConfig
print(HELLO, sys.argv[1:], peft.__file__, type(PeftConfig.from_pretrained(sys.argv[-1])).__name__)
"""


@pytest.fixture
def clone(tmp_path):
    """A clone of PEFT with the installed sources and a program that shows what reaches it."""
    folder = tmp_path / "peft" / "method_comparison" / "image-gen"
    for made in (folder, tmp_path / "peft" / ".git", tmp_path / "peft" / "src"):
        made.mkdir(parents=True)
    (tmp_path / "peft" / "src" / "peft").symlink_to(Path(peft.__file__).parent)
    (folder / "run.py").write_text(FAKE_PROGRAM)
    (folder / "utils.py").write_text("HELLO = 'hello'\n")
    (folder / "default_training_params.json").write_text(
        json.dumps({"model_id": "black-forest-labs/FLUX.2-klein-base-4B", "dino_model_id": "facebook/dinov2-base"})
    )
    return tmp_path / "peft"


def predict(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**inputs, return_dict=False)[0]


def train(model: nn.Module, inputs: dict, **optimizer) -> None:
    trained = torch.optim.AdamW(model.train().parameters(), **optimizer)
    for _ in range(3):
        trained.zero_grad()
        model(**inputs, return_dict=False)[0].float().sub(1).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trained.step()


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_an_experiment_trains_saves_loads_and_merges(folder, tmp_path):
    base, inputs = make_flux2_transformer()
    base.to(torch.bfloat16).enable_gradient_checkpointing()
    inputs = {key: value.bfloat16() if "states" in key else value for key, value in inputs.items()}
    bits, before = {key: value.clone() for key, value in base.state_dict().items()}, predict(base, inputs)
    config = read_experiment(folder)
    counted = count(config, build_transformer(**FLUX2))
    settings = json.loads((folder / "training_params.json").read_text())["optimizer_kwargs"]
    model = get_peft_model(base, config, autocast_adapter_dtype=True)
    assert torch.equal(predict(model, inputs), before)
    train(model, inputs, **settings | {"lr": 5 * settings["lr"]})
    trained = predict(model, inputs)
    assert not torch.allclose(trained, before, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(predict(model, inputs), before)

    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert Count(*model.get_nb_trainable_parameters(), size) == counted
    loaded = PeftModel.from_pretrained(make_flux2_transformer()[0].to(torch.bfloat16), tmp_path)
    assert torch.equal(predict(loaded, inputs), trained)
    loaded.merge_adapter()
    assert torch.equal(predict(loaded, inputs), trained)
    loaded.unmerge_adapter()
    unloaded = loaded.unload().state_dict()
    assert unloaded.keys() == bits.keys() and all(torch.equal(unloaded[key], value) for key, value in bits.items())


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_a_step_moves_a_weight_by_the_part_of_its_norm_that_the_readme_says(folder):
    settings = json.loads((folder / "training_params.json").read_text())
    assert settings.keys() == {"optimizer_kwargs"}  # all else as in PEFT's own experiments
    block = read_experiment(folder).channel_block
    assert settings["optimizer_kwargs"]["lr"] * block == {2: 8e-3, 4: 8e-3, 8: 4e-3}[block]


def test_trials_of_rates_are_runs_of_the_demo_and_run_once(tmp_path, monkeypatch):
    ran = []

    def run_demo(config):
        run = training_config(config)
        assert (run.max_train_steps, run.train_batch_size, run.train_token, run.lr_scheduler) == (
            750,
            2,
            False,
            "constant",
        )
        ran.append((run.learning_rate, read_adapter(run.adapter).peft_type))
        Path(config.output_dir).mkdir()
        scores = {"similarity": {"normalized_gain": 0.5}, "drift": 0.25, "num_trainable_parameters": 7}
        (Path(config.output_dir) / "report.json").write_text(json.dumps(scores))

    monkeypatch.setattr("atomdiff.cli.demo.run_demo", run_demo)
    config = rates.RatesConfig(work_dir=str(tmp_path / "work"), output=str(tmp_path / "rates.json"))
    for _ in range(2):
        rates.main(config)
    assert ran == [(rate, adapter["peft_type"]) for adapter, rate in rates.TRIALS.values()]
    written = json.loads((tmp_path / "rates.json").read_text())
    recorded = json.loads((ROOT / "benchmarks/results/peft_image_gen_rates.json").read_text())
    assert written["figures"].keys() == recorded["figures"].keys()
    of_sampling = {"num_inference_steps": 0, "guidance_scale": 0}  # changed since it was recorded
    assert yaml.safe_load(written["run"]) | of_sampling == yaml.safe_load(recorded["run"]) | of_sampling


def test_the_figures_are_counted_again():
    figures, name = RESULT["figures"], "flux2-klein-block2-all"
    counted = asdict(count(read_experiment(run.EXPERIMENTS / name), build_transformer()))
    assert counted == {key: figures[f"{name}:{key}"] for key in counted}
    assert rounded_share(4, 1e-3) == pytest.approx(figures["share left in bfloat16:0.001"], abs=1e-3)
    assert {key.partition(":")[0] for key in figures} - {"share left in bfloat16"} == {
        each.name for each in EXPERIMENTS
    }


def test_the_architecture_is_the_one_of_peft_s_results(tmp_path, monkeypatch):
    """LN tuning trains 6,400 parameters in 19,856 bytes there."""
    name = "ln_tuning/flux2-klein-default"
    LNTuningConfig(target_modules=["norm_q", "norm_k"]).save_pretrained(tmp_path / "experiments" / name)
    monkeypatch.setattr("benchmarks.peft_image_gen.count.CONFIRMED", (name,))
    confirm(tmp_path, RESULT["published"])
    wrong = {name: RESULT["published"][name] | {"bytes": 19855}}
    with pytest.raises(UserError, match="counted .*19856.* published .*19855"):
        confirm(tmp_path, wrong)


@pytest.mark.slow
def test_the_program_of_the_clone_runs_with_the_method_registered(clone):
    """In a process of its own, as PEFT must not have been imported before."""
    code = (
        "import sys; from benchmarks.peft_image_gen import run; assert 'peft' not in sys.modules;"
        f"folder = run.benchmark_folder({str(clone)!r}); run.import_from(folder);"
        "run.start(folder, run.experiment_folder('flux2-klein-block4'), clean=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    arguments = ["--verbose", "--clean", "experiments/atoms/flux2-klein-block4"]
    assert done.stdout == f"hello {arguments} {clone}/src/peft/__init__.py AtomConfig\n", done.stderr


def test_what_is_missing_is_named(clone, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="found no .*run.py; expected an up-to-date clone: git clone https://"):
        run.benchmark_folder(str(tmp_path))
    folder, experiment = run.benchmark_folder(str(clone)), run.experiment_folder("flux2-klein-block4")
    (clone / ".git").rmdir()
    with pytest.raises(UserError, match="found no .git.*use git clone, not an archive"):
        run.benchmark_folder(str(clone))
    with pytest.raises(UserError, match="no such folder in .*; expected .*flux2-klein-block4"):
        run.experiment_folder("flux1")
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    with pytest.raises(UserError, match=r"found Python 3\.11, expected 3\.12"):
        run.check_python(folder)
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    monkeypatch.setattr(run, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(UserError, match=r"found no no_such_package: python -m pip install -r .*requirements\.txt"):
        run.check_python(folder)
    monkeypatch.setattr("peft.utils.infer_device", lambda: "cpu")
    with pytest.raises(UserError, match="found the device 'cpu', expected 'cuda' or 'xpu'"):
        run.check_device()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model_id black-forest-labs/FLUX\.2-\S+ cannot be loaded: .*go online"):
        run.check_models(folder, experiment)


def test_the_first_thing_missing_ends_the_program_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: --peft .*nowhere: found no "):
        run.main(run.RunConfig(str(tmp_path / "nowhere"), "flux2-klein-block4"))
