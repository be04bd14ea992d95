"""Several trained classifiers of one base in one model: load, switch and unload them.

A patch is what distinguishes such a classifier from its base: an adapter, a head, statistics of batch norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomdiff.classify.head import Head, fill_head, head_of, new_head, put_head
from atomdiff.classify.model import base_norms, base_statistics, check_splittable, hash_base, in_base
from atomdiff.classify.patch_folder import HEAD_FILE, PatchFolder, read_patch
from atomdiff.pipelines.adapter_names import derived_name, given_name
from atomdiff.tuner.adapter_state import activate, adapter_configs, adapter_layers, base_state_dict
from atomdiff.tuner.attach import attach_peft, delete_adapter, rollback_on_error
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import list_some

_RECORD = "_atomdiff_patches"


@dataclass(frozen=True)
class Patch:
    """What a patch has beside its adapter; or a base, before a patch took its place."""

    head: Head
    statistics: Mapping[str, Tensor]
    """Path -> running statistics of a batch norm; none where they are those of the base."""
    method: str
    """PEFT method of the adapter; empty where there is none."""


@dataclass
class Patches:
    """The patches of a model, which has this record."""

    loaded: dict[str, Patch] = field(default_factory=dict)
    active: str | None = None
    base: Patch | None = None
    """The base's own, while a patch is active."""
    mixing: bool = False
    """Whether a mixed batch is in progress."""


@dataclass(frozen=True)
class LoadedPatch:
    """One patch of a model."""

    name: str
    """Name of its adapter."""
    method: str
    """PEFT method, such as ATOMS or LORA; empty for a linear probe."""
    classes: list[str]
    """Names of its classes, in the order of the logits."""
    active: bool
    """Whether the model computes with it."""


def load_patch(model: Any, folder: str | Path, adapter_name: str | None = None) -> str:
    """Load a trained classifier into its base, or beside others of that base, and make it the active one.

    All is checked before anything changes; a load that fails leaves the model as it was.

    Args:
        model: an image classifier of transformers with the weights that the patch was trained on, in float32, such as
            `open_base` gives; its own head stays for `set_active(model, None)`.
        folder: the folder `classifier` of a run, of any adapter but "full".
        adapter_name: name for `set_active`; None: that of the run's output folder, with a number where it is taken.

    Returns:
        The patch's name.

    Raises:
        UserError: the folder holds no patch or a damaged one, it was trained on another base, or the name is taken.
    """
    check_splittable(model)
    folder = Path(folder)
    saved, taken = read_patch(folder), find_patches(model).loaded
    if adapter_name is None:
        whole = folder.resolve()
        name = derived_name((whole.parent if whole.name == "classifier" else whole).name, [model], taken)
    else:
        name = given_name(adapter_name, [model], taken)
    add_patch(model, saved, name)
    return name


def add_patch(model: Any, saved: PatchFolder, name: str) -> None:
    """As `load_patch`, of a folder that is read already, by a name that none has."""
    patches = find_patches(model)
    if foreign := sorted(adapter_configs(model).keys() - patches.loaded.keys()):
        raise UserError(f"the model has adapters that are no patches ({list_some(foreign)}): delete them first")
    active = patches.active
    set_active(model, None)
    try:
        _check_base(model, saved)
        patch = _make_patch(model, saved)
        with rollback_on_error([model], name):
            _attach(model, saved, name)
    except BaseException:
        set_active(model, active)
        raise
    patches.loaded[name] = patch
    vars(model)[_RECORD] = patches
    set_active(model, name)


def set_active(model: Any, adapter_name: str | None) -> None:
    """Let a model compute with one of its patches: adapter, head, classes and statistics of batch norms.

    The config has the classes (`id2label`, `num_labels`). Weights stay as they are.

    Args:
        model: a model with patches.
        adapter_name: the patch; None: the base with its own head, to the bit.

    Raises:
        UserError: there is no such patch.
    """
    patches = find_patches(model)
    check_known(model, patches, adapter_name)
    if patches.active is not None and patches.base is not None:
        left = patches.loaded[patches.active]
        now = _current(model)
        statistics = {path: now.statistics[path] for path in left.statistics}
        patches.loaded[patches.active] = Patch(now.head, statistics, left.method)
        _put(model, patches.base)
    patches.active, patches.base = None, None
    activate(model, [] if adapter_name is None else [adapter_name])
    for layer in adapter_layers(model).values():
        layer._disable_adapters = adapter_name not in layer._all_available_adapter_names()
    if adapter_name is not None:
        base = _current(model)
        _put(model, patches.loaded[adapter_name])
        patches.active, patches.base = adapter_name, base


