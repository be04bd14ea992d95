"""`--evaluate_with`: what encoders find in a finished concept stands in the report."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from atomdiff.evaluate import run as evaluation
from atomdiff.training import evaluation as of_training
from atomdiff.training.dreambooth import train
from atomdiff.utils.errors import UserError
from tests.helpers import assert_links_lead_somewhere, write_images


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "validation_steps"), [("atoms", 0), ("full", 3)])
def test_the_report_has_what_the_encoders_found(train_config, tiny_encoder_folder, adapter, validation_steps):
    more = {"validation_split": 0.3, "validation_loss_steps": 3, "validation_steps": validation_steps}
    config = train_config(evaluate_with=(tiny_encoder_folder,), adapter=adapter, **more)
    train(config)
    output = Path(config.output_dir)
    results = json.loads((output / "evaluation" / "results.json").read_text())["subjects"]["teapot"]
    assert results["num_references"] == 1 and results["images_per_prompt"] == 2  # the held-out image
    similarity = results["metrics"][tiny_encoder_folder]["similarity"]["concept"]
    shown = f"{similarity['mean']:.4g} ± {similarity['standard_error']:.2g}"
    page = (output / "report.md").read_text()
    assert f"{tiny_encoder_folder}, similarity, concept | {shown} |" in page
    sheets = ["contact_sheet.png"] * bool(validation_steps) + ["evaluation/contact_sheet.png"]
    assert assert_links_lead_somewhere(output / "report.md") == ["training_curve.png", *sheets]
    assert f"{tiny_encoder_folder}, similarity, real | - |" in page  # of one photo
    for name in ("report.md", "report.html"):
        text = (output / name).read_text()
        assert "need two or more: hold more out (a higher --validation_split)" in text and "± " in text
        assert "Values are means ± standard errors over prompts." in text and "training photos" not in text


@pytest.mark.slow
def test_several_photos_to_compare_with_need_no_note(train_config, tiny_encoder_folder):
    config = train_config(evaluate_with=(tiny_encoder_folder,))
    train(config)
    page = (Path(config.output_dir) / "report.md").read_text()
    assert re.search(r"similarity, real \| 0\.\d+ \|", page) and "need two or more" not in page
    assert "similarity is that to training photos, and highest for a concept that repeats them: hold some out" in page


def test_the_judge_of_the_toybox_is_an_encoder_as_for_atomdiff_evaluate(train_config):
    config = train_config(evaluate_with=("toybox",))
    train(config)
    page = (Path(config.output_dir) / "report.md").read_text()
    assert "toybox, similarity, concept" in page


def test_an_encoder_that_is_not_there_is_refused_before_training(train_config, tmp_path):
    config = train_config(evaluate_with=(str(tmp_path / "nowhere"),))
    with pytest.raises(UserError, match="the encoder .*nowhere' cannot be loaded"):
        train(config)
    assert not list(Path(config.output_dir).glob("*"))


def test_an_evaluation_that_fails_loses_nothing(train_config, tiny_encoder_folder, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(evaluation, "check_writable", fail)
    config = train_config(evaluate_with=(tiny_encoder_folder,))
    with pytest.warns(UserWarning, match="is saved, but cannot be evaluated: disk full"):
        path = train(config)
    assert path.is_file() and (Path(config.output_dir) / "report.html").is_file()


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("no", "float32")])
def test_images_are_made_in_the_precision_of_the_run(train_config, tmp_path, precision, dtype):
    config = train_config(evaluate_with=("encoder",))
    assert of_training.evaluation_config(config, tmp_path, precision).dtype == dtype


def test_one_of_several_processes_does_not_leave_the_others_waiting(train_config, tmp_path):
    several = SimpleNamespace(num_processes=2, is_main_process=True, mixed_precision="no")
    with pytest.raises(UserError, match="missing"):
        of_training.evaluate_result(train_config(evaluate_with=("encoder",)), tmp_path / "missing", several)


def test_subjects_of_one_file_are_evaluated_each(
    train_config, teapot_images, tmp_path, tiny_encoder_folder, monkeypatch
):
    subjects = [
        {"instance_data_dir": str(teapot_images), "class_name": "teapot", "trigger_word": "sks"},
        {"instance_data_dir": str(teapot_images.parent / "cat"), "class_name": "cat", "trigger_word": "ohwx"},
    ]
    write_images(teapot_images.parent / "cat")
    (tmp_path / "list.json").write_text(json.dumps(subjects))
    config = train_config(
        concepts_list=str(tmp_path / "list.json"), one_file=True, evaluate_with=(tiny_encoder_folder,)
    )
    seen = []
    monkeypatch.setattr(of_training, "generate_images", lambda config, subjects, state: seen.extend(subjects))
    with pytest.warns(UserWarning, match="cannot be evaluated"):
        train(config)
    assert [(subject.name, subject.trigger_phrase) for subject in seen] == [
        ("teapot", "sks teapot"),
        ("cat", "ohwx cat"),
    ]
    assert [len(subject.references) for subject in seen] == [3, 3]
