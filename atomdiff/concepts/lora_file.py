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
from atomdiff.concepts.compatibility import name_left_out
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
_KEY = re.compile(
    rf"(?P<layer>.+?)[._](?:(?P<down>{_DOWN})|(?P<up>{_UP})|(?P<lora_mid>lora_mid)\.weight"
    rf"|(?P<kind>{_FACTORS}|{_OTHER}))"
)
_NO_WEIGHTS = {"diff_b", "w_norm", "b_norm", "lora_B.bias"}  # kinds of tensors that change biases and norms
_LATENT_LAYER = re.compile(r"(?:conv_(?:in|out)|input_blocks_0_0|_out_2)\b")
_LARGEST = 1e9  # rank or alpha

Factors = dict[str, dict[str, tuple[Tensor, Tensor]]]  # component -> module -> down and up


def is_lora_file(path: Path) -> bool:
    """Tell whether a safetensors file is not a concept file, so that it may be a LoRA file.

    Raises:
        UserError: it is damaged.
    """
    return read_safetensors_header(path)[0].get("format") != FORMAT


def has_lora_keys(keys: Iterable[str]) -> bool:
    """Tell whether a safetensors file with these keys has layers that `read_lora` can read."""
    return any(match and match["kind"] != "alpha" for match in map(_KEY.fullmatch, keys))


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
    if not has_lora_keys(keys):
        raise UserError(f"{path} is neither a concept nor a LoRA: {_what_it_is(keys, metadata)}")
    if any(key.startswith("base_model.model.") for key in keys):
        raise UserError(f"{path} is of a PEFT adapter, whose {CONFIG_NAME} is missing beside it: put it there")
    layers, left_out = _group_by_layer(read_tensors(path))
    factors, missing, unfit = _fit_layers(layers, models, _scales_of_diffusers(path, metadata))
    absent = {component for name in missing if (component := _component_of(name)) and component not in models}
    unlike = [name for name in missing if _component_of(name) not in absent] + unfit
    needed = [name for name in unlike if not _LATENT_LAYER.search(name)]
    if (needed and not allow_mismatch) or not factors:
        way_out = "; allow_base_mismatch=True loads what fits" if factors else ""
        reason = list_some(needed or missing + unfit) or "it changes nothing"
        raise UserError(f"{path} ({_what_it_is(keys, metadata)}) does not fit this pipeline: {reason}{way_out}")
    adapters = {component: _adapter(of_component) for component, of_component in factors.items()}
    return adapters, left_out + name_left_out(absent, unlike)


def trigger_phrase(path: Path) -> str:
    """Return the trigger phrase in the metadata of a LoRA file; empty if it has none."""
    return read_safetensors_header(path)[0].get("modelspec.trigger_phrase", "")


def _group_by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Layer], list[str]]:
    """Return the tensors of each layer that change its weight, by kind, and what is left out, for a message."""
    found = {key: _KEY.fullmatch(key) for key in tensors}
    unknown = [key for key, match in found.items() if match is None]
    left_out = [f"{list_some(unknown)}, which is not a LoRA"] if unknown else []
    layers: dict[str, Layer] = {}
    for key, match in found.items():
        if match is not None:
            layers.setdefault(match["layer"], {})[match["kind"] or str(match.lastgroup)] = tensors[key]
    for name, layer in layers.items():
        if others := sorted(layer.keys() & _NO_WEIGHTS):
            left_out.append(f"{printable(name)}.{list_some(others)}, as only weights change")
        layers[name] = {kind: tensor for kind, tensor in layer.items() if kind not in _NO_WEIGHTS}
    return {name: layer for name, layer in layers.items() if layer.keys() - {"alpha"}}, left_out


def _fit_layers(
    layers: Mapping[str, Layer], models: Mapping[str, nn.Module], scales: Callable[[str, str], float | None]
) -> tuple[Factors, list[str], list[str]]:
    """Return the factors of the layers that change something, names that no model has, and names that do not fit."""
    modules = _modules_by_name(models)
    factors: Factors = {}
    missing, unfit = [], []
    for name, layer in layers.items():
        target = modules.get(_flat(name)) or modules.get(f"{_flat(name)}_0")
        if target is None:
            missing.append(name)
            continue
        component, module, base = target
        try:
            if module in factors.get(component, {}):
                raise ValueError("it appears twice, under different names")
            of_layer = lora_factors(layer, base, scales(component, module))
        except (ValueError, RuntimeError, LookupError) as error:
            unfit.append(f"{name} ({error})")
            continue
        if of_layer is not None:
            factors.setdefault(component, {})[module] = of_layer
    return factors, missing, unfit


def _scales_of_diffusers(path: Path, metadata: Mapping[str, str]) -> Callable[[str, str], float | None]:
    """Return a function (component, module) -> the scale in the metadata of diffusers; None: there is none."""
    try:
        values = parse_json(metadata.get("lora_adapter_metadata", "{}"))
        _check_scales(values)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: lora_adapter_metadata: {printable(str(error))}") from error

    def scale(component: str, module: str) -> float | None:
        numbers = []
        for default, pattern in (("lora_alpha", "alpha_pattern"), ("r", "rank_pattern")):
            exceptions = values.get(f"{component}.{pattern}") or {}
            number = exceptions.get(get_pattern_key(list(exceptions), module), values.get(f"{component}.{default}"))
            if number is None:
                return None
            numbers.append(number)
        alpha, rank = numbers
        return float(alpha / (rank**0.5 if values.get(f"{component}.use_rslora") else rank))

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
            raise ValueError(f"{key!r} is not a regular expression: {error}") from error
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
