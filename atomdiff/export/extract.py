"""`atomdiff extract`: the atoms that best explain what full fine-tuning changed in a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import atomdiff.activation_adapters  # noqa: F401 - PEFT knows its methods from then on
from atomdiff.atoms.variants import variant_of
from atomdiff.bases.find import BASES, find_base
from atomdiff.concepts.compatibility import fingerprint
from atomdiff.concepts.concept_file import ConceptFile, write_concept_file
from atomdiff.concepts.modelspec import model_spec
from atomdiff.export.extraction import ExtractedLayer, Extraction
from atomdiff.export.least_squares import fit_layers
from atomdiff.pipelines.config import BaseModelConfig
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.open import open_pipeline, stored_dtype
from atomdiff.tuner import adapter_state
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.model import find_targets
from atomdiff.tuner.read_config import adapts_nothing, read_adapter
from atomdiff.tuner.readable_copy import readable_copy
from atomdiff.utils.errors import UserError
from atomdiff.utils.paths import PathText, check_writable, refuse_overlap
from atomdiff.utils.text_files import read_yaml
from atomdiff.utils.untrusted import list_some
from atomdiff.utils.versions import atomdiff_version


@dataclass(frozen=True)
class ExtractConfig(BaseModelConfig):
    """Find the atoms that best explain a fully fine-tuned model, and write them to a concept file."""

    pretrained_model_name_or_path: PathText
    """Base model: a pipeline's folder, Hub id or checkpoint file, or a UNet's folder."""
    tuned: PathText
    """Fine-tuned model: a pipeline's folder, Hub id or checkpoint file, or a UNet's folder. --variant and
    --single_file_config are for both models."""
    output: PathText
    """Concept file to write, usually named <concept>.atoms.safetensors."""
    adapter: PathText = "atoms"
    """Adapter config: a JSON file with the fields of an AtomConfig, or atoms for the default."""
    trigger_phrase: str = ""
    """Trigger phrase: what to write in a prompt to get the concept."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision to load both models in. Default: as they are stored, which takes the least memory."""
    save_dtype: Literal["float32", "float16"] = "float16"
    """Precision to save the concept in."""


def extract_concept(config: ExtractConfig) -> Extraction:
    """Extract from two models on disk or on the Hub, and write `config.output`.

    Raises:
        UserError: a model cannot be loaded, the two do not belong together, or nothing that these atoms adapt differs.
    """
    adapter = read_adapter(config.adapter)
    if not isinstance(adapter, AtomConfig) or adapts_nothing(adapter):
        raise UserError(f"adapter={config.adapter!r} is not an AtomConfig: only atoms can be extracted")
    sources = {
        "the base": config.pretrained_model_name_or_path,
        "the tuned model": config.tuned,
        "adapter": config.adapter,
    }
    refuse_overlap({"output": config.output}, sources, inside=False)
    check_writable(Path(config.output).parent, f"output={config.output!r}", Path(config.output).name)
    base = _open(config.pretrained_model_name_or_path, config, config.revision)
    found = extract(
        base,
        _open(config.tuned, config, None),
        adapter,
        title=Path(config.output).name.partition(".")[0],
        trigger_phrase=config.trigger_phrase,
        base_model=config.pretrained_model_name_or_path,
        training={"extracted_from": config.tuned},
    )
    write_concept_file(config.output, found.concept, getattr(torch, config.save_dtype))
    return found


