"""Numbers that go wrong: loss spikes, and values that are not finite, told with the images that they came from."""

import math
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atomdiff.training.batches import name_images
from atomdiff.training.checkpoint import find_checkpoints
from atomdiff.training.run import Run
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import list_some

_SPIKE = 3.0  # times the highest loss of the steps before
_STEPS, _FEWEST = 100, 20  # of those steps


class DivergedError(UserError):
    """The loss, a gradient or an output is not finite any more.

    Args:
        step: The step that found it.
        found: What is not finite.
        advice: What to do next.
        images: Those of the batches.
        more: What else could be done.
    """

    def __init__(self, step: int, found: str, advice: str, images: list[str], more: str = "") -> None:
        super().__init__(f"step {step}: {found}; {advice}. Its images: {list_some(images)}{more}")
        self.step, self.found, self.advice, self.images = step, found, advice, images


class LossSpikes:
    """Watches the losses of a run's steps.

    A spike is a loss of three times the highest one of the last 100 steps, of which there must have been 20. The mean
    and deviation of a diffusion loss would tell less: at little noise it is often ten times that at much noise.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_STEPS)

    def ratio(self, loss: float) -> float:
        """Note a step's loss, and return how many times the highest one before it is; 0 if it is no spike."""
        highest = max(self._losses) if len(self._losses) >= _FEWEST else math.inf
        self._losses.append(loss)
        return loss / highest if highest > 0 and loss >= _SPIKE * highest else 0.0


def warn_of_spike(step: int, loss: float, ratio: float, images: list[str]) -> None:
    """Warn of a loss spike."""
    found = f"the loss is {loss:.4g}, {ratio:.1f} times the highest of up to {_STEPS} steps before"
    advice = "look at them and their captions; if all are right, lower the learning rate"
    warnings.warn(f"step {step}: {found}. Its images: {list_some(images)}; {advice}", stacklevel=1)


def refuse_unless_finite(run: Run, step: int, name: str, value: float, numbers: range) -> None:
    """Check a number of the batches of these numbers.

    Raises:
        DivergedError: It is not finite; the message names the checkpoint to go back to, and the images.
    """
    if not math.isfinite(value):
        raise not_finite(run, step, f"the {name} is {value}", numbers)


def not_finite(run: Run, step: int, found: str, numbers: range) -> DivergedError:
    """Return the error of a step whose batches, of these numbers, gave what is not finite."""
    checkpoints = find_checkpoints(Path(run.config.output_dir))
    if run.config.resume_from_checkpoint is None:  # others are of an earlier run
        checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.run["saved"] >= run.started]
    back = f"resume from {checkpoints[-1].folder} (--resume_from_checkpoint latest)" if checkpoints else "start again"
    rates = run.config.learning_rates
    advice = f"{back} with a learning_rate below {rates['adapter']}"
    advice += f" and a token_learning_rate below {rates['token']}" if run.config.train_token else ""
    advice += ", or with mixed_precision bf16" if run.accelerator.scaler else ""
    more = "" if run.config.detect_anomaly else "; --detect_anomaly tells where it begins"
    return DivergedError(step, found, advice, name_images(run, numbers), more)


@contextmanager
def detecting_anomalies(run: Run, step: int, numbers: range) -> Iterator[None]:
    """Make a `with` block for the forward and backward pass of batches; with `detect_anomaly` all of it is checked.

    Raises:
        DivergedError: The output of a module, or the gradient of an operation, is not finite; the message names it.
    """
    if not run.config.detect_anomaly:
        yield
        return
    # Layers inside adapters compute in another way with hooks, and round differently.
    modules = run.model.named_modules()
    names = {module: name for name, module in modules if name and not name.endswith(".base_layer")}

    def check(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if not all(each.isfinite().all() for each in outputs if isinstance(each, Tensor)):
            raise not_finite(run, step, f"the output of {names[module]} is not finite", numbers)

    hooks = [module.register_forward_hook(check) for module in names]
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield
    except RuntimeError as error:
        if "returned nan values" not in str(error):
            raise
        raise not_finite(run, step, f"backward pass: {error}", numbers) from error
    finally:
        for hook in hooks:
            hook.remove()
