import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from atomdiff.utils import atomic
from atomdiff.utils.atomic import WriteError, new_file, new_folder, remove_leftovers, write_json, write_png, write_text

ROOT = Path(__file__).parents[2]


def tree(folder):
    """All files of a folder and what they hold."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_written_is_there_under_its_name_only(tmp_path):
    write_text(tmp_path / "new" / "text", "müll")
    write_json(tmp_path / "values.json", {"a": "é"})
    write_png(tmp_path / "image.png", Image.new("RGB", (2, 2)))
    write_text(tmp_path / "new" / "text", "second")
    assert tree(tmp_path).keys() == {"new/text", "values.json", "image.png"}
    assert (tmp_path / "new" / "text").read_text() == "second"
    assert Image.open(tmp_path / "image.png").format == "PNG"


def test_files_have_the_usual_permissions_and_links_stay(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "link", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "text"
    assert (tmp_path / "there" / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "mkdir"])
def test_a_failure_in_any_call_leaves_everything_as_it_was(tmp_path, monkeypatch, code, call):
    write_text(tmp_path / "file", "before")
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "folder" / "a", "before")
    before = tree(tmp_path)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    owner, name = {
        "write": (Path, "write_bytes"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "mkdir": (Path, "mkdir"),
    }[call]
    if call != "mkdir":
        monkeypatch.setattr(owner, name, fail)
        with pytest.raises(WriteError, match=re.escape(f"file: cannot be written ({os.strerror(code)}); ")):
            write_text(tmp_path / "file", "after")
    monkeypatch.setattr(*(Path, "rename") if call == "replace" else (owner, name), fail)
    with pytest.raises(WriteError, match="folder: cannot be written"), new_folder(tmp_path / "folder") as folder:
        (folder / "a").write_bytes(b"after")
    monkeypatch.undo()
    assert tree(tmp_path) == before and len(list(tmp_path.iterdir())) == 2


def test_what_was_there_comes_back_where_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    write_text(tmp_path / "folder" / "file", "old")
    rename = Path.rename

    def fail(path, target):
        if path.suffix == ".unfinished":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(WriteError, match="folder: cannot be written"), new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_bytes(b"new")
    assert tree(tmp_path) == {"folder/file": b"old"} and len(list(tmp_path.iterdir())) == 1


def write_opened(file, write):
    with file.open("wb") as opened:
        write(opened)


WRITERS = {
    "torch": lambda file: torch.save({"a": torch.zeros(9999)}, file),
    "opened": lambda file: write_opened(file, lambda opened: torch.save({"a": torch.zeros(9999)}, opened)),
    "safetensors": lambda file: save_file({"a": torch.zeros(9999)}, file),
    "numpy": lambda file: write_opened(file, lambda opened: np.save(opened, np.zeros(9999))),
    "pillow": lambda file: Image.effect_noise((99, 99), 50).save(file, format="png"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_librarys_error_on_a_full_disk_is_one_line(tmp_path, writer, small_files):
    with small_files(1000), pytest.raises(WriteError) as error, new_file(tmp_path / "file") as file:
        WRITERS[writer](file)
    assert str(error.value).startswith(f"{tmp_path / 'file'}: cannot be written (") and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_other_errors_and_stops_stay_what_they_are_and_leave_nothing(tmp_path):
    for error in (KeyboardInterrupt("stop"), ValueError("wrong"), RuntimeError("CUDA out of memory")):
        for new in (new_file, new_folder):
            with pytest.raises(type(error), match=str(error)) as raised, new(tmp_path / "name") as unfinished:
                if new is new_file:
                    unfinished.write_text("half")
                raise error
            assert not isinstance(raised.value, WriteError)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_as_a_whole_or_by_what_belongs_to_it(tmp_path):
    for name in ("unet/config.json", "unet/shard-1.bin", "vae/config.json", "README.md", "mine/unet/file"):
        write_text(tmp_path / "model" / name, "old")
    for own in (("unet", "vae", "mine/unet"), None):
        with new_folder(tmp_path / "model", own) as folder:
            (folder / "unet").mkdir()
            (folder / "unet" / "config.json").write_text("new")
            (folder / "other").mkdir()
            (folder / "other" / "file").write_text("new")
        kept = {"README.md": b"old"} if own else {}
        assert tree(tmp_path / "model") == {"unet/config.json": b"new", "other/file": b"new", **kept}
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert not [entry for entry in (tmp_path / "model").iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("own", [("*",), None])
def test_names_as_long_as_file_systems_take_can_be_replaced(tmp_path, own):
    name = "x" * os.pathconf(tmp_path, "PC_NAME_MAX")
    for text in ("old", "new"):
        write_text(tmp_path / "text" / name, text)
        with new_folder(tmp_path / name, own) as folder:
            (folder / name).write_text(text)
    assert tree(tmp_path) == {f"text/{name}": b"new", f"{name}/{name}": b"new"}
    assert len(list(tmp_path.iterdir())) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from atomdiff.utils import atomic
renames, rename = [], Path.rename
def rename_and_die(path, target):
    rename(path, target)
    renames.append(target)
    if len(renames) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename_and_die
with atomic.new_folder(sys.argv[1]) as folder:
    (folder / "file").write_text("new")
    if sys.argv[2] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("renames", "kept"), [(0, b"old"), (1, b"old"), (2, b"new")])
def test_what_a_killed_process_left_goes_and_what_it_had_replaced_comes_back(tmp_path, renames, kept):
    write_text(tmp_path / "folder" / "file", "old")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "folder", str(renames)], env=environment, check=False
    )
    assert ended.returncode == -9
    writing = tmp_path / atomic._name()  # of this process, which is alive
    writing.write_text("half")
    assert len(list(tmp_path.iterdir())) == 3
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"folder/file": kept, writing.name: b"half"}


def test_leftovers_of_the_dead_in_containers_go_too(tmp_path):
    """A process may have the number of the one that was killed before, or its machine another name."""
    own = atomic._name()
    same_number = own.replace(atomic._MARK, "00c0ffee")
    elsewhere = ".atomdiff-00c0ffee-1-00c0ffee-01234567.replaced"
    names = (own, same_number, elsewhere)
    for name in names:
        write_text(tmp_path / name / "checkpoint-2" / "file", "old")
    remove_leftovers(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted((own, elsewhere))
    remove_leftovers(tmp_path, alone=True)
    assert tree(tmp_path) == {f"{own}/checkpoint-2/file": b"old", "checkpoint-2/file": b"old"}


def test_names_are_on_the_disk_before_the_next_change(tmp_path, monkeypatch):
    """Else a power failure could keep the removal of an old checkpoint and lose the new one's name."""
    events = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def note(name, call, shown=lambda *arguments: ""):
        return lambda *arguments: (events.append((name, shown(*arguments))), call(*arguments))[1]

    def inode(handle):
        return os.fstat(handle).st_ino

    monkeypatch.setattr(os, "fsync", note("sync", fsync, inode))
    monkeypatch.setattr(Path, "rename", note("rename", rename))
    monkeypatch.setattr(os, "replace", note("rename", replace))
    write_text(tmp_path / "file", "text")
    with new_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
        unfinished = folder.stat().st_ino
    synced = [(tmp_path / name).stat().st_ino for name in ("file", ".", "folder/a", ".")]
    assert [what for name, what in events if name == "sync" and what != unfinished] == synced
    assert ("sync", unfinished) in events and events[-1] == ("sync", synced[-1])
