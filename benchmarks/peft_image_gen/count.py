"""Parameters and bytes of the experiments on FLUX.2-klein-base-4B, without weights, beside PEFT's published figures.

    python -m benchmarks.peft_image_gen.count --peft ../peft

The architecture has the sizes that InvokeAI (invokeai/backend/flux2) gives for Klein 4B, and else diffusers' defaults.
PEFT's own results confirm it: parameters and bytes of `CONFIRMED`, counted in the same way, must be equal to them.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.paths import PathText, expand_paths
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.peft_image_gen.run import EXPERIMENTS, benchmark_folder
from benchmarks.result_file import command_line, write_result

KLEIN_BASE_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
CONFIRMED = ("ln_tuning/flux2-klein-default", "ia3/flux2-klein-default", "lora/flux2-klein-default")
SIZES = (1e-3, 2e-3, 4e-3, 1e-2)  # of an update, relative to the weight


@dataclass(frozen=True)
class CountConfig:
    """Count the experiments of PEFT's image-generation benchmark."""

    peft: PathText
    """Clone of https://github.com/huggingface/peft, whose results are read."""
    output: PathText = "benchmarks/results/peft_image_gen.json"
    """The result file."""

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass(frozen=True)
class Count:
    """What PEFT's benchmark reports of an adapter without training it."""

    parameters: int
    """Trainable ones."""
    all_parameters: int
    """Those of the model with the adapter."""
    bytes: int
    """Of the file that `save_pretrained` writes, with its header."""


def build_transformer(**config: Any) -> nn.Module:
    """Build the transformer in bfloat16, on the meta device; `config` differs from FLUX.2-klein-base-4B."""
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model: nn.Module = Flux2Transformer2DModel(**{**KLEIN_BASE_4B, **config}).to(torch.bfloat16)
    return model


def count(adapter: Any, transformer: nn.Module) -> Count:
    """Add an adapter (a `PeftConfig`) to a transformer on the meta device, as the benchmark does, and count."""
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save

    from atomdiff.tuner import AtomConfig

    if isinstance(adapter, AtomConfig):
        adapter = copy.copy(adapter)
        adapter.filled_by_loader = True  # there are no weights to fit atoms to
    model = get_peft_model(transformer, adapter)
    stored = get_peft_model_state_dict(model)
    tensors = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in stored.items()}
    parameters, all_parameters = model.get_nb_trainable_parameters()
    return Count(parameters, all_parameters, len(save(tensors, metadata={"format": "pt"})))


def read_experiment(folder: Path) -> Any:
    """Read the adapter of an experiment as PEFT's benchmark does."""
    from peft import PeftConfig

    import atomdiff.tuner  # noqa: F401  registers the method

    return PeftConfig.from_pretrained(str(folder))


def read_published(folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of PEFT's own results: experiment -> parameters, bytes, similarity, drift and so on.

    Raises:
        UserError: there are none.
    """
    published = {}
    for path in sorted((folder / "results").glob("*.json")):
        result = json.loads(path.read_text())
        run, train = result["run_info"], result["train_info"]
        if (run["peft_config"] or {}).get("peft_type") == "ATOMS":
            continue
        test = train["metrics"][-1]
        published[run["experiment_name"]] = {
            "parameters": train["num_trainable_params"],
            "all_parameters": train["num_total_params"],
            "bytes": train["file_size"],
            "similarity": test["test dino_similarity"],
            "drift": test["drift"] if math.isfinite(test["drift"]) else None,  # full tuning cannot be switched off
            "seconds": train["train_time"],
            "memory": train["accelerator_memory_max"],
        }
    if not published:
        raise UserError(f"found no result in {folder / 'results'}; expected an up-to-date clone of PEFT")
    return published


def confirm(folder: Path, published: dict[str, dict[str, Any]]) -> None:
    """Check that what is counted here of PEFT's own experiments is what its results say.

    Raises:
        UserError: it is not, so that the architecture or the format of the file is another one.
    """
    for name in CONFIRMED:
        found = asdict(count(read_experiment(folder / "experiments" / name), build_transformer()))
        expected = {key: published[name][key] for key in found}
        if found != expected:
            raise UserError(f"{name}: counted {found}, but PEFT published {expected}; KLEIN_BASE_4B has to follow")


def rounded_share(block: int, size: float) -> float:
    """How much of an update of that relative size is left after an adapted bfloat16 weight is rounded.

    The share is that along the update itself, for a random weight and a random update of channel blocks.
    """
    from atomdiff.atoms.layout import View
    from atomdiff.atoms.merge import adapt_weight
    from atomdiff.atoms.update import WeightUpdate, updated_weight

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 1024, generator=generator).bfloat16()
    matrix = torch.randn(block**2, block**2, generator=generator).sign() * size / block
    view = View((block, block), spans_kernel=False)
    exact = updated_weight(weight.double(), [WeightUpdate(view, matrix.double())]) - weight
    rounded = adapt_weight(weight, [WeightUpdate(view, matrix)]).double() - weight
    return float((rounded * exact).sum() / exact.square().sum())


def main(config: CountConfig) -> None:
    """Count, compare and write the result file."""
    quiet_libraries()
    folder = benchmark_folder(config.peft)
    published = read_published(folder)
    confirm(folder, published)
    figures: dict[str, float] = {}
    for path in sorted(EXPERIMENTS.iterdir()):
        counted = asdict(count(read_experiment(path), build_transformer()))
        figures |= {f"{path.name}:{key}": value for key, value in counted.items()}
    for size in SIZES:
        figures[f"share left in bfloat16:{size:g}"] = round(rounded_share(4, size), 3)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()
    command = command_line("peft_image_gen.count", config, ignore=("peft", "output")) + " --peft ../peft"
    write_result(config.output, command, figures, peft_commit=commit, published=published)


if __name__ == "__main__":
    main(parse_config(CountConfig))
