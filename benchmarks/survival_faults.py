"""The faults of `benchmarks.survival` but for kills: what happens, what the run has to say, and what mends it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from PIL import Image

from benchmarks.survival_case import BASE, Case, write_noise
from benchmarks.survival_run import (
    CACHING,
    CHECKPOINT,
    CLASS_IMAGES,
    LOGGING,
    SAVING,
    VALIDATING,
    Moment,
    terminate,
)

Change = Callable[[Case], object]


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run, before it goes on from its fourth step or while it runs from the first.

    Afterwards it is mended and the run goes on once more, which has to end with the same bytes.
    """

    name: str
    says: str
    """Regular expression of what the run has to say, as a warning or an error."""
    ends: str
    """`done` if the run has to do without help, `error` or `stopped`."""
    before: Change | None = None
    """Happens before a run goes on that was killed after four steps."""
    during: Callable[[Case], Sequence[Moment]] | None = None
    """Happens while a new run runs."""
    mend: Change = lambda case: None
    """What the user does then."""
    spoils: tuple[str, ...] = ()
    """Checkpoints that the fault itself damages or removes."""
    disk: int | None = None
    """Size in MB of the disk on which the output folder is; None: as large as there is."""
    as_nobody: bool = False


def _edit(*path: str, change: Callable[[bytes], bytes]) -> Change:
    def edit(case: Case) -> None:
        (file,) = case.folder.glob("/".join(path))
        file.write_bytes(change(file.read_bytes()))

    return edit


def _flip(data: bytes) -> bytes:
    """Change a bit of every hundredth byte; of a single one, some would be in padding."""
    return bytes(byte ^ (number % 100 == 50) for number, byte in enumerate(data))


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _nothing(data: bytes) -> bytes:
    return b""


def _each_cached(change: Callable[[bytes], bytes]) -> Change:
    def edit(case: Case) -> None:
        for file in (case.out / "cache").iterdir():
            file.write_bytes(change(file.read_bytes()))

    return edit


def _remove(*path: str) -> Change:
    def remove(case: Case) -> None:
        for each in list(case.folder.glob("/".join(path))):
            shutil.rmtree(each) if each.is_dir() else each.unlink()

    return remove


def _move(there: str, back: bool = False) -> Change:
    def move(case: Case) -> None:
        pair = (case.folder / there, case.folder / "aside")
        shutil.move(*(pair[::-1] if back else pair))

    return move


def _replace(there: str) -> Change:
    """Keep a file aside, and put another image in its place."""

    def replace(case: Case) -> None:
        shutil.copy(case.folder / there, case.folder / "aside")
        write_noise(case.folder / there, np.random.default_rng(9))

    return replace


def _set_photo_aside(case: Case) -> None:
    for name in ("1.png", "mask/1.png"):
        shutil.move(case.photos / name, case.folder / name.replace("/", "-"))


def _put_photo_back(case: Case) -> None:
    for name in ("1.png", "mask/1.png"):
        shutil.move(case.folder / name.replace("/", "-"), case.photos / name)


def _add_photo(case: Case) -> None:
    write_noise(case.photos / "9.png", np.random.default_rng(9))
    Image.new("L", (32, 32), 255).save(case.photos / "mask" / "9.png")


def _other_mask(case: Case) -> None:
    shutil.copy(case.photos / "mask" / "1.png", case.folder / "aside")
    Image.new("L", (32, 32), 255).save(case.photos / "mask" / "1.png")


def _set_clock_back(case: Case) -> None:
    for file in case.out.glob("checkpoint-*/run.json"):
        run = json.loads(file.read_text())
        file.write_text(json.dumps(run | {"saved": run["saved"] + 86400}))


def _lock_of_the_dead(case: Case) -> None:
    (case.out / ".lock").write_text("process 1 on elsewhere, since 2000-01-01 00:00:00")