@torch.no_grad()
def extract(
    base: Any,
    tuned: Any,
    config: AtomConfig | None = None,
    *,
    title: str = "extracted",
    trigger_phrase: str = "",
    base_model: str = "",
    training: Mapping[str, Any] | None = None,
) -> Extraction:
    """Find the atoms that best explain how a tuned model differs from its base; neither is changed.

    For each layer the deltas minimize |W1 - adapted(W0)|, a linear least-squares problem that is solved in float64 by
    normal equations of the size of the atoms. Kernels and channels together (`channel_block` without `joint`) are
    bilinear: they are solved for in turn, until the residual settles. So are the mixes and the directions of
    `share="kind"`.

    Args:
        base: a diffusers pipeline, or a model such as its UNet, without adapters.
        tuned: the same after full fine-tuning.
        config: the atoms to find; None: the default. All variants but `recursion`.
        title: name of the concept, for its file.
        trigger_phrase: what to write in a prompt to get the concept.
        base_model: name or path of the base, for the file.
        training: further JSON-ready metadata for the file.

    Returns:
        The concept, for `atomdiff.concepts.concept_file.write_concept_file`, and how much it explains.

    Raises:
        UserError: the models do not belong together, have adapters or tensors out of reach, or nothing that these atoms
            adapt differs.
    """
    config = config or AtomConfig()
    _check_config(config)
    (component, old), (_, new) = _denoiser(base), _denoiser(tuned)
    old, new = readable_copy(old), readable_copy(new)
    before, after = _parameters(old, "base"), _parameters(new, "tuned model")
    _check_same_architecture(before, after)
    differing = [name for name, tensor in before.items() if _norm_of_difference(tensor, after[name])]
    if not differing:
        raise UserError("the tuned model has the same parameters as the base: check the two paths")
    adapted = _adapted_layers(old, config, differing)
    layers, tensors = _fit_layers(component, adapted, before, after, config)
    fingerprints = {f"{component}.{name}": fingerprint(before[f"{name}.weight"], config, name) for name in adapted}
    pipe = SimpleNamespace(components={component: old}) if isinstance(base, nn.Module) else base
    concept = ConceptFile(
        config,
        tensors,
        fingerprints,
        base_model=base_model,
        trigger_phrase=trigger_phrase,
        modelspec=model_spec(pipe, title, trigger_phrase),
        atomdiff_version=atomdiff_version(),
    )
    left_out = {name: (before[name], after[name]) for name in differing if name.removesuffix(".weight") not in adapted}
    found = Extraction(concept, tuple(layers), _group_by_kind(left_out), _other_models(base, tuned))
    shares = {"explained": round(found.explained, 6), "explained_of_all": round(found.explained_of_all, 6)}
    return replace(found, concept=replace(concept, training={**shares, **(training or {})}))


def _check_config(config: AtomConfig) -> None:
    if reason := variant_of(config).why_not_fitted(config):
        raise UserError(reason)
    if config.modules_to_save:
        raise UserError(f"modules_to_save={config.modules_to_save}: a concept file holds atoms only; leave it out")
    if config.select_budget is not None:
        found = f"select_budget={config.select_budget!r}: layers are chosen in training only"
        raise UserError(f"{found}; leave it out, and shrink the file with atomdiff prune")


def _adapted_layers(model: nn.Module, config: AtomConfig, differing: Sequence[str]) -> dict[str, nn.Module]:
    """Return path -> layer for the target layers whose weight differs."""
    try:
        targets = find_targets(model, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"these atoms do not fit the model: {error}") from error
    adapted = {name: layer for name, layer in targets.items() if f"{name}.weight" in differing}
    if not adapted:
        raise UserError(
            f"target_modules={config.target_modules!r} matches {len(targets)} layers, none of which was tuned; tuned "
            f"were {list_some(differing)}: choose target_modules that match these (atoms adapt no biases and no norms)"
        )
    return adapted


def _fit_layers(
    component: str,
    adapted: Mapping[str, nn.Module],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    config: AtomConfig,
) -> tuple[list[ExtractedLayer], dict[str, dict[str, Tensor]]]:
    """Fit the atoms of each layer; return how far they come, and their tensors by module."""
    fitted, residuals = fit_layers(adapted, {name: after[f"{name}.weight"] for name in adapted}, config)
    layers, tensors = [], {}
    for name in adapted:
        path, weight, tuned_weight = f"{component}.{name}", before[f"{name}.weight"], after[f"{name}.weight"]
        tensors[path] = fitted[name]
        size, difference = float(weight.to(torch.float32).norm()), _norm_of_difference(weight, tuned_weight)
        layers.append(ExtractedLayer(path, size, difference, residuals[name]))
    return layers, tensors


