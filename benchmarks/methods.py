"""Every method in configs/experiments: parameters and bytes, and what it can do; prints the rows of docs/methods.md.

python -m benchmarks.methods
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.experiments import EXPERIMENTS, all_methods
from benchmarks.result_file import command_line, write_result

BASES = {"toybox": "samples/toybox-sd", "sd15": "sd-1.5"}
ABLE = ("convolutions", "text encoder", "merge")
_ANSWERS = {True: "yes", False: "no", None: "-"}


@dataclass(frozen=True)
class MethodsConfig:
    """What to count."""

    methods: tuple[str, ...] = ()
    """Folders under configs/experiments. Default: all but those of classifiers."""
    output: str = "benchmarks/results/methods.json"
    """The result file."""


def count(method: str) -> dict[str, int]:
    """Return the parameters and bytes of a method on each base."""
    from atomdiff.concepts.parameter_count import count_parameters
    from atomdiff.tuner.read_config import read_adapter
    from atomdiff.utils.assets import find_asset

    figures = {}
    for name, base in BASES.items():
        counted = count_parameters(find_asset(base), read_adapter(str(EXPERIMENTS / method / "adapter.json")))
        figures[f"{name}:parameters"] = counted.num_trainable_parameters
        figures[f"{name}:bytes"] = counted.file_bytes
    return figures


def try_out(method: str, pipe: Any) -> dict[str, bool | None]:
    """Try what a method can do, on a pipeline of its own; None where nothing is added to the model."""
    import atomdiff
    from atomdiff.training.method import make_trainable
    from atomdiff.tuner.read_config import adapts_nothing, read_adapter

    adapter = read_adapter(str(EXPERIMENTS / method / "adapter.json"))
    if adapter is None or adapts_nothing(adapter):
        return dict.fromkeys(ABLE)

    def works(action: Callable[[], Any]) -> bool:
        try:
            action()
        except UserError as error:
            print(f"{method}: {error}", flush=True)
            return False
        return True

    def add_to(model: Any, *targets: str) -> bool:
        elsewhere = copy.deepcopy(adapter)
        if hasattr(elsewhere, "feedforward_modules"):
            elsewhere.feedforward_modules = []
        parts = elsewhere.parts() if isinstance(elsewhere, atomdiff.CombinedConfig) else [elsewhere]

        def add(part: Any, target: str) -> None:
            part.target_modules = [target]
            make_trainable(copy.deepcopy(model), part, seed=0)

        return any(works(partial(add, part, target)) for part in parts for target in targets)

    text_encoder = add_to(pipe.text_encoder, "q_proj", "self_attn")
    able: dict[str, bool | None] = {"convolutions": add_to(pipe.unet, "conv1"), "text encoder": text_encoder}
    make_trainable(pipe.unet, adapter, seed=0)
    return able | {"merge": works(lambda: atomdiff.merge(pipe))}


def row(method: str, figures: dict[str, Any]) -> str:
    """Return a method's row in docs/methods.md."""
    cells = [f"{figures[f'{method}:{base}:{what}']:,}" for what in ("parameters", "bytes") for base in BASES]
    cells += [_ANSWERS[figures[f"{method}:{what}"]] for what in ABLE]
    return f"| `{method}` | {' | '.join(cells)} |"


def main(config: MethodsConfig) -> None:
    """Count, try out, write the result file, and print the rows."""
    quiet_libraries()
    from atomdiff.toybox.base import load_toybox

    figures: dict[str, Any] = {}
    methods = config.methods or all_methods()
    for method in methods:
        found = count(method) | try_out(method, load_toybox())
        figures |= {f"{method}:{name}": value for name, value in found.items()}
    write_result(config.output, command_line("methods", config), figures)
    print("\n".join(row(method, figures) for method in methods))


if __name__ == "__main__":
    main(parse_config(MethodsConfig))
