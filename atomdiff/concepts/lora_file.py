"""LoRA files of other programs (kohya, LyCORIS, OneTrainer, diffusers) -> adapters of a pipeline's models."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from atomdiff.bases.find import BASES, find_base
from atomdiff.concepts.concept_file import FORMAT, read_tensors
from atomdiff.concepts.lora_layers import Layer, lora_factors
from atomdiff.concepts.peft_folder import Adapters
from atomdiff.tuner.model import supported_modules
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import check_patterns, list_some, parse_json, printable, read_safetensors_header

_DOWN = r"lora_down\.weight|lora_A(?:\.default)?\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight"
_UP = r"lora_up\.weight|lora_B(?:\.default)?\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight"
_FACTORS = r"hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)"
_OTHER = r"alpha|diff|diff_b|w_norm|b_norm|lora_B\.bias|dora_scale|lora_magnitude_vector(?:\.weight)?"
_KEY = re.compile(rf"(.+?)[._](?:({_DOWN})|({_UP})|(lora_mid)\.weight|({_FACTORS})|({_OTHER}))")
_LARGEST = 1e9  # rank or alpha


def is_lora_file(path: Path) -> bool:
    """Tell whether a safetensors file is not a concept file, so that it may be a LoRA file.

    Raises:
        UserError: it is damaged.
    """
    return read_safetensors_header(path)[0].get("format") != FORMAT


def has_lora_keys(keys: Iterable[str]) -> bool:
    """Tell whether a safetensors file with these keys has layers that `read_lora` can read."""
    return any(match and match[6] != "alpha" for match in map(_KEY.fullmatch, keys))


def read_lora(path: Path, models: Mapping[str, nn.Module], allow_mismatch: bool) -> tuple[Adapters, list[str]]:
    """Read a LoRA, LoCon, LoHa, LoKr, DoRA or weight differences, with the names of kohya's programs or of diffusers.

    What is not a plain LoRA becomes an exact LoRA of the necessary rank. A DoRA becomes one for the base that it is
    loaded into; its adapter weight then multiplies the delta of the weights, as in ComfyUI.

    Args:
        path: the safetensors file.
        models: component -> model.
        allow_mismatch: skip layers that the models lack or have in other shapes.

    Returns:
        The adapters by component, and what was skipped, for a message.

    Raises:
        UserError: it is not such a file, is damaged, or does not fit the models.
    """
    metadata, keys = read_safetensors_header(path)
    found = {key: _KEY.fullmatch(key) for key in keys}
    if not has_lora_keys(keys):
        raise UserError(f"{path} is no concept and no LoRA: {_what_it_is(keys, metadata)}")
    if any(key.startswith("base_model.model.") for key in keys):
        raise UserError(f"{path} is of a PEFT adapter, whose {CONFIG_NAME} is missing beside it: put it there")
    tensors = read_tensors(path)[0]
    layers: dict[str, Layer] = {}
    left_out = (
        [f"{list_some(unknown)}, which is no LoRA"] if (unknown := [key for key in keys if not found[key]]) else []
    )
    for key, match in found.items():
        if match is not None:
            kind = "down" if match[2] else "up" if match[3] else match[4] or match[5] or match[6]
            layers.setdefault(match[1], {})[kind] = tensors[key]
    modules = _modules_by_name(models)
    scales = _scales_of_diffusers(path, metadata)
    parts: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    missing, wrong = [], []
    for name, layer in layers.items():
        place = modules.get(flat := _flat(name)) or modules.get(f"{flat}_0")
        if gone := sorted(layer.keys() & {"diff_b", "w_norm", "b_norm", "lora_B.bias"}):
            left_out.append(f"{printable(name)}.{list_some(gone)}, as only weights change")
            layer = {kind: tensor for kind, tensor in layer.items() if kind not in gone}
        if not layer.keys() - {"alpha"}:
            continue
        if place is None:
            missing.append(name)
            continue
        component, module, base = place
        try:
            if module in parts.get(component, {}):
                raise ValueError("it appears twice, under different names")
            factors = lora_factors(layer, base, scales(component, module))
        except (ValueError, RuntimeError, LookupError) as error:
            wrong.append(f"{name} ({error})")
            continue
        if factors is not None:
            parts.setdefault(component, {})[module] = factors
    left_out += _refuse_or_leave_out(path, models, missing, wrong, bool(parts), allow_mismatch, metadata, keys)
    return {component: _adapter(of_part) for component, of_part in parts.items()}, left_out


def trigger_phrase(path: Path) -> str:
    """Return the trigger phrase in the metadata of a LoRA file; empty if it has none."""
    return read_safetensors_header(path)[0].get("modelspec.trigger_phrase", "")


def _refuse_or_leave_out(
    path: Path,
    models: Mapping[str, nn.Module],
    missing: list[str],
    wrong: list[str],
    any_fits: bool,
    allow_mismatch: bool,
    metadata: Mapping[str, str],
    keys: Iterable[str],
) -> list[str]:
    """Return what is skipped, for a message; refuse the file where that is too much, or nothing is left."""
    of = {name: _component_of(name) for name in missing}
    absent = {name: part for name, part in of.items() if part and part not in models}
    ends = {name for name in (*missing, *wrong) if re.search(r"(?:conv_(?:in|out)|input_blocks_0_0|_out_2)\b", name)}
    others = [name for name in (*missing, *wrong) if name not in absent and name not in ends]
    if (others and not allow_mismatch) or not any_fits:
        way_out = "; allow_base_mismatch=True loads what fits" if any_fits else ""
        unfit = list_some(others or [*missing, *wrong]) if missing or wrong else "it changes nothing"
        raise UserError(f"{path} ({_what_it_is(keys, metadata)}) does not fit this pipeline: {unfit}{way_out}")
    left_out = [f"the layers of {part}, which this pipeline does not have" for part in sorted({*absent.values()})]
    rest = [name for name in (*missing, *wrong) if name not in absent]
    return left_out + ([list_some(rest)] if rest else [])


def _scales_of_diffusers(path: Path, metadata: Mapping[str, str]) -> Callable[[str, str], float | None]:
    """Return a function (component, module) -> the scale in the metadata of diffusers; None: there is none."""
    try:
        values = parse_json(metadata.get("lora_adapter_metadata", "{}"))
        _check_scales(values)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: lora_adapter_metadata: {printable(str(error))}") from error

    def scale(component: str, module: str) -> float | None:
        found = []
        for whole, pattern in (("lora_alpha", "alpha_pattern"), ("r", "rank_pattern")):
            exceptions = values.get(f"{component}.{pattern}") or {}
            number = exceptions.get(get_pattern_key(list(exceptions), module), values.get(f"{component}.{whole}"))
            if number is None:
                return None
            found.append(number)
        return float(found[0] / (found[1] ** 0.5 if values.get(f"{component}.use_rslora") else found[1]))

    return scale


def _check_scales(values: Mapping[str, Any]) -> None:
    """Check the ranks and alphas in the metadata of diffusers; ValueError: they are invalid."""
    patterns = {name: value for name, value in values.items() if re.search(r"\.(rank|alpha)_pattern$", name) and value}
    if odd := [name for name, value in patterns.items() if not isinstance(value, dict)]:
        raise ValueError(f"{odd[0]} is {patterns[odd[0]]!r:.50}")
    check_patterns(key for value in patterns.values() for key in value)
    for key in (key for value in patterns.values() for key in value):
        try:
            re.compile(rf"(.*\.)?({key})$")  # as it is used
        except re.error as error:
            raise ValueError(f"{key!r} is no regular expression: {error}") from error
    numbers = {name: value for name, value in values.items() if re.search(r"\.(r|lora_alpha)$", name)}
    numbers |= {f"{name}[{key!r}]": number for name, value in patterns.items() for key, number in value.items()}
    for name, number in numbers.items():
        if number is not None and (type(number) not in (int, float) or not 0 < number < _LARGEST):
            raise ValueError(f"{name} is {number!r:.50}")


def _adapter(modules: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the scaled factors of a model's layers in the form of PEFT."""
    ranks = {module: len(down) for module, (down, _) in modules.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    by_rank: dict[int, list[str]] = {}  # an expression for each rank: PEFT tries all of them for each layer
    for module, rank in ranks.items():
        by_rank.setdefault(rank, []).append(re.escape(module))
    unusual = {f"^(?:{'|'.join(names)})": rank for rank, names in by_rank.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=dict(unusual),
        alpha_pattern=dict(unusual),
        target_modules=rf"(?:{'|'.join(map(re.escape, modules))})",
    )
    tensors = {f"{module}.lora_A.weight": down for module, (down, _) in modules.items()}
    return config, tensors | {f"{module}.lora_B.weight": up for module, (_, up) in modules.items()}


def _modules_by_name(models: Mapping[str, nn.Module]) -> dict[str, tuple[str, str, nn.Module]]:
    """Return name of a layer in files, without dots -> component, path and layer."""
    found, base = {}, find_base(models)
    for component, prefixes in base.layer_prefixes.items():
        model: Any = models.get(component)
        for path, module in supported_modules(model).items() if model is not None else ():
            if component == base.denoiser:
                found[_flat(path)] = component, path, module  # as diffusers' first training scripts named them
            paths = base.layer_paths(component, path, model)
            names = [_flat(f"{prefix}.{each}") for prefix in prefixes for each in paths]
            found.update(dict.fromkeys(names, (component, path, module)))
    return found


def _component_of(name: str) -> str | None:
    """The component that a layer of any base architecture belongs to, by the longest prefix."""
    prefixes = {_flat(prefix): part for base in BASES for part, of in base.layer_prefixes.items() for prefix in of}
    found = max((prefix for prefix in prefixes if _flat(name).startswith(f"{prefix}_")), key=len, default=None)
    return None if found is None else prefixes[found]


def _flat(name: str) -> str:
    return name.replace(".processor.", ".").replace(".", "_")


def _what_it_is(keys: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Say what a safetensors file is, and where to use it if not here."""
    text = "\n".join(keys)
    said = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    made_for = f", made for {printable(said)}" if said else ""
    if re.search(r"^(model\.diffusion_model|cond_stage_model|first_stage_model)\.", text, re.MULTILINE):
        return "it is a whole checkpoint, to be opened as the base"
    if re.search(r"^(emb_params|clip_[lg]|string_to_param.*)$", text, re.MULTILINE):
        return "it is a textual inversion; load it with pipe.load_textual_inversion"
    transformer = (
        r"double_blocks|single_(transformer_)?blocks|^transformer\.|^lora_transformer"
        r"|^diffusion_model\.(?!(input|middle|output)_block|time_|label_emb|out\.)"
    )
    if re.search(transformer, text, re.MULTILINE):
        return f"it is for a transformer such as FLUX or SD 3, not for a UNet{made_for}"
    if re.search(r"lora_|hada_|lokr_|\.diff$", text, re.MULTILINE):
        return f"a LoRA file{made_for}"
    declared = json.dumps(metadata.get("format"))
    return f"its format is {printable(declared)}, and it holds {list_some(sorted(keys)) or 'nothing'}"
