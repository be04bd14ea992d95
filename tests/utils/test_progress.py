import io
import sys

from atomdiff.utils.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(monkeypatch, stream, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    seen = list(ProgressBar(range(3), "encoding images", unit="images", mininterval=0, **options))
    assert seen == [0, 1, 2]
    return stream.getvalue()


def test_a_terminal_gets_a_bar_and_a_log_one_line(monkeypatch):
    assert run(monkeypatch, io.StringIO()) == "encoding images: 3 images\n"
    shown = run(monkeypatch, Terminal())
    assert "encoding images: 100%" in shown and "3/3" in shown and shown.count("\r") > 1


def test_other_processes_show_nothing(monkeypatch):
    assert run(monkeypatch, io.StringIO(), disable=True) == run(monkeypatch, Terminal(), disable=True) == ""


def test_what_was_done_before_is_told(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = ProgressBar(total=8, desc="training", initial=4)
    bar.update()
    bar.set_postfix(loss="0.5", refresh=False)
    bar.close()
    assert sys.stderr.getvalue() == "training: 8 steps, 4 of them done\n"
