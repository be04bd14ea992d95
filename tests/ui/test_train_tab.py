"""Training jobs as the tab *Train* adds them."""

import pytest
from PIL import Image

from atomdiff.training.report.write import RECORD_FILE
from atomdiff.ui.recipes import starting_options
from atomdiff.ui.train_tab import _view, add_job
from atomdiff.ui.workspace import open_workspace
from atomdiff.utils.errors import UserError


@pytest.fixture
def add(ui_config, tmp_path):
    """Adds a job with a photo of 40 pixels and these options; returns it with all jobs."""
    workspace, file = open_workspace(ui_config), tmp_path / "photo.png"
    Image.new("RGB", (40, 40)).save(file)

    def add_one(advanced):
        text = f"{starting_options(ui_config)}{advanced}"
        job = add_job(workspace, [(file, "")], "mug", "sks", "tiny", text)
        return job, workspace.jobs.jobs()

    return add_one


def test_photos_that_are_too_small_for_the_resolution_are_refused_before_a_job_is_added(add):
    with pytest.raises(UserError, match="photo.png cannot be used: 40 pixels .* at least 64"):
        add("resolution: 128")
    job, jobs = add("resolution: 64")
    assert jobs == [job]


@pytest.mark.parametrize("text", [None, "{", "", "[1]"])
def test_a_job_with_damaged_files_is_shown(ui_config, add, text):
    job, _ = add("")
    job.config_file.unlink() if text is None else job.config_file.write_text(text)
    job.run_folder.mkdir()
    (job.run_folder / RECORD_FILE).write_text(text or "{}")
    assert f"<b>{job.name}</b>" in _view(open_workspace(ui_config), None, None)[2]
