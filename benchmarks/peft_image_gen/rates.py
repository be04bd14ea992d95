"""What learning rates do where atoms adapt Linear layers alone: a small run like those of PEFT's benchmark.

    python -m benchmarks.peft_image_gen.rates

One subject of the toybox, the projections of attention, and no trained trigger word (`toybox.yaml`): about 2.5 minutes
a trial on a CPU core. Trials that are in the work folder already are not run again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomdiff.utils.atomic import write_json
from atomdiff.utils.options import parse_config
from atomdiff.utils.paths import PathText, expand_paths
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result

RUN = Path(__file__).with_name("toybox.yaml")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORA = {"peft_type": "LORA", "target_modules": ATTENTION, "r": 16, "lora_alpha": 16, "init_lora_weights": "gaussian"}
BLOCKS_OF_4 = {"peft_type": "ATOMS", "target_modules": "attention", "channel_block": 4}
TRIALS: dict[str, tuple[dict[str, Any], float]] = {
    "blocks of 4, 5e-4": (BLOCKS_OF_4, 5e-4),
    "blocks of 4, 1.5e-3": (BLOCKS_OF_4, 1.5e-3),
    "blocks of 4, 5e-3": (BLOCKS_OF_4, 5e-3),
    "blocks of 4, 1e-2": (BLOCKS_OF_4, 1e-2),
    "blocks of 4, 2e-2": (BLOCKS_OF_4, 2e-2),
    "blocks of 8, 2.5e-3": (BLOCKS_OF_4 | {"channel_block": 8, "basis": "dct"}, 2.5e-3),
    "OFT, blocks of 32, 1e-3": ({"peft_type": "OFT", "target_modules": ATTENTION, "oft_block_size": 32}, 1e-3),
    "LoRA r16, 5e-4": (LORA, 5e-4),
}
"""Name -> adapter and learning rate."""


@dataclass(frozen=True)
class RatesConfig:
    """Train a subject of the toybox at several learning rates."""

    trials: tuple[str, ...] = tuple(TRIALS)
    """Which of the trials."""
    work_dir: PathText = "out/peft_image_gen"
    """Folder of the runs."""
    output: PathText = "benchmarks/results/peft_image_gen_rates.json"
    """The result file."""

    def __post_init__(self) -> None:
        expand_paths(self)


def run_trial(name: str, folder: Path) -> dict[str, Any]:
    """Train and measure, unless that was done; return the report of the demo."""
    from atomdiff.cli.demo import DemoConfig, run_demo

    report = folder / "report.json"
    if not report.is_file():
        adapter, rate = TRIALS[name]
        file = folder.with_suffix(".adapter.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, adapter)
        run_demo(DemoConfig(run=str(RUN), adapter=str(file), learning_rate=rate, output_dir=str(folder)))
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def main(config: RatesConfig) -> None:
    """Run the trials and write the result file."""
    quiet_libraries()
    figures: dict[str, float] = {}
    for name in config.trials:
        report = run_trial(name, Path(config.work_dir) / name.replace(", ", "-").replace(" ", "_"))
        figures[f"{name}:parameters"] = report["num_trainable_parameters"]
        figures[f"{name}:normalized_gain"] = report["similarity"]["normalized_gain"]
        figures[f"{name}:drift"] = report["drift"]
    command = command_line("peft_image_gen.rates", config, ignore=("work_dir", "output"))
    write_result(config.output, command, figures, run=RUN.read_text())


if __name__ == "__main__":
    main(parse_config(RatesConfig))
