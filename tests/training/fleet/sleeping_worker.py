"""A worker process that sleeps over a subject called "a" if it is the first to have it, and else ends at once."""

import os
import time
from contextlib import suppress
from pathlib import Path

from atomdiff.training.fleet.queue import Event
from atomdiff.training.fleet.signs import giving_signs


def serve(theirs, run, worker, log_file):
    theirs.send(Event(worker, "ready"))
    with suppress(EOFError):
        while True:
            folder = Path(theirs.recv().output_dir)
            with giving_signs(folder):
                if folder.name == "a" and not (folder / "process").exists():
                    (folder / "process").write_text(str(os.getpid()))
                    time.sleep(1000)
            (folder / f"{folder.name}.atoms.safetensors").touch()
            theirs.send(Event(worker, "done", 0.1))
