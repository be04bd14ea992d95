import json

import pytest
from accelerate import Accelerator

from atomdiff.training.run_log import RunLog


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


def test_damaged_lines_of_a_log_do_not_block_whole_ones(tmp_path):
    file = tmp_path / "log.jsonl"
    whole = [json.dumps({"step": step, "loss": 0.1 + step}) for step in (2, 4, 6)]
    file.write_bytes(f"{whole[0]}\n\n[]\n{whole[1]}\n\0\0\xff\n{whole[2]}\n".encode("latin-1") + b'{"step": 8, "lo')
    with pytest.warns(UserWarning, match=r"log.jsonl: skipped damaged lines: 2, 3, 5, 7"):
        log = RunLog(Accelerator(), file, step=4, steps=8, every=1, samples=8)
    assert file.read_text().splitlines() == whole[:2]
    feed(log, [5])
    assert [line["step"] for line in lines(file)] == [2, 4, 5]


def test_a_log_that_cannot_be_written_is_warned_of(tmp_path, small_files):
    file = tmp_path / "log.jsonl"
    log = RunLog(Accelerator(), file, step=0, steps=3, every=1, samples=8)
    feed(log, [1])
    whole = file.read_bytes()
    told = r"log.jsonl: cannot be written \((No space|File too large).*Training continues"
    with small_files(len(whole) + 10), pytest.warns(UserWarning, match=told):
        feed(log, [2])
    assert file.read_bytes() == whole
    feed(log, [3])
    assert [line["step"] for line in lines(file)] == [1, 3]
