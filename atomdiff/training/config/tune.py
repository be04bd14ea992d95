"""A search of settings: the options of a training run, which all trials share, and how many trials there are."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated

from atomdiff.training.config.train import TrainConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import NeedsPackage, PositiveFloat, PositiveInt
from atomdiff.utils.paths import PathText

_HELD_OUT = 0.2  # of the images, unless something else is asked for


@dataclass(frozen=True, kw_only=True)
class TuneConfig(TrainConfig):
    """Search the settings of a training run by the validation loss on held-out images; takes all options of train."""

    output_dir: PathText = "out/tune"
    """Output folder: the study, which the same command resumes, the best settings, a table and plots."""
    search_space: Annotated[PathText, NeedsPackage("optuna", "tune")] = "configs/search/atoms.yaml"
    """YAML file of what is searched; configs/search/any_method.yaml is for adapters of other PEFT methods."""
    num_trials: PositiveInt = 20
    """Trials in all, those of earlier calls included."""
    timeout: PositiveFloat | None = None
    """Seconds after which no trial is started any more. Default: no limit."""
    max_base_drift: PositiveFloat | None = 0.1
    """Largest base drift of the best trial: how far predictions for other prompts may have changed, as a share of their
    mean square. Without a limit (none), output preservation is never found worth its cost."""
    num_workers: PositiveInt | None = None
    """Processes that run trials of the study at the same time, each on a GPU of its own. Default: one for each GPU."""

    @property
    def base_run(self) -> TrainConfig:
        """The run that trials differ from; a fifth of the images is held out unless something else is asked for."""
        run = TrainConfig(**{field.name: getattr(self, field.name) for field in fields(TrainConfig)})
        if run.validation_split or any(subject.validation_data_dir for subject in run.subjects):
            return run
        return replace(run, validation_split=_HELD_OUT)

    def check(self) -> None:
        """Check that there is one run, whose validation loss can be measured."""
        if self.concepts_list is not None and not self.one_file:
            raise UserError(f"concepts_list={self.concepts_list!r}: expected one_file with it: a search is of one run")
        if self.validation_loss_steps == 0:
            raise UserError("validation_loss_steps=0: expected more than 0, since trials are compared by that loss")
        if self.resume_from_checkpoint is not None:
            found = f"resume_from_checkpoint={self.resume_from_checkpoint!r}"
            raise UserError(f"{found}: expected none: the same command resumes a search")
