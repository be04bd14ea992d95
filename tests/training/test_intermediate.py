"""Concepts of steps, and what is asked for while a run trains."""

import dataclasses
from pathlib import Path

import pytest

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.training.dreambooth import train
from atomdiff.training.intermediate import GENERATE_FILE, SAVE_FILE, list_saved_steps
from tests.helpers import concept_bytes


def saved(config):
    """Step -> name of the file or folder, of what a run has saved on the way."""
    return {step: path.name for step, path in list_saved_steps(Path(config.output_dir))}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"use_ema": True}])
def test_a_saved_step_is_what_a_run_of_so_many_steps_gives(config, fields, tmp_path):
    config = dataclasses.replace(config, learning_rate=0.05, **fields)
    usual = concept_bytes(train(dataclasses.replace(config, output_dir=str(tmp_path / "usual"))))
    short = train(dataclasses.replace(config, output_dir=str(tmp_path / "short"), max_train_steps=2))
    saving = dataclasses.replace(config, save_steps=2)
    result = train(saving)
    assert saved(saving) == {2: f"{config.name}-step-000002.atoms.safetensors"}
    assert concept_bytes(result) == usual
    found, expected = (read_concept_file(file) for file in (list_saved_steps(Path(config.output_dir))[0][1], short))
    assert found.training["steps"] == 2 and found.trigger_phrase == expected.trigger_phrase
    for name, tensors in expected.layers.items():
        for part, tensor in tensors.items():
            assert found.layers[name][part].equal(tensor), (name, part)
    for word, vectors in expected.tokens.items():
        assert all(found.tokens[word][encoder].equal(vector) for encoder, vector in vectors.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_save_steps_as_they_save_results(config, method, adapter_file):
    config = dataclasses.replace(config, adapter=adapter_file(method), save_steps=3)
    result = train(config)
    ((_, folder),) = list_saved_steps(Path(config.output_dir))
    assert folder.name == f"{config.name}-step-000003"
    assert {file.name for file in folder.iterdir()} == {file.name for file in result.iterdir()}


@pytest.mark.slow
def test_what_is_asked_for_comes_after_the_next_step(config, tmp_path):
    usual = concept_bytes(train(dataclasses.replace(config, output_dir=str(tmp_path / "usual"))))
    folder = Path(config.output_dir)
    folder.mkdir(exist_ok=True)
    for name in (GENERATE_FILE, SAVE_FILE):
        (folder / name).touch()  # as well before the run, which then looks after its first step
    assert concept_bytes(train(config)) == usual
    assert [file.name for file in (folder / "validation").iterdir()] == ["step-000001-00.png"]
    assert list(saved(config)) == [1] and (folder / "checkpoint-1").is_dir()
    assert not (folder / GENERATE_FILE).exists() and not (folder / SAVE_FILE).exists()


@pytest.mark.slow
def test_a_run_drops_what_an_earlier_one_saved_of_later_steps(config):
    config = dataclasses.replace(config, save_steps=1, checkpointing_steps=2)
    train(config)
    assert list(saved(config)) == [1, 2, 3]
    train(dataclasses.replace(config, save_steps=0, resume_from_checkpoint="checkpoint-2"))
    assert list(saved(config)) == [1, 2]
    train(dataclasses.replace(config, save_steps=0, max_train_steps=1))
    assert saved(config) == {}


@pytest.mark.slow
def test_a_step_that_cannot_be_saved_is_warned_of(config):
    folder = Path(config.output_dir)
    folder.mkdir(exist_ok=True)
    (folder / "steps").write_text("something else")
    with pytest.warns(UserWarning, match="step 3: its concept is not saved: .*steps"):
        assert train(dataclasses.replace(config, save_steps=3)).is_file()
