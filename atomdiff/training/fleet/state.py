"""What is known of each subject, in a file in its folder, so that another call goes on where this one ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from atomdiff.training.config import TrainConfig
from atomdiff.training.fleet.table import FleetSubject
from atomdiff.training.run_comparison import changes
from atomdiff.training.saving import result_path
from atomdiff.tuner.read_config import describe_adapter, read_adapter
from atomdiff.utils.atomic import remove_folder, write_json
from atomdiff.utils.errors import UserError
from atomdiff.utils.progress import log

STATE_FILE = "fleet.json"

Status = Literal["waiting", "running", "done", "failed"]

_FORMAT = 1  # raised whenever the names in the file change


@dataclass(frozen=True)
class Try:
    """A try that has ended."""

    worker: int
    seconds: float
    """What it took; 0 if its worker was lost."""
    error: str | None = None
    """Why it failed; None: it did not."""


@dataclass
class SubjectState:
    """What is known of a subject."""

    run: TrainConfig
    settings: dict[str, Any]
    """What the trained parameters depend on."""
    status: Status = "waiting"
    tries: list[Try] = field(default_factory=list)
    """Those of earlier calls, too."""

    @property
    def folder(self) -> Path:
        """The folder of the subject's run."""
        return Path(self.run.output_dir)

    @property
    def result(self) -> Path:
        """Where the run saves what it trains."""
        return result_path(read_adapter(self.run.adapter), self.folder / self.run.name)

    @property
    def error(self) -> str | None:
        """Why the last try failed, of a subject that is not done."""
        return self.tries[-1].error if self.tries and self.status != "done" else None

    @property
    def seconds(self) -> float:
        """What all tries took."""
        return sum(each.seconds for each in self.tries)

    def write(self) -> None:
        """Write it to the subject's folder.

        Raises:
            WriteError: It cannot be written.
        """
        tries = [asdict(each) for each in self.tries]
        content = {"format": _FORMAT, "status": self.status, "tries": tries, "settings": self.settings}
        write_json(self.folder / STATE_FILE, content)


def read_states(subjects: Sequence[FleetSubject]) -> dict[str, SubjectState]:
    """Return what is known of each subject, by its name.

    A subject that is not done and has other settings now begins anew: what its folder has of it is removed.

    Raises:
        UserError: A subject is done, with other settings; or a file is damaged.
    """
    adapter = describe_adapter(read_adapter(subjects[0].run.adapter))
    states = {}
    for subject in subjects:
        settings = {**subject.run.snapshot(), "keep_best": subject.run.keep_best, "adapter": adapter}
        state = SubjectState(subject.run, json.loads(json.dumps(settings)))
        states[subject.name] = state
        if known := _read(state.folder / STATE_FILE):
            found = changes(known["settings"], state.settings)
            if known["status"] == "done" and state.result.exists():
                if found:
                    advice = "use its values, remove that folder, or name another output_dir"
                    raise UserError(f"{state.folder}: was trained with {'; '.join(found)}: {advice}")
                state.status = "done"
            elif found:
                log(f"{subject.name}: begins anew, since its settings have changed: {'; '.join(found)}")
                remove_folder(state.folder)
                continue
            state.tries = [Try(**each) for each in known["tries"]]
    return states


def _read(file: Path) -> Mapping[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read ({reason}); remove it, and the subject is trained again") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UserError(f"{file}: of another version of atomdiff, or damaged; remove its folder to train it again")
    return content
