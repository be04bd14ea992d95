"""Training jobs: a queue of processes whose state is on the disk."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import atomdiff
from atomdiff.training.intermediate import SAVE_FILE
from atomdiff.ui import jobs, render
from atomdiff.ui.jobs import JobQueue
from atomdiff.ui.progress import read_progress
from atomdiff.utils.errors import UserError
from tests.helpers import write_images

# What `atomdiff train` does as its caller sees it, in a moment: it steps until it is stopped, says how it ended, and
# goes on from a checkpoint.
TRAINING = """
import signal, sys, time, yaml
from pathlib import Path
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
config = yaml.safe_load(Path(sys.argv[2]).read_text())
run = Path(config["output_dir"])
run.mkdir(parents=True, exist_ok=True)
checkpoint = run / "checkpoint"
resumed = sys.argv[3:] == ["--resume_from_checkpoint", "latest"] and checkpoint.exists()
step = int(checkpoint.read_text()) if resumed else 0
print(f"training: begun at {step}", file=sys.stderr, flush=True)
(run / "started").write_text(str(step))
if config["fails"]:
    sys.exit("atomdiff train: error: class_name='mug': found a mistake")
while step < config["steps"]:
    step += 1
    time.sleep(0.02)
    checkpoint.write_text(str(step))
    if stopped:
        print(f"stopped; checkpoint-{step} is saved", file=sys.stderr)
        sys.exit(130)
print(f"saved {run / 'mug.atoms.safetensors'}")
"""


def wait_for(condition, seconds=20.0):
    """Wait until a condition holds; fail if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.fixture
def images(tmp_path):
    folder = write_images(tmp_path / "photos", widths=(32, 40))
    return [(folder / "0.png", ""), (folder / "1.png", " a red mug ")]


@pytest.fixture
def open_queue(tmp_path):
    """Opens queues of one folder, whose jobs are ended after the test."""
    script, queues = tmp_path / "training.py", []
    script.write_text(TRAINING)

    def open_one(on_finish=None, command=(sys.executable, str(script))):
        queue = JobQueue(tmp_path / "jobs", on_finish, command)
        queue.start()
        queues.append(queue)
        return queue

    yield open_one
    for queue in queues:
        queue.close()
        for job in queue.jobs():
            if job.status in ("running", "stopping"):
                psutil.Process(job.state.process).kill()


def add(queue, images=(), *, steps=2, fails=False, name="mug", check=lambda file: None):
    return queue.add(name, images, {"steps": steps, "fails": fails}, check)


def test_a_job_holds_images_captions_and_options(open_queue, images):
    job = add(open_queue(), images)
    assert {file.name for file in job.images_folder.iterdir()} == {"01.png", "02.png", "02.txt"}
    assert (job.images_folder / "02.txt").read_text() == "a red mug\n"
    assert job.images_folder.name == "mug"
    assert job.options["instance_data_dir"] == str(job.images_folder)
    assert job.options["steps"] == 2


def test_jobs_run_one_after_the_other_and_are_handed_over_once(open_queue):
    finished = []
    queue = open_queue(finished.append)
    first, second = add(queue, steps=40), add(queue)
    assert second.name == "mug-2"
    wait_for(lambda: first.status == "running")
    assert second.status == "queued"
    wait_for(lambda: second.status == "finished")
    assert first.status == "finished"
    assert first.result == first.run_folder / "mug.atoms.safetensors"
    wait_for(lambda: len(finished) == 2)
    queue.close()
    open_queue(finished.append)
    time.sleep(0.7)
    assert finished == [first, second]
    assert queue.jobs() == [second, first]


def test_a_stopped_job_is_resumed_from_its_checkpoint(open_queue):
    queue = open_queue()
    job = add(queue, steps=100)
    wait_for((job.run_folder / "checkpoint").exists)
    queue.stop(job)
    assert job.status in ("stopping", "stopped")
    wait_for(lambda: job.status == "stopped")
    assert job.outcome[1].startswith("stopped; checkpoint-")
    assert job.result is None
    queue.resume(job)
    wait_for(lambda: job.status == "finished")
    assert int((job.run_folder / "started").read_text()) > 0
    with pytest.raises(UserError, match="is finished; only one that was stopped"):
        queue.resume(job)


def test_on_windows_a_job_hears_ctrl_break_and_no_ctrl_c(open_queue, monkeypatch):
    group, ctrl_break, begun, sent = 0x200, signal.SIGUSR1, [], []
    start = subprocess.Popen

    def popen(command, creationflags, **options):
        begun.append(creationflags)
        return start(command, **options)

    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", group, raising=False)
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", ctrl_break, raising=False)
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(psutil.Process, "send_signal", lambda process, number: sent.append(number))
    queue = open_queue()
    job = add(queue, steps=1000)
    wait_for(lambda: job.status == "running")
    queue.stop(job)
    assert begun == [group] and sent == [ctrl_break]


