"""What a run notes of its steps."""

from __future__ import annotations

from pathlib import Path

from atomdiff.training.anomalies import LossSpikes, warn_of_spike
from atomdiff.training.batches import batches_of, name_images
from atomdiff.training.loop import update_average
from atomdiff.training.optimizers import current_rate
from atomdiff.training.run import Run
from atomdiff.training.run_log import LOG_FILE, RunLog


class StepsLog:
    """What a run notes of its steps: its log, loss spikes and the average loss.

    Args:
        run: The run.
        done: Steps done already.
        average_loss: The average loss after them; NaN without any.
        show: Show a progress bar.
    """

    def __init__(self, run: Run, done: int, average_loss: float, *, show: bool = True) -> None:
        config, file = run.config, Path(run.config.output_dir) / LOG_FILE
        self.run, self.average_loss, self._spikes = run, average_loss, LossSpikes()
        steps = done, config.max_train_steps, config.logging_steps
        self._log = RunLog(run.accelerator, file, *steps, run.samples_per_step, show=show)

    def note(self, step: int, loss: float, seconds: float) -> None:
        """Note a step's loss and the time that it took; warn of a loss spike."""
        run = self.run
        self.average_loss = update_average(self.average_loss, loss)
        if (ratio := self._spikes.ratio(loss)) and run.accelerator.is_main_process:
            warn_of_spike(step, loss, ratio, images := name_images(run, batches_of(run, step)))
            run.loss_spikes.append({"step": step, "loss": loss, "images": images})
            self._log.note_spike(run.loss_spikes[-1])
        self._log.step(step, loss, self.average_loss, current_rate(run.optimizer), seconds)

    def close(self) -> None:
        """Leave the progress bar as it stands."""
        self._log.close()
