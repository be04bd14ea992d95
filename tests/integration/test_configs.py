"""Every file under configs/ loads, and every method in it goes the whole way, from training to unloading."""

import copy
import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import atomdiff
from atomdiff.atoms.variants import SCORE_NAME
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.concepts.parameter_count import count_parameters
from atomdiff.evaluate.size import num_trainable_parameters
from atomdiff.evaluate.suite import open_adapted
from atomdiff.pipelines.differences import merged_copy
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.toybox.base import load_toybox
from atomdiff.training import saving
from atomdiff.training.dreambooth import load_config, train
from atomdiff.training.method import make_trainable
from atomdiff.training.report import write
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.errors import UserError
from benchmarks.experiments import all_methods, own_rate, rate_option
from tests.helpers import add_adapter, assert_same_tensors, assert_unchanged, concept_bytes, predict, read_log, snapshot

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "configs" / "experiments"
ADAPTERS = sorted(EXPERIMENTS.rglob("adapter.json"))
RUNS = sorted((ROOT / "configs").glob("*.yaml"))
METHODS = all_methods()
NOT_MERGED = {"beft/default": "Base layer has no bias"} | {
    method: "depends on its input" for method in METHODS if method.startswith(("mona", "conv_adapter", "coeff_tuning"))
}
RESUMED = ("boft/default", "psoft/default", "shira/default", "unilora/default", "vera/default")  # with tensors beside
PROMPT = "a photo of sks mug"


def test_there_are_configs_to_load():
    assert len(ADAPTERS) >= 5 and RUNS
    known = {*ADAPTERS, *RUNS, *(path.with_name("overrides.yaml") for path in ADAPTERS)}
    known |= {*(ROOT / "configs" / "protocols").glob("*.yaml")}  # tests/evaluate/test_protocol.py reads them
    known |= {*(ROOT / "configs" / "search").glob("*.yaml")}  # tests/training/tuning/test_space.py reads them
    known |= {*(ROOT / "configs" / "accelerate").glob("*.yaml")}  # test_accelerate_configs.py reads them
    assert known == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_run_loads(path):
    config = load_config(["--config", str(path), "--instance_data_dir", "photos", "--class_name", "mug"])
    read_adapter(config.adapter)
    base = config.pretrained_model_name_or_path
    assert (ROOT / base).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not base.startswith("samples")


@pytest.mark.slow
@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: str(path.parent.relative_to(EXPERIMENTS)))
def test_every_adapter_loads_with_its_own_learning_rate(path):
    adapter = read_adapter(str(path))
    parts = adapter.parts() if isinstance(adapter, atomdiff.CombinedConfig) else filter(None, [adapter])
    assert all(part.target_modules for part in parts)
    arguments = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "photos", "--class_name", "mug"]
    config = load_config([*arguments, "--adapter", str(path)])
    method = str(path.parent.relative_to(EXPERIMENTS))
    assert getattr(config, rate_option(method)) == own_rate(method)


@pytest.fixture
def in_training(monkeypatch):
    """Notes what the UNet predicts at the end of each run, before its adapter is saved as usual."""
    seen, usual = {}, saving.save_trained

    def look(pipe, *arguments, **metadata):
        pipe.unet.eval()
        seen["prediction"] = predict(pipe, PROMPT)
        usual(pipe, *arguments, **metadata)

    monkeypatch.setattr(saving, "save_trained", look)
    monkeypatch.setattr(write, "write_pages", lambda _: None)  # of the report, which take half of a run's time
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Specified to not load")  # PEFT's, of random projections that follow from a seed
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_resumes_loads_merges_and_unloads(method, train_config, tiny_pipe, in_training):
    file = EXPERIMENTS / method / "adapter.json"
    config = train_config(adapter=str(file), learning_rate=0.02, max_train_steps=2, checkpointing_steps=1)
    config = dataclasses.replace(config, validation_loss_steps=0)
    written = train(config)
    assert all(math.isfinite(line["loss"]) for line in read_log(config))
    _check_counts(config, written)
    if method in RESUMED:
        expected = concept_bytes(written)
        assert concept_bytes(train(dataclasses.replace(config, resume_from_checkpoint="checkpoint-1"))) == expected
    if not written.is_file():  # atoms: tests/training/test_resume.py
        assert_same_tensors(*(_started(tiny_pipe.unet, config) for _ in range(2)))

    is_full, trains_unet = method.startswith("full"), not method.startswith("token")
    before, words = snapshot(tiny_pipe), ("a photo of a mug" if trains_unet else PROMPT)
    plain = predict(tiny_pipe, words)
    pipe = open_adapted(tiny_pipe, written)
    tolerance = 1e-2 if written.is_file() else 1e-5  # concept files are in float16
    torch.testing.assert_close(predict(pipe, PROMPT), in_training["prediction"], atol=tolerance, rtol=0)
    tuned = predict(pipe, words)
    assert (tuned - plain).abs().max() > 2 * tolerance
    if is_full:
        return
    if trains_unet:
        _check_merging(method, pipe)
    atomdiff.unload_atoms(pipe)
    assert_unchanged(pipe, before)
    if not written.is_file():
        pipe.unet = PeftModel.from_pretrained(pipe.unet, written)
        torch.testing.assert_close(predict(pipe, words), tuned, atol=1e-5, rtol=0)


