from dataclasses import dataclass, fields

import pytest

import atomdiff
from atomdiff.classify.config import ClassifyConfig
from atomdiff.cli.summary import describe
from atomdiff.export.export import ExportConfig
from atomdiff.export.extract import ExtractConfig
from atomdiff.pipelines.open import open_pipeline
from atomdiff.sampling.config import SampleConfig
from atomdiff.training.config import TrainConfig
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.assets import ASSETS
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.paths import InputPath, PathText, check_writable, expand_paths, path_fields, refuse_overlap


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


def test_homes_and_variables_are_expanded_in_paths_alone(home, tmp_path):
    config = Config("~/out", "$DATA/a", ("${DATA}/b", "~", "plain"), text="~/$DATA")
    assert config == Config(f"{home}/out", "/data/a", ("/data/b", home, "plain"), text="~/$DATA")
    assert config.folder == f"{home}/out" and config.text == "~/$DATA"
    assert Config(several=["~", tmp_path]).several == (home, str(tmp_path))


def test_files_of_the_project_are_found_from_any_folder_where_they_are_read(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Config:
        read: InputPath
        several: tuple[InputPath, ...] = ()
        written: PathText = "samples/subjects"

        def __post_init__(self):
            expand_paths(self)

    monkeypatch.chdir(tmp_path)
    found = Config("samples/subjects/mug", ("configs/demo.yaml", "samples/none"))
    assert found.read == str(ASSETS / "samples" / "subjects" / "mug")
    assert found.several == (str(ASSETS / "configs" / "demo.yaml"), "samples/none")
    assert found.written == "samples/subjects"
    (tmp_path / "samples" / "subjects" / "mug").mkdir(parents=True)
    assert Config("samples/subjects/mug").read == "samples/subjects/mug"  # what is here comes first


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
        ("x" * 300, "folder='x+: cannot be a path .File name too long.; name another"),
        ("a\0b", "cannot be a path"),
        (5, "folder=5: expected a path"),
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


@pytest.mark.parametrize("call", [read_adapter, describe, open_pipeline, lambda path: atomdiff.load_atoms(None, path)])
@pytest.mark.parametrize("folder", ["", "configs/"])
def test_names_too_long_for_a_file_system_name_no_file_to_callers_in_python_either(call, folder):
    with pytest.raises(UserError, match="no such file|is not a f|there is no file"):
        call(folder + "x" * 5000)


def test_outputs_never_replace_inputs(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "mug.safetensors").touch()
    refuse_overlap({"output": tmp_path / "new"}, {"the base": tmp_path / "base", "hub": "user/repo"})
    with pytest.raises(UserError, match="output=.* is the concept, too"):
        refuse_overlap({"output": tmp_path / "mug.safetensors"}, {"the concept": tmp_path / "mug.safetensors"})
    with pytest.raises(UserError, match="is inside the base"):
        refuse_overlap({"output": tmp_path / "base" / "x"}, {"the base": tmp_path / "base"})


def test_what_is_writable_stays_as_it_is(tmp_path):
    check_writable(tmp_path / "new", "output", "a.safetensors")
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


def test_a_name_may_be_as_long_as_a_file_system_allows(tmp_path):
    check_writable(tmp_path, "output", "a" * 255)
    with pytest.raises(UserError, match="^output: aaa.* cannot be written there .File name too long.; name another"):
        check_writable(tmp_path, "output", "a" * 256)
    with pytest.raises(UserError, match="^output: a.* cannot be written there"):
        check_writable(tmp_path, "output", "a\0b")
    assert not list(tmp_path.iterdir())
