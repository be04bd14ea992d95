from dataclasses import dataclass, fields

import pytest

from atomdiff.classify.config import ClassifyConfig
from atomdiff.export.export import ExportConfig
from atomdiff.export.extract import ExtractConfig
from atomdiff.sampling.config import SampleConfig
from atomdiff.training.config import TrainConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.paths import PathText, expand_paths, path_fields


@dataclass(frozen=True)
class Config:
    """Do something."""

    folder: PathText = "out"
    """Folder."""
    file: PathText | None = None
    """File."""
    several: tuple[PathText, ...] = ()
    """Files."""
    text: str = "~"
    """No path."""

    def __post_init__(self) -> None:
        expand_paths(self)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.chdir(tmp_path)
    return str(tmp_path)


def test_homes_and_variables_are_expanded_in_paths_alone(home):
    config = Config("~/out", "$DATA/a", ("${DATA}/b", "~", "plain"), text="~/$DATA")
    assert config == Config(f"{home}/out", "/data/a", ("/data/b", home, "plain"), text="~/$DATA")
    assert config.folder == f"{home}/out" and config.text == "~/$DATA"


def test_config_files_and_their_own_path_are_expanded_too(home, tmp_path):
    (tmp_path / "a.yaml").write_text("folder: ~/out\nseveral: [$DATA/x]\n")
    assert parse_config(Config, ["--config", "~/a.yaml"]) == Config(f"{home}/out", None, ("/data/x",))


def test_what_is_there_as_written_stays(tmp_path):
    for name in ("~x", "$NONE"):
        (tmp_path / name).touch()
    assert Config("~x", "$NONE", ("price$5",)) == Config("~x", "$NONE", ("price$5",))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$NO_SUCH/out", "folder='.NO_SUCH/out': found no environment variable NO_SUCH"),
        ("${}/out", "found no environment variable"),
        ("~nobody-of-that-name/out", "found no user 'nobody-of-that-name'"),
        ("", "folder='': expected a path"),
    ],
)
def test_what_cannot_be_expanded_is_refused(path, message):
    with pytest.raises(UserError, match=message):
        Config(path)


@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig, ExportConfig, ExtractConfig, ClassifyConfig])
def test_every_field_that_names_a_path_is_one(kind):
    words = ("dir", "path", "output", "file", "folder")
    named = {field.name for field in fields(kind) if set(words) & set(field.name.split("_"))}
    named -= {"one_file", "single_file_config"}
    assert named and named <= set(path_fields(kind))
