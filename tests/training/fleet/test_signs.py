"""Signs of life: given by whatever makes progress, and missed where none comes."""

import os

from atomdiff.training.fleet import signs
from atomdiff.training.fleet.signs import SIGN_FILE, Watch, giving_signs, last_sign
from atomdiff.utils.progress import ProgressBar, log


def test_phases_and_steps_are_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(signs, "_SECONDS", 0.0)
    bar = ProgressBar(total=2, disable=True)
    steps = {
        "phase": lambda: log("loading"),
        "step": bar.update,
        "image": lambda: next(iter(ProgressBar(range(3), disable=True))),
    }
    assert last_sign(tmp_path) == 0
    with giving_signs(tmp_path):
        for name, step in steps.items():
            os.utime(tmp_path / SIGN_FILE, ns=(1, 1))
            step()
            assert last_sign(tmp_path) > 1, name
    assert last_sign(tmp_path) == 0
    bar.update()
    assert last_sign(tmp_path) == 0


def test_signs_are_given_once_a_second(tmp_path, monkeypatch):
    now = iter([10.0, 10.5, 11.0])
    monkeypatch.setattr(signs.time, "monotonic", lambda: next(now))
    with giving_signs(tmp_path):
        for expected in (False, True):
            os.utime(tmp_path / SIGN_FILE, ns=(1, 1))
            log("a phase")
            assert (last_sign(tmp_path) > 1) == expected


def test_a_folder_that_is_gone_stops_no_worker(tmp_path):
    with giving_signs(tmp_path / "gone"):
        log("a phase")


def test_a_worker_hangs_when_its_signs_stay_the_same():
    now, sign = [0.0], {"a": 0, "b": 0}
    watch = Watch(sign.get, 10, lambda: now[0])
    watch.begin("a")
    watch.begin("b")
    now[0], sign["a"] = 6.0, 1
    assert watch.hung() == []
    now[0] = 10.5
    assert watch.hung() == ["b"]
    watch.end("b")
    now[0], sign["a"] = 16.5, 0  # clocks of other machines may go back
    assert watch.hung() == []
    for now[0] in (26.4, 26.6):
        assert watch.hung() == []  # the second time it is too early to look
    now[0] = 27.1
    assert watch.hung() == ["a"]


def test_without_a_limit_nothing_hangs():
    watch = Watch(lambda _: 0, None, lambda: 1e9)
    watch.begin("a")
    assert watch.hung() == []
