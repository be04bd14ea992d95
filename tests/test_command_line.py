"""Dataclass -> command line."""

from dataclasses import dataclass
from typing import Literal

import pytest

from atomdiff.command_line import parse_config


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
    (said,) = ended.value.code.splitlines()
    assert said.startswith("atomdiff verb: error: ")
    assert named in said


def test_help_reads_the_field_docstrings(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("Do something.", "Where the thing is.", "Some words.", "Speed in metres a second.", "default: a"):
        assert words in text


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
