"""Dataclass -> command line."""

from dataclasses import dataclass
from typing import Literal

import pytest

from atomdiff.utils.options import parse_config


@dataclass(frozen=True)
class Config:
    """Do something."""

    path: str
    """Where the thing is."""
    words: tuple[str, ...] = ("one",)
    """Some words."""
    rate: float | None = None
    """Speed in metres a second."""
    kind: Literal["a", "b"] = "a"
    """What kind."""
    flag: bool = False
    """Whether to."""
    note: str = ""
    """Remark."""


def test_defaults_and_options():
    assert parse_config(Config, ["--path", "x"]) == Config("x")
    given = ["--path", "x", "--words", "a: b, c", "[d]", "--rate", "2", "--kind", "b", "--flag", "true"]
    assert parse_config(Config, given) == Config("x", ("a: b, c", "[d]"), 2.0, "b", True)
    assert parse_config(Config, ["--flag", "--path", "x"]) == Config("x", flag=True)
    assert parse_config(Config, ["--path", "x", "--flag", "false"]) == Config("x")


def test_later_wins_over_earlier_in_file_and_options(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("path: x\nrate: 1\nwords: [u, v]\n")
    second.write_text("rate: null\nkind: b\n")
    files = ["--config", str(first), "--config", str(second)]
    assert parse_config(Config, files) == Config("x", ("u", "v"), None, "b")
    assert parse_config(Config, ["--kind", "a", *files, "--words", "w"]) == Config("x", ("w",), None, "b")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--pth", "x"], "--pth"),
        ([], "path"),
        (["--path", "x", "--rate", "fast"], "fast"),
        (["--path", "x", "--kind", "c"], "kind"),
        (["--config", "{folder}/wrong.yaml"], "pathh"),
        (["--config", "{folder}/none.yaml"], "none.yaml"),
    ],
)
def test_mistakes_end_the_program_and_are_named(wrong, named, tmp_path):
    (tmp_path / "wrong.yaml").write_text("path: x\npathh: y\n")
    with pytest.raises(SystemExit) as ended:
        parse_config(Config, [word.format(folder=tmp_path) for word in wrong], prog="atomdiff verb")
    (message,) = ended.value.code.splitlines()
    assert message.startswith("atomdiff verb: error: ")
    assert named in message


@pytest.mark.parametrize("nothing", ["none", "None", "null"])
def test_nothing_is_spelled_in_several_ways(tmp_path, nothing):
    (tmp_path / "a.yaml").write_text(f"path: {nothing}x\nrate: {nothing}\n")
    assert parse_config(Config, ["--path", nothing, "--rate", nothing]) == Config(nothing)
    assert parse_config(Config, ["--path", "x", f"--rate={nothing}"]) == Config("x")
    assert parse_config(Config, ["--rate", "1", "--config", str(tmp_path / "a.yaml")]) == Config(f"{nothing}x")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("rate: 1e-4", Config("x", rate=1e-4)),
        ("flag: yes", Config("x", flag=True)),
        ("flag: off", Config("x", flag=False)),
        ("words: [no, 'yes']", Config("x", words=("no", "yes"))),
        ("words: no", Config("x", words=("no",))),
        ("# nothing", Config("x")),
    ],
)
def test_files_mean_what_people_mean(tmp_path, written, expected):
    (tmp_path / "a.yaml").write_text(written, encoding="utf-16")
    assert parse_config(Config, ["--path", "x", "--config", str(tmp_path / "a.yaml")]) == expected


@pytest.mark.parametrize("written", ["path: null", "kind:", "path: x\npath: y", "- path", "rate: fast", "flag: 3"])
def test_files_that_mean_nothing_are_refused(tmp_path, written):
    (tmp_path / "a.yaml").write_text(written)
    with pytest.raises(SystemExit) as ended:
        parse_config(Config, ["--path", "x", "--config", str(tmp_path / "a.yaml")])
    assert len(ended.value.code.splitlines()) == 1


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    @dataclass(frozen=True)
    class Steps:
        """Steps."""

        steps: int | None = 1
        """Steps."""

    (tmp_path / "a.yaml").write_text("steps: 1e3")
    assert parse_config(Steps, ["--config", str(tmp_path / "a.yaml")]) == parse_config(Steps, ["--steps", "1e3"])
    assert parse_config(Steps, ["--steps", "1e3"]) == Steps(1000)
    with pytest.raises(SystemExit):
        parse_config(Steps, ["--steps", "1.5"])


def test_help_reads_the_field_docstrings(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Do something.", "Where the thing is.", "Some words.", "Speed in metres a second.", "default: a"):
        assert words in text
    assert "Remark." in text and "(default: )" not in text


def test_one_field_may_go_without_its_name(capsys):
    assert parse_config(Config, ["x", "--rate", "1"], positional="path") == Config("x", rate=1.0)
    with pytest.raises(SystemExit):
        parse_config(Config, [], positional="path")


@pytest.mark.parametrize(
    "given, expected", [([], False), (["--flag"], True), (["--flag", "true"], True), (["--flag", "false"], False)]
)
def test_a_truth_value_alone_means_true(given, expected):
    @dataclass(frozen=True)
    class Flagged:
        """A config with a switch."""

        flag: bool = False
        """The switch."""

    assert parse_config(Flagged, given).flag is expected


@pytest.mark.parametrize(
    "given, expected", [([], None), (["--flag"], True), (["--flag", "false"], False), (["--flag", "null"], None)]
)
def test_a_truth_value_that_may_be_left_open(given, expected):
    @dataclass(frozen=True)
    class Open:
        """A config with a switch that something else may decide."""

        flag: bool | None = None
        """The switch."""

    assert parse_config(Open, given).flag is expected
