"""Parameters and bytes of atoms on real architectures, without weights: every preset in every form, LoRA beside them.

python -m benchmarks.parameters
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.result_file import command_line, write_result

FORMS: dict[str, dict[str, Any]] = {
    "spatial": {"channel_block": 1},
    "separable, blocks of 4": {"channel_block": 4},
    "joint, blocks of 2": {"channel_block": 2, "joint": True},
    "recursion 1": {"channel_block": 1, "recursion": 1},
    "recursion 2": {"channel_block": 1, "recursion": 2},
}
LORA = {"r": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


@dataclass(frozen=True)
class ParametersConfig:
    """What to count."""

    output: str = "benchmarks/results/parameters.json"
    """The result file."""


def main(config: ParametersConfig) -> None:
    """Count, print and write the result file."""
    quiet_libraries()
    from peft import LoraConfig

    from atomdiff.bases.architectures import ARCHITECTURES, open_architecture
    from atomdiff.concepts.parameter_count import count_parameters
    from atomdiff.tuner import AtomConfig
    from atomdiff.tuner.config import PRESETS
    from atomdiff.tuner.model import preset_targets

    figures: dict[str, float] = {}

    def count(name: str, form: str, adapter: Any) -> None:
        counted = count_parameters(name, adapter)
        figures[f"{name}:{form}:numbers"] = counted.num_trainable_parameters
        figures[f"{name}:{form}:percent"] = float(f"{100 * counted.share:.3g}")
        figures[f"{name}:{form}:bytes"] = counted.file_bytes
        print(f"{name:<15}{form:<45}{counted.num_trainable_parameters:>12,}{100 * counted.share:>10.4f} %", flush=True)

    for name in ARCHITECTURES:
        model = open_architecture(name)
        figures[f"{name}:numbers"] = sum(parameter.numel() for parameter in model.parameters())
        for preset in PRESETS:
            if not preset_targets(model, preset):
                continue
            for form, fields in FORMS.items():
                if "recursion" not in form or "conv" in preset:
                    count(name, f"{preset}, {form}", AtomConfig(target_modules=preset, **fields))
        if preset_targets(model, "cross_attention"):
            count(name, "LoRA of rank 16 on attention", LoraConfig(**LORA))
    three = [
        path for path, m in open_architecture("resnet-50").named_modules() if getattr(m, "kernel_size", 0) == (3, 3)
    ]
    for num_atoms in (6, 7, 8, 9):
        adapter = AtomConfig(target_modules=three, channel_block=1, num_atoms=num_atoms)
        count("resnet-50", f"3x3 convolutions, {num_atoms} spatial atoms", adapter)
    write_result(config.output, command_line("parameters", config), figures)


if __name__ == "__main__":
    main(parse_config(ParametersConfig))
