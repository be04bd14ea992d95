"""The options of a training run that the page makes of its fields, as YAML and as a command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from atomdiff.pipelines.open import is_single_file, pipeline_class
from atomdiff.training.config import TrainConfig, load_config
from atomdiff.ui.config import UiConfig
from atomdiff.utils.assets import find_asset
from atomdiff.utils.errors import UserError
from atomdiff.utils.text_files import parse_yaml, read_yaml

PRESETS = {name: f"configs/experiments/atoms/{name}/adapter.json" for name in ("tiny", "default", "faithful")}
"""Name -> adapter."""
PRESET_HELP = {
    "tiny": "smallest file, fastest; layers near the output only",
    "default": "a good start",
    "faithful": "larger file, closer to the photos",
}
ENOUGH_TO_HOLD_OUT = 5
"""Photos from which on some are held out for the validation loss."""

_PLACES = ("instance_data_dir", "output_dir", "class_name", "trigger_word", "adapter")  # fields of their own
_NAME = re.compile(r"[^\w-]+")


def starting_options(config: UiConfig) -> str:
    """Return the options that *Advanced* begins with, as YAML: those of the training config, and what the page shows.

    The base is that of the page, as the page opens it. A learning rate beside an adapter is that adapter's, and goes
    with it: the preset brings its own.

    Raises:
        UserError: the training config cannot be read.
    """
    file = find_asset(config.train_config or _default_config(config))
    options = read_yaml(file)
    if not isinstance(options, dict):
        raise UserError(f"train_config={file!r}: expected a mapping with one option per line, such as seed: 0")
    if "adapter" in options:
        options.pop("learning_rate", None)
    options = {name: value for name, value in options.items() if name not in (*_PLACES, *config.base_options)}
    base = {name: value for name, value in config.base_options.items() if value is not None}
    steps = int(options.get("max_train_steps", TrainConfig.max_train_steps))
    shown = {
        "validation_steps": max(steps // 6, 1),
        "save_steps": max(steps // 6, 1),
        "checkpointing_steps": max(steps // 4, 1),
        "checkpoints_total_limit": 2,
        "report_to": None,
    }
    return yaml.safe_dump({**base, **shown, **options}, sort_keys=False, allow_unicode=True)


def starting_sampling(config: UiConfig) -> dict[str, Any]:
    """Return steps and guidance of images as the training config has them for its own; else the usual ones.

    Raises:
        UserError: the training config cannot be read.
    """
    options = read_yaml(find_asset(config.train_config or _default_config(config)))
    return {name: options.get(name, getattr(TrainConfig, name)) for name in ("num_inference_steps", "guidance_scale")}


def _default_config(config: UiConfig) -> str:
    name = config.pretrained_model_name_or_path
    is_known = config.single_file_config is not None or not is_single_file(name)
    kind = pipeline_class(name, revision=config.revision, single_file_config=config.single_file_config)
    return "configs/sdxl.yaml" if is_known and "XL" in kind else "configs/sd15.yaml"


def combine_options(class_name: str, trigger_word: str, preset: str, advanced: str, num_images: int) -> dict[str, Any]:
    """Return the options of a run; what stands under *Advanced* wins.

    Args:
        class_name: what the photos show.
        trigger_word: the word for it.
        preset: of `PRESETS`.
        advanced: options as YAML.
        num_images: of the subject; some of many are held out.

    Raises:
        UserError: a field is empty, or the YAML cannot be read.
    """
    if not class_name.strip():
        raise UserError("found no class name; write in a word what the photos show, such as mug or dog")
    if preset not in PRESETS:
        raise UserError(f"found the preset {preset!r}; expected one of {', '.join(PRESETS)}")
    options = read_advanced(advanced)
    fields: dict[str, Any] = {
        "adapter": PRESETS[preset],
        "class_name": class_name.strip(),
        "trigger_word": trigger_word.strip(),
    }
    if num_images >= ENOUGH_TO_HOLD_OUT and not options.get("validation_data_dir"):
        fields["validation_split"] = 0.2
    return {**fields, **options}


def read_advanced(text: str) -> dict[str, Any]:
    """Return the options that stand under *Advanced*.

    Raises:
        UserError: they cannot be read as YAML with one option per line.
    """
    options = parse_yaml(text, "Advanced")
    if not isinstance(options, dict | None):
        raise UserError("Advanced: expected one option per line, such as max_train_steps: 300")
    return options or {}


def check_config(file: Path) -> TrainConfig:
    """Read the config file of a run as `atomdiff train` does.

    Raises:
        UserError: it cannot be used.
    """
    try:
        return load_config(["--config", str(file)], prog="atomdiff train")
    except SystemExit as error:
        reason = str(error.code).removeprefix("atomdiff train: error: ").removesuffix(". --help lists the options")
        raise UserError(reason) from error


def training_side(options: Mapping[str, Any]) -> int | None:
    """Return the side of the images that a run trains on, in pixels; None: its base says it once it is opened."""
    side = options.get("resolution")
    return side if isinstance(side, int) else native_side(str(options.get("pretrained_model_name_or_path")))


def native_side(base: str) -> int | None:
    """Return the side of the images of a base in a folder, in pixels, from its configs alone; None: it is elsewhere."""
    folder = Path(find_asset(base))
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text("utf-8")) for part in ("unet", "vae"))
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def samples_per_step(options: Mapping[str, Any]) -> int:
    """Return how many instance and class images a step of a run in one process sees."""
    batch = int(options.get("train_batch_size", TrainConfig.train_batch_size))
    batches = int(options.get("gradient_accumulation_steps", TrainConfig.gradient_accumulation_steps))
    return batch * batches * (2 if options.get("with_prior_preservation") else 1)


def command_line(config_file: Path) -> str:
    """Return the command that does the same as a job."""
    return f"atomdiff train --config {shlex.quote(str(config_file))}"


def concept_name(class_name: str, trigger_word: str) -> str:
    """Return a name for a concept's file, of letters that are safe in file names and prompt tags.

    Raises:
        UserError: nothing is left of class and trigger word.
    """
    name = _NAME.sub("-", f"{trigger_word.strip()} {class_name.strip()}").strip("-_").lower()[:60]
    if not name:
        raise UserError("found no letter in class name and trigger word; use letters or digits")
    return name
