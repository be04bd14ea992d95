"""Runs that choose their layers: what they write, within which size, stopped and resumed, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from atomdiff.concepts import peft_folder
from atomdiff.concepts.concept_file import read_concept_file, trained_tensors
from atomdiff.evaluate.size import num_trainable_parameters
from atomdiff.training import dreambooth, layer_budget
from atomdiff.training.dreambooth import train
from atomdiff.training.validation_loss import FixedSamples
from atomdiff.tuner.selection import layer_scores
from atomdiff.utils.errors import UserError
from tests.helpers import concept_bytes, stop_at

BUDGET = 16_000


@pytest.fixture
def adaptive(config, tmp_path):
    """A run of six steps with a budget, whose adapter has these settings."""

    def make(**settings):
        adapter = {"peft_type": "ATOMS", "select": "adaptive", "channel_block": 2, "select_budget": BUDGET}
        (tmp_path / "adapter.json").write_text(json.dumps({**adapter, **settings}))
        fields = {"adapter": str(tmp_path / "adapter.json"), "max_train_steps": 6, "learning_rate": 0.02}
        return dataclasses.replace(config, **fields)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_ema": True}, {"train_text_encoder": True}], ids=str)
def test_the_file_stays_within_its_budget_also_when_resumed(adaptive, options, tmp_path, monkeypatch):
    config = dataclasses.replace(adaptive(), checkpointing_steps=4, **options)
    written = train(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    concept = read_concept_file(written)
    assert written.stat().st_size <= BUDGET and 0 < len(concept.layers)
    kept, _, total = concept.training["selected_layers"].partition(" of ")
    assert int(kept) == len(concept.layers) < int(total)
    record = json.loads((tmp_path / "whole" / "training_report.json").read_text())
    assert record["selected_layers"].startswith(f"{kept} of {total}: ")
    page = (tmp_path / "whole" / "report.md").read_text()
    vectors = [vector for of in concept.tokens.values() for vector in of.values()]
    count = sum(tensor.numel() for tensor in [*trained_tensors(concept), *vectors])
    assert record["selected_layers"] in page and f"bytes, {count:,} parameters" in page

    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt, match="checkpoint-5 is saved"):
            train(config)
    assert concept_bytes(train(dataclasses.replace(config, resume_from_checkpoint="latest"))) == concept_bytes(written)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [3, 4])
def test_a_run_that_resumes_with_fewer_steps_keeps_to_its_budget(adaptive, stopped, monkeypatch):
    config = dataclasses.replace(adaptive(), max_train_steps=12)

    with monkeypatch.context() as patch:
        stop_at(patch, stopped)
        with pytest.raises(KeyboardInterrupt, match=f"checkpoint-{stopped} is saved"):
            train(config)
    acting, usual = [], layer_budget.keep_to_budget

    def keep(run, step):
        usual(run, step)
        of_layers = layer_scores(run.model.denoiser, "default")
        acting.append({f"unet.{score.path}" for score in of_layers if score.parameter.item() != 0})

    monkeypatch.setattr(dreambooth, "keep_to_budget", keep)
    written = train(dataclasses.replace(config, max_train_steps=6, resume_from_checkpoint="latest"))
    assert len(acting) == 6 - stopped and acting[0] == acting[-1] == set(read_concept_file(written).layers)
    assert written.stat().st_size <= BUDGET


@pytest.mark.slow
def test_after_half_of_the_steps_the_layers_do_not_change(adaptive, monkeypatch):
    scores, usual = {}, layer_budget.keep_to_budget

    def keep(run, step):
        usual(run, step)
        of_layers = layer_scores(run.model.denoiser, "default")
        scores[step] = {score.path: float(score.parameter.detach()) for score in of_layers}

    monkeypatch.setattr(dreambooth, "keep_to_budget", keep)
    written = train(adaptive(select_penalty=0.0))
    acting = {step: {name for name, score in of_step.items() if score != 0} for step, of_step in scores.items()}
    assert len(acting[2]) == len(scores[2]) > len(acting[3]) > 0
    assert acting[3] == acting[4] == acting[5] == acting[6]
    assert {name.removeprefix("unet.") for name in read_concept_file(written).layers} <= acting[6]
    assert any(scores[4][name] != scores[6][name] for name in acting[6])  # those that are left are trained


@pytest.mark.slow
def test_layers_leave_the_moving_average_at_once(adaptive, monkeypatch):
    averages, usual = [], layer_budget.keep_to_budget

    def keep(run, step):
        usual(run, step)
        pairs = zip(run.trainable.values(), run.ema.shadow_params, strict=True)
        averages.append([float(average) for score, average in pairs if score.numel() == 1 and score.item() == 0])

    monkeypatch.setattr(dreambooth, "keep_to_budget", keep)
    train(dataclasses.replace(adaptive(), max_train_steps=4, use_ema=True))
    assert averages[0] == [] and len(averages[1]) > 3 and not any(averages[1])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_ema": True, "ema_decay": 0.99}], ids=["last", "averaged"])
def test_the_best_parameters_are_of_the_layers_that_the_file_has(adaptive, options, monkeypatch):
    losses, acting, usual = [0.9, 0.1, 0.2, 0.5, 0.4, 0.6, 0.7], [], FixedSamples.measure

    def measure(self, model, accelerator):
        found, drift = usual(self, model, accelerator)
        scores = {
            score.path.replace("denoiser", "unet"): float(score.parameter.detach()) for score in model.layer_scores
        }
        acting.append({module for module, score in scores.items() if score >= 0.1})
        return found | {"validation_loss": losses[len(acting) - 1]}, drift

    monkeypatch.setattr(FixedSamples, "measure", measure)
    config = dataclasses.replace(adaptive(), validation_loss_steps=1, validation_split=0.3, keep_best=True, **options)
    concept = read_concept_file(train(config))
    assert concept.training["steps"] == 4 and set(concept.layers) == acting[4] < acting[2]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [2, 3])
def test_the_best_of_a_resumed_run_is_that_of_one_without_a_stop(adaptive, stopped, tmp_path, monkeypatch):
    config = dataclasses.replace(adaptive(), validation_loss_steps=1, validation_split=0.3, keep_best=True)
    expected = concept_bytes(train(dataclasses.replace(config, output_dir=str(tmp_path / "whole"))))
    with monkeypatch.context() as patch:
        stop_at(patch, stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert concept_bytes(train(dataclasses.replace(config, resume_from_checkpoint="latest"))) == expected


@pytest.mark.slow
def test_a_run_of_one_step_keeps_to_its_budget(adaptive, monkeypatch):
    calls, usual = [], layer_budget._leave_out_others
    monkeypatch.setattr(layer_budget, "_leave_out_others", lambda *each: calls.append(usual(*each)))
    written = train(dataclasses.replace(adaptive(), max_train_steps=1))
    assert len(calls) == 1 and written.stat().st_size <= BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["adapter", "text_encoder_adapter"])
def test_only_layers_with_a_score_leave(adaptive, chosen, tmp_path):
    plain, budget = {"peft_type": "ATOMS", "channel_block": 2}, 60_000
    (tmp_path / "plain.json").write_text(json.dumps({**plain, "target_modules": "attention"}))
    targets = {} if chosen == "adapter" else {"target_modules": "attention"}
    config = adaptive(select_budget=budget, select_penalty=1e3, **targets)
    files = {"adapter": str(tmp_path / "plain.json"), "text_encoder_adapter": str(tmp_path / "plain.json")}
    files[chosen] = config.adapter
    config = dataclasses.replace(config, max_train_steps=10, train_text_encoder=True, **files)
    written = train(config)
    modules = list(read_concept_file(written).layers)
    of_text = [module for module in modules if module.startswith("text_encoder.")]
    others = of_text if chosen == "adapter" else [module for module in modules if module not in of_text]
    assert len(others) == (8 if chosen == "adapter" else len(others)) > 0
    assert written.stat().st_size <= budget


@pytest.mark.slow
def test_with_another_method_beside_them_the_layers_leave_the_folder(adaptive, tmp_path):
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (tmp_path / "lora.json").write_text(json.dumps(lora))
    fields = {"train_text_encoder": True, "text_encoder_adapter": str(tmp_path / "lora.json")}
    config = dataclasses.replace(adaptive(select_budget=None), **fields)
    written = train(config)
    atoms = peft_folder.read(written, None, denoiser="unet")[0]["unet"][0]
    assert atoms.select == "all" and atoms.target_modules.startswith("(?:")
    record = json.loads((Path(config.output_dir) / "training_report.json").read_text())
    assert record["selected_layers"] is None
    assert record["num_trainable_parameters"] == num_trainable_parameters(written)


@pytest.mark.slow
def test_the_penalty_makes_layers_leave(adaptive):
    sizes = []
    for penalty in (0.0, 1e4):
        config = dataclasses.replace(adaptive(select_budget=None, select_penalty=penalty), max_train_steps=10)
        sizes.append(len(read_concept_file(train(config)).layers))
    assert sizes[0] > sizes[1]


def test_a_budget_without_room_is_refused_before_the_first_step(adaptive):
    config = adaptive(select_budget="1KB")
    with pytest.raises(UserError, match=r"select_budget=1,000 bytes: the file has [\d,]+ without any layer"):
        train(config)
    assert not list(Path(config.output_dir).glob("checkpoint*"))
