"""Patches of several tasks in one classifier: whether they and the base answer to the bit, and what a switch takes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from atomdiff.utils.errors import UserError
from benchmarks.timing import take_turns

_ROUNDS = 30


def load_patches(base: Path, folders: Sequence[Path]) -> tuple[Any, list[str]]:
    """Return a base with patches loaded, and their names.

    Raises:
        UserError: one model cannot hold these.
    """
    from atomdiff.classify import load_patch, open_base

    model = open_base(str(base))
    return model, [load_patch(model, folder, f"task{number}") for number, folder in enumerate(folders)]


def answers_to_the_bit(base: Path, folders: Sequence[Path], side: int) -> bool:
    """Tell whether patches in one model give the logits that each gives alone, and the base those that it gave before.

    The base is asked when all patches are switched off, and again when they are unloaded.

    Args:
        base: folder of the base.
        folders: a trained classifier for each task.
        side: pixels.

    Raises:
        UserError: one model cannot hold these.
    """
    from atomdiff.classify import load_classifier, open_base, set_active, unload_patch

    pixels = torch.randn(64, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = open_base(str(base))(pixels).logits
        model, names = load_patches(base, folders)
        same = []
        for name, folder in zip(names, folders, strict=True):
            set_active(model, name)
            same.append(torch.equal(model(pixels).logits, load_classifier(folder)(pixels).logits))
        set_active(model, None)
        same.append(torch.equal(model(pixels).logits, before))
        unload_patch(model)
        same.append(torch.equal(model(pixels).logits, before))
    return all(same)


def compare_patches(
    base: Path, folders: Mapping[str, Sequence[Path]], copy: Path, side: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compare the patches of some methods, those of each in one model, and time switches beside a copy of all weights.

    Args:
        base: folder of the base.
        folders: by method, a trained classifier for each task.
        copy: folder of a fully tuned classifier, whose weights are copied.
        side: pixels.

    Returns:
        The figures, and by method why no model can hold its patches.
    """
    from atomdiff.classify import load_classifier, load_patch, set_active

    figures: dict[str, Any] = {}
    refused: dict[str, str] = {}
    models: dict[str, Any] = {}
    works: dict[tuple[str, str | None], Any] = {}
    for method, patches in folders.items():
        try:
            figures[f"{method}:equal_to_the_bit"] = answers_to_the_bit(base, patches, side)
        except UserError as error:
            refused[method] = str(error)
            continue
        model, names = load_patches(base, patches)
        models[method] = model
        works |= {(method, name): partial(set_active, model, name) for name in (*names, None)}
    copied = load_classifier(copy)
    state = {path: tensor.clone() for path, tensor in copied.state_dict().items()}
    works["", "copy"] = partial(copied.load_state_dict, state)
    seconds = take_turns(works, _ROUNDS, warm_up=3)
    figures["copy_weights_seconds"] = seconds["", "copy"]
    loads = {method: partial(load_patch, model, folders[method][0], "again") for method, model in models.items()}
    for method, found in take_turns(loads, 1).items():
        figures[f"{method}:load_seconds"] = found
        switches = [took for key, took in seconds.items() if key[0] == method]
        figures[f"{method}:switch_seconds"] = statistics.median(switches)
    return figures, refused
