"""The checkpoints of a training that are compared, in a library where their names may be taken."""

import shutil
from pathlib import Path

import pytest

from atomdiff.ui import library as ui_library
from atomdiff.ui.checkpoint_choice import chosen_prompts
from atomdiff.ui.job import OUTPUT_FILE
from atomdiff.ui.page_concepts import PageConcepts
from atomdiff.ui.workspace import add_result, open_workspace
from atomdiff.utils.errors import UserError
from tests.sampling.helpers import write_concept


@pytest.fixture
def workspace(ui_config):
    return open_workspace(ui_config)


@pytest.fixture
def other(tmp_path, tiny_pipe):
    """The file of a concept "sks-mug" of another training."""
    return Path(write_concept(tiny_pipe, tmp_path / "other" / "sks-mug.atoms.safetensors", seed=1))


@pytest.fixture
def job(workspace, concept_file):
    """A finished training "sks-mug", with concepts of steps 2 and 4."""

    def train(file):
        result = Path(workspace.jobs.folder, "sks-mug", "run", "sks-mug.atoms.safetensors")
        steps = file.parent / "run" / "steps"
        steps.mkdir(parents=True)
        shutil.copy(concept_file, steps / "sks-mug-step-000002.atoms.safetensors")
        shutil.copy(concept_file, steps.parent / result.name)
        (file.parent / OUTPUT_FILE).write_text(f"saved {result}\n")

    return workspace.jobs.add("sks-mug", [], {"max_train_steps": 4}, train)


def test_the_last_step_is_that_of_the_training_although_the_library_has_another_of_its_name(workspace, job, other):
    ui_library.add(workspace.library, other, None)
    add_result(workspace.library, job)
    assert list(workspace.library) == ["sks-mug", "sks-mug-2"]
    prompts = chosen_prompts(workspace, "a mug <atoms:sks-mug-2:0.8>", "sks-mug", [2, 4])
    assert prompts == {
        "step 2": "a mug <atoms:sks-mug-step-000002:0.8>",
        "step 4": "a mug <atoms:sks-mug-step-000004:0.8>",
    }
    ((source, _),) = PageConcepts(workspace.library, workspace.jobs).find({"sks-mug-step-000004": 0.8})
    assert source.path == job.result


def test_files_of_another_job_of_the_same_name_are_read_anew(workspace, job, other):
    concepts = PageConcepts(workspace.library, workspace.jobs)
    ((first, _),) = concepts.find({"sks-mug-step-000002": 1.0})
    assert concepts.find({"sks-mug-step-000002": 1.0})[0][0] is first
    before = first.sha256
    shutil.copy(other, job.saved_steps[2])
    ((second, _),) = concepts.find({"sks-mug-step-000002": 1.0})
    assert second is not first and second.sha256 != before


def test_another_concept_of_the_name_of_a_step_is_refused(workspace, job, other):
    ui_library.add(workspace.library, job.saved_steps[2], None)
    assert len(chosen_prompts(workspace, "a mug", "sks-mug", [2, 4])) == 2  # a copy of it
    shutil.copy(other, ui_library.search(workspace.library, "step-000002")[0].path)
    with pytest.raises(UserError, match="another concept 'sks-mug-step-000002'"):
        chosen_prompts(workspace, "a mug", "sks-mug", [2, 4])