def _open(name: str, config: ExtractConfig, revision: str | None) -> Any:
    """Open a pipeline, or a UNet in a folder of its own."""
    dtype, folder = getattr(torch, config.dtype) if config.dtype else None, Path(name)
    if not folder.is_dir() or not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        described_by = config.single_file_config
        return open_pipeline(name, dtype, revision=revision, variant=config.variant, single_file_config=described_by)
    import diffusers

    settings = read_yaml(folder / "config.json")
    kind = settings.get("_class_name") if isinstance(settings, dict) else type(settings).__name__
    known = list(dict.fromkeys(base.denoiser_class for base in BASES))
    if kind not in known:
        expected = f"the folder of a pipeline or of a {' or '.join(known)}"
        raise UserError(f"{name!r} holds a {kind}: expected {expected}")
    try:
        loaded_as = dtype or stored_dtype(folder, config.variant)
        return getattr(diffusers, kind).from_pretrained(name, variant=config.variant, dtype=loaded_as)
    except (OSError, ValueError) as error:
        raise UserError(f"{name!r} exists, but cannot be loaded ({' '.join(str(error).split())})") from error


def _denoiser(source: Any) -> tuple[str, nn.Module]:
    if isinstance(source, nn.Module):
        return next((b.denoiser for b in BASES if b.denoiser_class == type(source).__name__), "unet"), source
    models = pipeline_models(source)
    denoiser = find_base(models).denoiser
    if denoiser in models:
        return denoiser, models[denoiser]
    raise UserError(f"{type(source).__name__} has no UNet: expected a pipeline from text to images, or a UNet")


def _parameters(model: nn.Module, what: str) -> dict[str, Tensor]:
    if adapters := list(adapter_state.adapter_configs(model)):
        raise UserError(f"the {what} has adapters ({list_some(adapters)}): remove them, or export it merged, first")
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if broken := [name for name, tensor in found.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"the {what} holds values that are not finite, in {list_some(broken)}: use another checkpoint")
    return found


def _check_same_architecture(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Check that both models have the same parameters of the same shapes."""
    advice = "extraction compares a model with the base that it was tuned from: check the two paths"
    for these, those, what in ((before, after, "tuned model"), (after, before, "base")):
        if missing := [name for name in these if name not in those]:
            raise UserError(f"the {what} has no {list_some(missing)}: another architecture; {advice}")
    for name, tensor in before.items():
        if tensor.shape != after[name].shape:
            found, expected = tuple(after[name].shape), tuple(tensor.shape)
            raise UserError(f"{name} of the tuned model has shape {found}, and that of the base {expected}; {advice}")


def _norm_of_difference(old: Tensor, new: Tensor) -> float:
    wide = old.to(torch.float32)
    return float((new.to(wide) - wide).norm())


def _group_by_kind(differing: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[int, float]]:
    """Return biases, norms and other weights -> how many there are, and the norm of their differences."""
    kinds: dict[str, list[float]] = {}
    for name, (old, new) in differing.items():
        kind = "biases" if name.endswith("bias") else "weights of norms" if old.ndim == 1 else "other weights"
        kinds.setdefault(kind, []).append(_norm_of_difference(old, new))
    return {kind: (len(sizes), math.hypot(*sizes)) for kind, sizes in sorted(kinds.items())}


def _other_models(base: Any, tuned: Any) -> dict[str, int]:
    """Return other components of two pipelines -> how many of their tensors differ."""
    if isinstance(base, nn.Module) or isinstance(tuned, nn.Module):
        return {}
    counts = {}
    old, new = pipeline_models(base), pipeline_models(tuned)
    for part in (old.keys() & new.keys()) - {_denoiser(base)[0]}:
        one, two = (readable_copy(each[part]).state_dict() for each in (old, new))
        counts[part] = sum(key not in two or _differs(value, two[key]) for key, value in one.items())
    return {part: count for part, count in sorted(counts.items()) if count}


def _differs(one: Tensor, two: Tensor) -> bool:
    """Tell whether two tensors differ by more than rounding to half precision."""
    if one.shape != two.shape or not one.is_floating_point():
        return not torch.equal(one, two)
    return not torch.allclose(two.to(one), one, rtol=2**-7, atol=2**-10 * float(one.abs().max() if one.numel() else 0))