def unload_patch(model: Any, adapter_name: str | None = None) -> None:
    """Take a patch out, or all of them with None; without patches the model is as it was before, to the bit.

    Where the patch is active, the base is afterwards.

    Raises:
        UserError: there is no such patch.
    """
    patches = find_patches(model)
    check_known(model, patches, adapter_name, adapter=False)
    for name in [*patches.loaded] if adapter_name is None else [adapter_name]:
        if patches.active == name:
            set_active(model, None)
        delete_adapter(model, name)
        del patches.loaded[name]
    if not patches.loaded:
        vars(model).pop(_RECORD, None)


def list_patches(model: Any) -> list[LoadedPatch]:
    """List the patches of a model, in the order they came."""
    patches = find_patches(model)
    return [
        LoadedPatch(name, patch.method, patch.head.classes, name == patches.active)
        for name, patch in patches.loaded.items()
    ]


def find_patches(model: Any) -> Patches:
    """Find the record of a model's patches; a new one where it has none.

    Raises:
        UserError: a mixed batch is in progress.
    """
    patches: Patches = vars(model).get(_RECORD) or Patches()
    if patches.mixing:
        raise UserError("a mixed batch is in progress in this model: leave its `with` block first")
    return patches


def check_known(model: Any, patches: Patches, name: str | None, adapter: bool = True) -> None:
    """Refuse a name that no patch has, and a patch whose adapter somebody has deleted."""
    if name is None:
        return
    if name not in patches.loaded:
        known = ", ".join(map(repr, patches.loaded)) or "none"
        raise UserError(f"there is no patch {name!r}; loaded are: {known}")
    if adapter and patches.loaded[name].method and name not in adapter_configs(model):
        raise UserError(f"the adapter of the patch {name!r} has been deleted: unload the patch, and load it again")


def _check_base(model: Any, saved: PatchFolder) -> None:
    """Refuse a base with other weights than those that the patch was trained on."""
    dtypes = {tensor.dtype for path, tensor in base_state_dict(model).items() if in_base(model, path)}
    if other := [str(dtype) for dtype in dtypes if dtype.is_floating_point and dtype != torch.float32]:
        raise UserError(
            f"the model's weights are {other[0]}; patches are loaded into float32, as their base is recognized by it: "
            "load them first, then convert the model"
        )
    if hash_base(model) != saved.base_sha256:
        raise UserError(
            f"{saved.path}: the weights of {model.config.name_or_path or 'the model'!r} are not those that it was "
            f"trained on; use a copy of {saved.base_model!r} as it was then"
        )


def _make_patch(model: Any, saved: PatchFolder) -> Patch:
    """Make the head of a patch, with memory of its own; check its tensors against the base's."""
    head = new_head(model, saved.classes)
    needed = head.state_dict()
    statistics = {path: tensor for path, tensor in saved.head.items() if in_base(model, path)}
    if statistics:
        needed |= base_statistics(model)
    shared = needed.keys() & saved.head.keys()
    misshapen = {path for path in shared if needed[path].shape != saved.head[path].shape}
    if wrong := sorted((needed.keys() ^ saved.head.keys()) | misshapen):
        raise UserError(
            f"{saved.path / HEAD_FILE}: {list_some(wrong)} missing, unknown or of another shape; it is not the head of "
            "this classifier: copy the folder again"
        )
    fill_head(head, saved.head)
    config: Any = saved.adapter[0] if saved.adapter else None
    return Patch(head, statistics, config.peft_type.value if config else "")


def _attach(model: Any, saved: PatchFolder, name: str) -> None:
    if saved.adapter is None:
        return
    try:
        attach_peft(model, *saved.adapter, name)
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # as PEFT answers strange settings
        raise UserError(f"{saved.path}: the adapter does not fit the base: {error}; copy the folder again") from error


def _current(model: Any) -> Patch:
    """Return what the model has now in the places that patches change."""
    return Patch(head_of(model), base_statistics(model), "")


def _put(model: Any, patch: Patch) -> None:
    """Put a head and statistics into their places; the tensors themselves, where the model has not been moved."""
    put_head(model, patch.head)
    for path, norm in base_norms(model).items() if patch.statistics else ():
        for name, buffer in norm.named_buffers(recurse=False):
            if (key := f"{path}.{name}") in patch.statistics:
                norm._buffers[name] = patch.statistics[key].to(buffer)