def _started(unet, config):
    """The tensors of a UNet that is about to be trained, whatever the state of the global random numbers."""
    unet = copy.deepcopy(unet)
    torch.rand(1)
    make_trainable(unet, read_adapter(config.adapter), config.seed)
    return unet.state_dict() | dict(unet.named_buffers())


def _check_counts(config, written):
    """Check that what counts parameters, in files and without weights, counts those that were trained."""
    state = torch.load(Path(config.output_dir) / "checkpoint-2" / "state.pt", weights_only=True)
    trained = {name: parameter.numel() for name, parameter in state["parameters"].items()}
    of_unet = sum(count for name, count in trained.items() if name.startswith("denoiser."))
    counted = count_parameters(config.pretrained_model_name_or_path, read_adapter(config.adapter))
    assert counted.num_trainable_parameters == of_unet
    is_pipeline = (written / "model_index.json").is_file()  # of which the trigger word does not count
    in_file = sum(count for name, count in trained.items() if SCORE_NAME not in name)
    assert num_trainable_parameters(written) == (of_unet if is_pipeline else in_file)


def _check_merging(method, pipe):
    """Check that merging changes nothing but the speed, or is refused; the pipeline may be merged afterwards."""
    unmerged = predict(pipe, PROMPT)
    if method in NOT_MERGED:
        for action in (atomdiff.merge, merged_copy):
            with pytest.raises(UserError, match=NOT_MERGED[method]):
                action(pipe)
    else:
        torch.testing.assert_close(predict(merged_copy(pipe), PROMPT), unmerged, atol=1e-4, rtol=0)
        atomdiff.merge(pipe)
        assert atomdiff.list_atoms(pipe)[0].merged
        torch.testing.assert_close(predict(pipe, PROMPT), unmerged, atol=1e-4, rtol=0)
        atomdiff.restore(pipe)
    assert torch.equal(predict(pipe, PROMPT), unmerged)
    if method not in NOT_MERGED:
        atomdiff.set_active(pipe, "concept")
        torch.testing.assert_close(predict(pipe, PROMPT), unmerged, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("method", "limit"), [("tiny", 10_000), ("default", 60_000), ("faithful", 200_000)])
def test_files_of_atoms_on_the_toybox_have_the_size_that_they_are_for(method, limit, train_config, tmp_path):
    pipe = load_toybox()
    make_trainable(pipe.unet, read_adapter(str(EXPERIMENTS / "atoms" / method / "adapter.json")), seed=0)
    add_placeholder_token(pipe, "sks")
    set_token_embedding(pipe, "sks", {"text_encoder": pipe.text_encoder.get_input_embeddings().weight[5].detach()})
    training = {"config": train_config().snapshot()}
    assert atomdiff.save_atoms(pipe, tmp_path / "mug.atoms.safetensors", training=training).stat().st_size < limit


def test_a_concept_of_two_kilobytes_has_no_more(tmp_path):
    pipe = load_toybox()
    add_adapter(pipe, "mug", read_adapter(str(EXPERIMENTS / "atoms" / "shared_2kb" / "adapter.json")))
    add_placeholder_token(pipe, "sks")
    set_token_embedding(pipe, "sks", {"text_encoder": torch.randn(pipe.text_encoder.config.hidden_size)})
    training = {"steps": 300, "seed": 0, "image_count": 5, "final_loss": 0.35416426508595616}
    metadata = {"trigger_phrase": "sks mug", "training": training, "base_model": "samples/toybox-sd"}
    written = atomdiff.save_atoms(pipe, tmp_path / "mug.atoms.safetensors", "mug", **metadata)
    assert written.stat().st_size < 2048
    assert read_concept_file(written).tokens.keys() == {"sks"}