def test_a_hand_over_that_fails_is_tried_again_later_each_time_and_no_other_waits(open_queue, monkeypatch):
    tries, finished, is_full = [], [], True
    monkeypatch.setattr(jobs, "_RETRY", (0.3, 300.0))

    def take(job):
        if job.name == "mug" and is_full:
            tries.append(time.monotonic())
            raise OSError(28, "No space left on device")
        finished.append(job)

    queue = open_queue(take)
    first, second = add(queue), add(queue)
    wait_for(lambda: finished == [second] and len(tries) == 3)
    assert "No space left" in queue.hand_over_error(first) and not queue.hand_over_error(second)
    card = render.status_card(first, read_progress(first.run_folder), queue.hand_over_error(first))
    assert "is not in the library yet, and is tried again: [Errno 28] No space left" in card
    assert tries[2] - tries[1] >= 0.6
    is_full = False
    wait_for(lambda: finished == [second, first])
    wait_for(lambda: not queue.hand_over_error(first))
    assert first.state.handed_over


def test_a_running_job_is_asked_by_a_file_in_its_folder(open_queue):
    queue = open_queue()
    running, waiting = add(queue, steps=1000), add(queue)
    wait_for(lambda: running.status == "running")
    queue.ask(running, SAVE_FILE)
    assert (running.run_folder / SAVE_FILE).is_file()
    with pytest.raises(UserError, match="is queued; only one that runs"):
        queue.ask(waiting, SAVE_FILE)


def test_a_waiting_job_leaves_the_queue(open_queue):
    queue = open_queue()
    running, waiting = add(queue, steps=1000), add(queue)
    wait_for(lambda: running.status == "running")
    queue.stop(waiting)
    assert waiting.status == "stopped"
    queue.stop(running)
    wait_for(lambda: running.status == "stopped")
    time.sleep(0.7)
    assert waiting.status == "stopped"


def test_another_queue_takes_up_a_running_job(open_queue):
    first = open_queue()
    job = add(first, steps=1000)
    wait_for((job.run_folder / "checkpoint").exists)
    first.close()
    second = open_queue()
    again = second.job("mug")
    waiting = add(second)
    time.sleep(0.7)
    assert (again.status, waiting.status) == ("running", "queued")
    second.stop(again)
    wait_for(lambda: again.status == "stopped")
    wait_for(lambda: waiting.status == "finished")


def test_a_killed_job_is_told_from_another_process_of_its_number(open_queue):
    queue = open_queue()
    job = add(queue, steps=1000)
    wait_for((job.run_folder / "checkpoint").exists)
    psutil.Process(job.state.process).send_signal(signal.SIGKILL)
    wait_for(lambda: job.status == "failed")
    assert "resume it" in job.outcome[1]
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        file = job.folder / "job.json"
        state = json.loads(file.read_text())
        started = state["process_started"] - 60
        file.write_text(json.dumps({**state, "process": other.pid, "process_started": started}))
        assert job.status == "failed"
        queue.stop(job)
        assert other.poll() is None
        other.communicate(b"\n")


def test_the_folder_of_another_method_is_named_as_it_is_not_in_the_library(open_queue):
    job = add(open_queue())
    wait_for(lambda: job.status == "finished")
    assert "The concept is in the library" in render.status_card(job, read_progress(job.run_folder))
    job.result.mkdir()
    assert f"The result is in {job.result}; the library takes" in render.status_card(job, read_progress(job.run_folder))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always imports from the working directory")
def test_jobs_import_the_package_of_the_page_above_a_clone(open_queue, tmp_path, monkeypatch):
    (tmp_path / "atomdiff" / "atomdiff").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    queue = open_queue(command=(sys.executable, "-c", "import atomdiff; print('saved', atomdiff.__file__)"))
    job = add(queue)
    wait_for(lambda: job.status == "finished")
    assert job.result == Path(atomdiff.__file__)


def test_an_error_is_that_of_the_command(open_queue):
    job = add(open_queue(), fails=True)
    wait_for(lambda: job.status == "failed")
    assert job.outcome[1] == "class_name='mug': found a mistake"


def test_a_config_that_is_refused_leaves_nothing(open_queue):
    def refuse(file: Path):
        assert file.is_file()
        raise UserError("class_name: too long")

    queue = open_queue()
    with pytest.raises(UserError, match="class_name"):
        add(queue, check=refuse)
    assert queue.jobs() == [] and list(queue.folder.iterdir()) == []


def test_a_job_whose_folder_is_being_written_is_not_seen(open_queue):
    queue = open_queue()
    job = add(queue)
    shutil.copytree(job.folder, job.folder.with_name(".atomdiff-mug.unfinished"))
    assert queue.jobs() == [job]


@pytest.mark.parametrize("state", ["", "[]", '{"created": 1, "of_a_later_version": 2}'])
def test_a_job_that_cannot_be_read_stops_no_other(open_queue, tmp_path, state):
    (tmp_path / "jobs" / "broken").mkdir(parents=True)
    (tmp_path / "jobs" / "broken" / "job.json").write_text(state)
    queue = open_queue()
    with pytest.warns(UserWarning, match=r"broken.job.json: cannot be read \(.*\); this training job is left out"):
        job = add(queue)
        wait_for(lambda: job.status == "finished")
        assert queue.jobs() == [job]
        queue.close()


def test_names_from_elsewhere_are_only_compared(open_queue, tmp_path):
    with pytest.raises(UserError, match="no training job"):
        open_queue().job("../jobs")
