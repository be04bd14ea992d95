import multiprocessing
import os
import signal
import threading
import time

import pytest

from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder


def hold(folder, entered):
    with lock_folder(folder):
        entered.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """A process that has the folder `out`."""
    context = multiprocessing.get_context("fork")
    entered = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", entered))
    process.start()
    assert entered.wait(20)
    yield process
    process.kill()
    process.join()


def test_the_second_is_told_who_is_there(tmp_path, holder):
    with pytest.raises(UserError, match=rf"out: another run is writing there \(process {holder.pid} on .*since .*wait"):
        with lock_folder(tmp_path / "out"):
            raise AssertionError
    with lock_folder(tmp_path / "other"):
        pass


def test_a_killed_process_holds_nothing(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with lock_folder(tmp_path / "out"):
        pass
    assert not list((tmp_path / "out").iterdir())


def test_threads_are_told_too_and_the_folder_may_vanish(tmp_path):
    problems = []

    def other():
        try:
            with lock_folder(tmp_path / "out"):
                pass
        except UserError as error:
            problems.append(error)

    with lock_folder(tmp_path / "out"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        (tmp_path / "out" / ".lock").unlink()
        (tmp_path / "out").rmdir()
    assert len(problems) == 1
    other()
    assert len(problems) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match=r"file: cannot be written \(File exists\); name another folder"):
        with lock_folder(tmp_path / "file"):
            pass
