import os
import signal
import threading

import pytest

from atomdiff.training import signals
from atomdiff.training.signals import StopSignals


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
            monkeypatch.setattr(signals, "_SAME_SIGNAL", 0.0)
            with pytest.raises(RuntimeError, match="acted"):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is handler
        with StopSignals():
            pass
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_ctrl_break_asks_where_there_is_one(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


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
