"""What `atomdiff evaluate` does, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atomdiff.evaluate.config import EvaluateConfig


def evaluate_concepts(config: EvaluateConfig) -> str | None:
    """Generate, measure, and return a summary; None on all but the main process.

    Raises:
        UserError: as for `generate_images`, `open_encoders` and `check_labels`.
    """
    import torch
    from accelerate import Accelerator

    from atomdiff.evaluate.encoders import open_encoders
    from atomdiff.evaluate.label_accuracy import check_labels
    from atomdiff.evaluate.protocol import load_protocol
    from atomdiff.evaluate.run import generate_images, measure_concepts
    from atomdiff.evaluate.subjects import open_subjects
    from atomdiff.utils.precision import compute_device

    state = Accelerator(cpu=not torch.accelerator.is_available())
    subjects = open_subjects(config, load_protocol(config.protocol))
    # Before the images: whoever names one that is not there, or labels that it does not know, need not wait for them.
    encoders = open_encoders(config.encoders if state.is_main_process else (), compute_device())
    check_labels(encoders.values(), [subject.suite for subject in subjects])
    generated = generate_images(config, subjects, state)
    if not state.is_main_process:
        return None
    return describe_results(config, measure_concepts(config, generated, encoders))


def describe_results(config: EvaluateConfig, results: dict[str, Any]) -> str:
    """Return the means over subjects as one small table for each encoder."""
    lines = []
    for encoder, metrics in results["mean"]["all"].items():
        lines += [encoder, f"  {'':<18}{'base':>16}{'concept':>16}{'between photos':>16}"]
        for name, found in metrics.items():
            values = found if isinstance(found, dict) and "mean" not in found else {"concept": found}
            if found is not None:
                cells = [_cell(values.get(key)) for key in ("base", "concept", "real")]
                lines.append(f"  {name.replace('_', ' '):<18}" + "".join(f"{cell:>16}" for cell in cells).rstrip())
        lines.append("")
    count = len(results["subjects"])
    over = f"{count} subjects" if count > 1 else "prompts"
    lines.append(f"means ± standard errors over {over}; lower is better for prior similarity and drift")
    folder = Path(config.output_dir)
    return "\n".join([*lines, *(str(folder / name) for name in ("results.md", "results.json", "contact_sheet.png"))])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        error = "" if value["standard_error"] is None else f" ± {value['standard_error']:.3f}"
        return f"{value['mean']:.3f}{error}"
    return f"{value:.3f}"
