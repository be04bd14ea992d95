"""What of a run's folder the page shows while it trains."""

import json
import warnings

import pytest

from atomdiff.ui.progress import read_progress, seconds_left
from tests.helpers import write_images


def test_an_empty_folder_has_no_progress(tmp_path):
    progress = read_progress(tmp_path / "nothing")
    assert (progress.step, progress.images, progress.report) == (0, [], None)
    assert seconds_left(progress, 10, 2) is None


def test_logs_images_and_a_half_written_line_are_read(tmp_path):
    lines = [{"step": step, "loss": 1 / step, "samples_per_second": 4.0} for step in (10, 20)]
    (tmp_path / "training_log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 3')
    (tmp_path / "validation_log.jsonl").write_text('{"step": 0, "validation_loss": 0.5}\n')
    images = write_images(tmp_path / "validation", widths=(32, 32))
    for number, name in enumerate(("step-000020-00.png", "step-000010-00.png")):
        (images / f"{number}.png").rename(images / name)
    (tmp_path / "training_report.json").write_text('{"findings": []}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        progress = read_progress(tmp_path)
    assert progress.step == 20
    assert [line["loss"] for line in progress.log] == [0.1, 0.05]
    assert progress.measurements[0]["validation_loss"] == 0.5
    assert [step for step, _ in progress.images] == [10, 20]
    assert progress.report == {"findings": []}


def test_time_left_follows_the_speed(tmp_path):
    lines = [{"step": step, "loss": 1.0, "samples_per_second": speed} for step, speed in ((10, 4.0), (20, 2.0))]
    (tmp_path / "training_log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    # 2 samples a step take half a second, then one second: 80 steps of 0.75 s are left
    assert seconds_left(read_progress(tmp_path), 100, 2) == pytest.approx(60)