def _leave_replaced(case: Case) -> None:
    """Leave what a process that was killed between two renames leaves, in a container that is no more."""
    left = case.out / ".atomdiff-00c0ffee-1-0badcafe-0123abcd.replaced"
    left.mkdir()
    (case.out / "checkpoint-4").rename(left / "checkpoint-4")
    (case.out / ".atomdiff-00c0ffee-1-0badcafe-4567cdef.unfinished").mkdir()


def _file_in_the_way(case: Case) -> None:
    _move("out")(case)
    case.out.write_text("something else")


def _put_back_the_folder(case: Case) -> None:
    case.out.unlink()
    _move("out", back=True)(case)


def _take_lock(case: Case) -> None:
    program = "import fcntl, os, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    program += "; print('process 7 on elsewhere', file=f, flush=True); print(flush=True); time.sleep(600)"
    holder = subprocess.Popen(["python3", "-c", program, str(case.out / ".lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    (case.folder / "holder").write_text(str(holder.pid))


def _end_lock(case: Case) -> None:
    os.kill(int((case.folder / "holder").read_text()), signal.SIGKILL)


def _chmod(folder: str, mode: int) -> Change:
    return lambda case: (case.folder / folder).chmod(mode)


def _own_base(case: Case) -> None:
    shutil.copytree(BASE, case.folder / "base")
    # no checkpoint of the last step
    case.changes.update(pretrained_model_name_or_path=str(case.folder / "base"), checkpointing_steps=4)


# What happens in the process of the run


def fill(folder: Path) -> None:
    """Fill the disk of a folder to the last byte."""
    handle = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    size = 1 << 20
    while size:
        try:
            os.write(handle, bytes(size))
        except OSError:
            size //= 2
    os.close(handle)


def free(folder: Path) -> None:
    """Make room again."""
    (folder / "filler").unlink()


def remove_tree(folder: Path) -> None:
    """Remove a folder."""
    shutil.rmtree(folder)


def limit_files(size: int) -> None:
    """Limit the size of files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def limit_handles() -> None:
    """Allow no further open files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def allow_handles() -> None:
    """Allow as many open files as may be."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def unplug() -> None:
    """Send what is meant for the Hub to a port where nobody is."""
    constants.ENDPOINT = "http://127.0.0.1:9"


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """Make a `with` block in which a folder is a small disk of its own, where that is allowed, and say so."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m,mode=777", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def _full_at(phase: str, operation: int) -> Callable[[Case], Sequence[Moment]]:
    return lambda case: [Moment(phase, operation, partial(fill, case.out))]


def _make_room(case: Case) -> None:
    with contextlib.suppress(FileNotFoundError):
        free(case.out)


def _unplugged(case: Case) -> Sequence[Moment]:
    return [Moment(LOGGING, 5, unplug)]


def _cut_last_line(data: bytes) -> bytes:
    return data[:-9]


def _all_bytes(data: bytes) -> bytes:
    return bytes(range(256))


_SPACE: dict[str, Any] = {"disk": 24, "mend": _make_room}
_PUT_BACK = partial(_move, back=True)

FAULTS: tuple[Fault, ...] = (
    # the disk
    Fault("disk full while latents are cached", "No space left", "error", during=_full_at(CACHING, 2), **_SPACE),
    Fault("disk full at a class image", "No space left", "error", during=_full_at(CLASS_IMAGES, 3), **_SPACE),
    Fault("disk full at a line of the log", "lines are missing", "error", during=_full_at(LOGGING, 0), **_SPACE),
    Fault(
        "disk full at a checkpoint, for a while",
        "Training continues without this checkpoint",
        "done",
        during=lambda case: [
            Moment(CHECKPOINT, 0, partial(fill, case.out)),
            Moment(LOGGING, 2, partial(free, case.out)),
        ],
        disk=24,
    ),
    Fault(
        "disk full at the second checkpoint",
        "what was trained is in",
        "error",
        during=_full_at(CHECKPOINT, 9),
        **_SPACE,
    ),
    Fault("disk full at the contact sheet", "contact sheet", "error", during=_full_at(VALIDATING, 1), **_SPACE),
    Fault(
        "disk full while the concept is saved", "what was trained is in", "error", during=_full_at(SAVING, 0), **_SPACE
    ),
    Fault(
        "files may not be larger than 60 KB",
        "Training continues without this checkpoint",
        "done",
        during=lambda case: [Moment(CHECKPOINT, 2, partial(limit_files, 60_000))],
    ),
    Fault(
        "no more open files, for a while",
        "Too many open files",
        "done",
        during=lambda case: [Moment(CHECKPOINT, 1, limit_handles), Moment(LOGGING, 2, allow_handles)],
    ),
    # the folders
    Fault(
        "output folder read-only",
        "cannot be written",
        "error",
        before=_chmod("out", 0o555),
        mend=_chmod("out", 0o755),
        as_nobody=True,
    ),
    Fault(
        "output folder becomes read-only at a checkpoint",
        "what was trained is in",
        "error",
        during=lambda case: [Moment(CHECKPOINT, 9, partial(os.chmod, case.out, 0o555))],
        mend=_chmod("out", 0o755),
        as_nobody=True,
    ),
    Fault(
        "output folder vanishes at a step",
        "lines are missing",
        "done",
        during=lambda case: [Moment(LOGGING, 2, partial(remove_tree, case.out))],
        spoils=("checkpoint-2",),
    ),
    Fault(
        "output folder vanishes while the concept is saved",
        "",
        "done",
        during=lambda case: [Moment(SAVING, 0, partial(remove_tree, case.out))],
        spoils=("checkpoint-2", "checkpoint-4", "checkpoint-6"),
    ),
    Fault(
        "a file in place of the output folder",
        "out",
        "error",
        before=_file_in_the_way,
        mend=_put_back_the_folder,
    ),
    Fault(
        "another run has the output folder",
        "another run is writing there .process 7",
        "error",
        before=_take_lock,
        mend=_end_lock,
    ),
    Fault("lock of a dead process", "", "done", before=_lock_of_the_dead),
    Fault("left by a kill in another container", "", "done", before=_leave_replaced),
    # what is learned from
    Fault("photo vanished", "1.png", "error", before=_move("teapot/1.png"), mend=_PUT_BACK("teapot/1.png")),
    Fault("photo and mask vanished", "gone: 1.png", "error", before=_set_photo_aside, mend=_put_photo_back),
    Fault("photo replaced", "changed: 1.png", "error", before=_replace("teapot/1.png"), mend=_PUT_BACK("teapot/1.png")),
    Fault("photo added", "new: 9.png", "error", before=_add_photo, mend=_remove("teapot", "**", "9.png")),
    Fault(
        "photo torn",
        "1.png",
        "error",
        before=lambda case: (_replace("teapot/1.png")(case), _edit("teapot/1.png", change=_half)(case)),
        mend=_PUT_BACK("teapot/1.png"),
    ),
    Fault(
        "photo vanishes once it has been read",
        "",
        "done",
        during=lambda case: [
            Moment(CLASS_IMAGES, 0, partial(shutil.move, case.photos / "1.png", case.folder / "aside"))
        ],
        mend=_PUT_BACK("teapot/1.png"),
    ),
    Fault(
        "caption changed",
        "caption changed: 0.png",
        "error",
        before=_move("teapot/0.txt"),
        mend=_PUT_BACK("teapot/0.txt"),
    ),
    Fault("mask changed", "mask changed: 1.png", "error", before=_other_mask, mend=_PUT_BACK("teapot/mask/1.png")),
    Fault(
        "class image replaced",
        "other class images .changed: class-00001.png",
        "error",
        before=_replace("out/class_images/class-00001.png"),
        mend=_PUT_BACK("out/class_images/class-00001.png"),
    ),
    Fault("class image vanished", "", "done", before=_remove("out/class_images/class-00001.png")),
    Fault(
        "class image torn",
        "class-00001.png",
        "error",
        before=_edit("out/class_images/class-00001.png", change=_half),
        mend=_remove("out/class_images/class-00001.png"),
    ),
    Fault(
        "record of the class images torn",
        "class_images.json: damaged",
        "done",
        before=_edit("out/class_images/class_images.json", change=_half),
    ),
    # what the run wrote
    Fault("cached tensors corrupt", "damaged.*computed again", "done", before=_each_cached(_flip)),
    Fault("cached tensors torn", "damaged.*computed again", "done", before=_each_cached(_half)),
    Fault("cached tensors empty", "damaged.*computed again", "done", before=_each_cached(_nothing)),
    Fault(
        "checkpoint corrupt",
        "skipped.*resuming from .*checkpoint-2",
        "done",
        before=_edit("out/checkpoint-4/state.pt", change=_flip),
        spoils=("checkpoint-4",),
    ),
    Fault(
        "checkpoint torn",
        "skipped.*resuming from .*checkpoint-2",
        "done",
        before=_edit("out/checkpoint-4/state.pt", change=_half),
        spoils=("checkpoint-4",),
    ),
    Fault(
        "run file torn",
        "skipped.*run.json.*resuming from .*checkpoint-2",
        "done",
        before=_edit("out/checkpoint-4/run.json", change=_half),
        spoils=("checkpoint-4",),
    ),
    Fault(
        "run file empty",
        "skipped.*run.json.*resuming from .*checkpoint-2",
        "done",
        before=_edit("out/checkpoint-4/run.json", change=_nothing),
        spoils=("checkpoint-4",),
    ),
    Fault(
        "state of a checkpoint vanished",
        "skipped.*missing.*resuming from .*checkpoint-2",
        "done",
        before=_remove("out/checkpoint-4/state.pt"),
        spoils=("checkpoint-4",),
    ),
    Fault(
        "all checkpoints torn",
        "there is no other: start without",
        "error",
        before=lambda case: [_edit(f"out/checkpoint-{step}/state.pt", change=_half)(case) for step in (2, 4)],
        mend=_remove("out/checkpoint-*"),
        spoils=("checkpoint-2", "checkpoint-4"),
    ),
    Fault("clock set back a day", "", "done", before=_set_clock_back),
    Fault(
        "log torn",
        "skipped damaged lines: 4",
        "done",
        before=_edit("out/training_log.jsonl", change=_cut_last_line),
    ),
    Fault(
        "log corrupt",
        "skipped damaged lines",
        "done",
        before=_edit("out/training_log.jsonl", change=_all_bytes),
    ),
    Fault(
        "log of the validation torn",
        "skipped damaged lines",
        "done",
        before=_edit("out/validation_log.jsonl", change=_cut_last_line),
    ),
    Fault(
        "image of the contact sheet torn",
        "cell of the contact sheet",
        "done",
        before=_edit("out/validation/step-000003-00.png", change=_half),
    ),
    Fault(
        "concept of an earlier run torn",
        "",
        "done",
        before=lambda case: case.concept.write_bytes(b"torn"),
    ),
    # the rest
    Fault(
        "base vanishes before the concept is saved",
        "what was trained is in .*checkpoint-6: then resume",
        "error",
        before=_own_base,
        during=lambda case: [Moment(LOGGING, 5, partial(remove_tree, case.folder / "base"))],
        mend=lambda case: case.changes.pop("pretrained_model_name_or_path"),
    ),
    Fault(
        "Hub out of reach after training", "is saved, but", "error", during=lambda case: [Moment(LOGGING, 5, unplug)]
    ),
    Fault(
        "asked to stop (SIGTERM)",
        "checkpoint-3 is saved",
        "stopped",
        during=lambda case: [Moment(LOGGING, 2, terminate)],
    ),
)
