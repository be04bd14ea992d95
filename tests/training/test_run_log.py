import json
import os
import signal
import threading

import pytest
from accelerate import Accelerator
from PIL import Image

from atomdiff.training import run_log
from atomdiff.training.run_log import RunLog, StopSignals, extend_contact_sheet


def feed(log, steps):
    for step in steps:
        log.step(step, loss=float(step), average_loss=0.5, lr=0.1, seconds=0.25)
    log.close()


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_lines_hold_means_since_the_last_line(tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    feed(RunLog(Accelerator(), file, step=0, steps=5, every=2, samples=8), range(1, 6))
    assert lines(file) == [
        {"step": 2, "loss": 1.5, "lr": 0.1, "samples_per_second": 32.0},
        {"step": 4, "loss": 3.5, "lr": 0.1, "samples_per_second": 32.0},
        {"step": 5, "loss": 5.0, "lr": 0.1, "samples_per_second": 32.0},
    ]
    assert capsys.readouterr().err == "training: 5 steps\n"


def test_going_on_drops_the_lines_after_the_checkpoint(tmp_path):
    file = tmp_path / "log.jsonl"
    feed(RunLog(Accelerator(), file, step=0, steps=6, every=2, samples=8), range(1, 7))
    feed(RunLog(Accelerator(), file, step=4, steps=8, every=2, samples=8), range(5, 9))
    assert [line["step"] for line in lines(file)] == [2, 4, 6, 8]
    feed(RunLog(Accelerator(), file, step=0, steps=2, every=2, samples=8), range(1, 3))
    assert [line["step"] for line in lines(file)] == [2]


def test_the_sheet_grows_and_forgets_rows_of_a_run_that_was_stopped(tmp_path):
    def add(step, colour):
        extend_contact_sheet(tmp_path, step, [Image.new("RGB", (32, 32), colour)] * 2, ["one", "two"])
        return Image.open(tmp_path / "contact_sheet.png")

    def shows(sheet, colour):
        return any(pixel == colour for _, pixel in sheet.convert("RGB").getcolors(1 << 24))

    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    first = add(0, red)
    second = add(10, green)
    assert second.height > first.height and shows(second, red) and shows(second, green)
    third = add(20, blue)
    again = add(10, blue)
    assert again.size == second.size != third.size
    assert shows(again, red) and shows(again, blue) and not shows(again, green)
    assert len(list((tmp_path / "validation").iterdir())) == 4


def test_the_sheet_takes_rows_of_other_lengths_and_pictures_that_cannot_be_read(tmp_path):
    def add(step, prompts):
        extend_contact_sheet(tmp_path, step, [Image.new("RGB", (32, 32), (step, 0, 0))] * len(prompts), prompts)
        return Image.open(tmp_path / "contact_sheet.png")

    def shows(sheet, step):
        return any(pixel == (step, 0, 0) for _, pixel in sheet.convert("RGB").getcolors(1 << 24))

    narrow = add(50, ["one"])
    wide = add(100, ["one", "two"])
    assert wide.width > narrow.width
    assert add(150, ["one"]).width >= wide.width
    folder = tmp_path / "validation"
    (folder / "step-000050-00.png").write_bytes(b"")
    (folder / "step-000100-00.png").write_bytes((folder / "step-000100-00.png").read_bytes()[:40])
    (folder / "step-mine.png").write_bytes(b"")
    (folder / "step-000300-00.png").mkdir()
    with pytest.warns(UserWarning, match=r"step-000(050|100)-00.png: cannot be read .* stays empty"):
        sheet = add(200, ["one", "two"])
    assert not shows(sheet, 50) and all(shows(sheet, step) for step in (100, 150, 200))
    assert (folder / "step-mine.png").exists()


def test_damaged_lines_of_a_log_do_not_block_whole_ones(tmp_path):
    file = tmp_path / "log.jsonl"
    whole = [json.dumps({"step": step, "loss": 0.1 + step}) for step in (2, 4, 6)]
    file.write_bytes(f"{whole[0]}\n\n[]\n{whole[1]}\n\0\0\xff\n{whole[2]}\n".encode("latin-1") + b'{"step": 8, "lo')
    with pytest.warns(UserWarning, match=r"log.jsonl: left out what cannot be read, line 2, 3, 5, 7"):
        log = RunLog(Accelerator(), file, step=4, steps=8, every=1, samples=8)
    assert file.read_text().splitlines() == whole[:2]
    feed(log, [5])
    assert [line["step"] for line in lines(file)] == [2, 4, 5]


def test_a_log_that_cannot_be_written_is_warned_of(tmp_path, small_files):
    file = tmp_path / "log.jsonl"
    log = RunLog(Accelerator(), file, step=0, steps=3, every=1, samples=8)
    feed(log, [1])
    whole = file.read_bytes()
    told = r"log.jsonl: cannot be written \((No space|File too large).*training goes on"
    with small_files(len(whole) + 10), pytest.warns(UserWarning, match=told):
        feed(log, [2])
    assert file.read_bytes() == whole
    feed(log, [3])
    assert [line["step"] for line in lines(file)] == [1, 3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_a_later_one_acts(number, monkeypatch):
    def handler(*_):
        raise RuntimeError("acted")

    before = signal.signal(number, handler)
    try:
        with StopSignals() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            os.kill(os.getpid(), number)  # of a launcher that passes the same one on
            monkeypatch.setattr(run_log, "_SAME", 0.0)
            with pytest.raises(RuntimeError, match="acted"):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is handler
        with StopSignals():
            pass
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("asked", [False, True])
def test_an_error_after_a_signal_is_the_end_that_was_asked_for(asked):
    with pytest.raises(KeyboardInterrupt if asked else OSError) as ended, StopSignals():
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        raise OSError("disk full")
    assert str(ended.value) == ("stopped; OSError: disk full" if asked else "disk full")


def test_other_threads_train_without_signals():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(StopSignals().__enter__().requested))
    thread.start()
    thread.join()
    assert seen == [False]
