"""The queue, with workers that do as they are told."""

import pytest

from atomdiff.training.fleet.queue import Event, Queue
from atomdiff.training.fleet.signs import Watch
from atomdiff.utils.errors import UserError


class Pool:
    """Workers that end a subject as `outcome(worker, name)` says, None for never; each wait ends one."""

    def __init__(self, outcome=lambda worker, name: "done", starts=lambda worker: "ready"):
        self.outcome, self.starts, self.events, self.log = outcome, starts, [], []

    def start(self, worker):
        self.log.append(("start", worker))
        self.events.append(Event(worker, self.starts(worker), reason="no base"))

    def assign(self, worker, name):
        self.log.append((name, worker))
        if kind := self.outcome(worker, name):
            self.events.append(Event(worker, kind, 1.0, "broken"))

    def kill(self, worker):
        self.log.append(("kill", worker))

    def wait(self, seconds):
        return [self.events.pop(0)] if self.events else []


class Listener:
    def __init__(self):
        self.ends = []

    def started(self, name, worker):
        pass

    def ended(self, name, event, again):
        self.ends.append((name, event.worker, event.kind, again))


def run(pool, names, num_workers, max_tries=2, stopping=lambda: False, watch=None):
    listener = Listener()
    Queue(names, pool, num_workers, max_tries, listener, watch).run(stopping)
    return listener.ends


def test_every_subject_is_trained_once():
    pool = Pool()
    ends = run(pool, list("abcde"), 2)
    assert sorted(end[0] for end in ends) == list("abcde") and {end[2:] for end in ends} == {("done", False)}
    assert {worker for _, worker, *_ in ends} == {0, 1}


def test_no_more_workers_are_started_than_there_are_subjects():
    pool = Pool()
    run(pool, ["a"], 5)
    assert pool.log == [("start", 0), ("a", 0)]


def test_a_failed_subject_comes_last_on_another_worker():
    tried = []

    def outcome(worker, name):
        tried.append((name, worker))
        return "failed" if name == "a" else "done"

    ends = run(Pool(outcome), list("abcd"), 2, max_tries=3)
    workers = [worker for name, worker in tried if name == "a"]
    assert len(workers) == 3 and workers[0] != workers[1]  # the third has no worker left that has not tried it
    assert [end[3] for end in ends if end[0] == "a"] == [True, True, False]
    assert ends[-1][0] == "a" and sum(end[2] == "done" for end in ends) == 3


def test_the_only_worker_tries_again_itself():
    assert run(Pool(lambda *_: "failed"), ["a"], 1) == [("a", 0, "failed", True), ("a", 0, "failed", False)]


def test_a_lost_worker_is_replaced_and_its_subject_tried_again():
    lost = iter([True])
    pool = Pool(lambda worker, name: "lost" if name == "a" and next(lost, False) else "done")
    ends = run(pool, list("abc"), 1)
    assert ends[0] == ("a", 0, "lost", True) and sorted(end[0] for end in ends[1:]) == list("abc")
    assert pool.log.count(("start", 0)) == 2


def test_a_subject_that_takes_its_workers_along_is_given_up():
    pool = Pool(lambda worker, name: "lost" if name == "a" else "done")
    ends = run(pool, list("ab"), 2)
    assert ("a", 0, "lost", True) in ends and [end[3] for end in ends if end[0] == "a"] == [True, False]
    assert ("b", 1, "done", False) in ends


def test_a_worker_that_hangs_is_killed_and_its_subject_goes_to_another():
    seconds = iter(range(1000))
    pool = Pool(lambda worker, name: None if (worker, name) == (0, "a") else "done")
    ends = run(pool, list("abcd"), 2, watch=Watch(lambda name: 0, timeout=100, clock=lambda: next(seconds)))
    assert [end for end in ends if end[0] == "a"] == [("a", 0, "lost", True), ("a", 1, "done", False)]
    assert pool.log.count(("kill", 0)) == 1 and ("kill", 1) not in pool.log
    assert {end[0] for end in ends if end[2] == "done"} == set("abcd")


def test_a_subject_that_hangs_everywhere_is_given_up():
    seconds = iter(range(1000))
    pool = Pool(lambda worker, name: None if name == "a" else "done")
    ends = run(pool, list("ab"), 1, watch=Watch(lambda name: 0, timeout=5, clock=lambda: next(seconds)))
    assert [end for end in ends if end[0] == "a"] == [("a", 0, "lost", True), ("a", 0, "lost", False)]
    assert pool.log.count(("kill", 0)) == 2


def test_workers_that_cannot_start_end_the_fleet_with_the_reason():
    pool = Pool(starts=lambda _: "lost")
    with pytest.raises(UserError, match="no worker can be started: no base"):
        run(pool, list("abc"), 2)
    assert len(pool.log) == 6  # three starts of each


def test_one_worker_that_cannot_start_leaves_all_to_the_others():
    pool = Pool(starts=lambda worker: "lost" if worker else "ready")
    assert {end[1] for end in run(pool, list("abc"), 2)} == {0}
    assert pool.log.count(("start", 1)) <= 3


def test_it_stops_between_two_events():
    listener = Listener()
    Queue(list("abc"), Pool(), 1, 2, listener).run(lambda: len(listener.ends) == 1)
    assert len(listener.ends) == 1
