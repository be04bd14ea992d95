"""The nodes: *Load atoms* and *Atoms trigger word*."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
from torch import Tensor

from atomdiff.concepts.compatibility import check_weights
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file
from atomdiff.pipelines.token_names import group_placeholder_tokens, rename_tokens
from atomdiff.utils.errors import UserError

from .adapter import LayerOfConcept, LayerWithTensors, add_atoms
from .base import base_weight, text_encoder_keys, text_encoder_names, unet_keys
from .files import add_folder, concept_names, concept_path, trigger_phrase
from .trigger_words import add_trigger_words

add_folder()

_WORD = (
    "STRING",
    {"default": "", "tooltip": "Another trigger word for the concept; empty: the one that it was trained with."},
)


def _weight(what: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01, "tooltip": what}


def _file() -> tuple[list[str], dict[str, Any]]:
    return concept_names(), {"tooltip": "A concept file, from models/atoms or models/loras."}


class _OfFile:
    """What both nodes tell ComfyUI about their concept file, whose name is None where another node gives it."""

    @classmethod
    def VALIDATE_INPUTS(cls, file: str | None) -> bool | str:  # noqa: N802, as ComfyUI calls it
        """Return True, or why the file cannot be loaded; ComfyUI asks before it runs anything."""
        try:
            return file is None or bool(concept_path(file))
        except UserError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(cls, file: str | None, **inputs: Any) -> Any:  # noqa: N802
        """Return what changes with the contents of the file, for ComfyUI to load it again; NaN: always."""
        if file is None:
            return math.nan
        status = os.stat(concept_path(file))
        return status.st_mtime_ns, status.st_size


class LoadAtoms(_OfFile):
    """Put a concept into a model and its text encoder."""

    CATEGORY = "loaders"
    DESCRIPTION = "Loads a concept file of atomdiff. Several can be chained; their order does not matter."
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs."""
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "file": _file(),
                "weight_model": _weight("How much the concept changes the UNet; 0: not at all."),
                "weight_clip": _weight(
                    "How much it changes the text encoders. The trigger word acts in full, but with 0 not at all."
                ),
            },
            "optional": {
                "trigger_word": _WORD,
                "allow_base_mismatch": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Load what fits of a concept that was trained on another base."},
                ),
            },
        }

    def load(
        self,
        model: Any,
        clip: Any,
        file: str,
        weight_model: float,
        weight_clip: float,
        trigger_word: str = "",
        allow_base_mismatch: bool = False,
    ) -> tuple[Any, Any]:
        """Return clones of model and CLIP with the concept.

        Raises:
            UserError: the file is damaged, or was trained on another base.
        """
        concept = read_concept_file(concept_path(file), settings_only=True)
        keys = {"unet": unet_keys(model), "text_encoder": text_encoder_keys(clip)}
        patches = {"unet": model.get_key_patches("diffusion_model."), "text_encoder": clip.get_key_patches()}
        weights = {
            layer: base_weight(patches[part][key])
            for part, of_part in keys.items()
            for layer, key in of_part.items()
            if layer in concept.layers and key in patches[part]
        }
        concept, left_out = check_weights(
            concept, weights, {"unet", *text_encoder_names(clip)}, allow_mismatch=allow_base_mismatch
        )
        words, words_left_out = _words(concept, clip, trigger_word, allow_base_mismatch)
        for what in left_out + words_left_out:
            logging.warning("%s: left out %s", file, what)
        model, clip = model.clone(), clip.clone()
        if weight_model:
            add_atoms(model, _layers(concept, keys["unet"], weight_model))
        if weight_clip:
            add_atoms(clip.patcher, _layers(concept, keys["text_encoder"], weight_clip))
            clip.tokenizer = add_trigger_words(clip.tokenizer, words)
        return model, clip


class AtomsTriggerWord(_OfFile):
    """What to write in a prompt to get a concept."""

    CATEGORY = "loaders"
    DESCRIPTION = "The trigger word of a concept file, or the phrase that it was trained with, for a prompt."
    FUNCTION = "read"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs."""
        return {"required": {"file": _file()}, "optional": {"trigger_word": _WORD}}

    def read(self, file: str, trigger_word: str = "") -> tuple[str]:
        """Return the phrase; empty if the concept has none.

        Raises:
            UserError: the file is damaged.
        """
        concept = read_concept_file(concept_path(file), settings_only=True)
        return (trigger_phrase(concept, rename_tokens(concept.tokens, trigger_word.strip() or None)),)


def _layers(concept: ConceptFile, keys: dict[str, str], weight: float) -> dict[str, LayerWithTensors]:
    """Return the layers of a concept by the keys of their weights, of those that `keys` has."""
    found: dict[str, LayerWithTensors] = {}
    for layer, tensors in concept.layers.items():
        if layer in keys:
            described = LayerOfConcept(concept.config, layer.partition(".")[2], tuple(tensors), weight)
            found[keys[layer]] = described, tuple(tensors.values())
    return found


def _words(
    concept: ConceptFile, clip: Any, trigger_word: str, allow_mismatch: bool
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return ComfyUI's text encoder -> trigger word -> embeddings (n, hidden), and what is left out, for a message.

    Raises:
        UserError: embeddings have another size than a text encoder's.
    """
    tokens = rename_tokens(concept.tokens, trigger_word.strip() or None)
    words: dict[str, dict[str, Tensor]] = {}
    left_out = []
    names = text_encoder_names(clip)
    for word, group in group_placeholder_tokens(tokens).items():
        for encoder in tokens[word]:
            vectors = torch.stack([tokens[token][encoder] for token in group])
            if encoder not in names:
                left_out.append(f"the embedding of {word!r} for {encoder}, which this CLIP does not have")
                continue
            table = getattr(clip.cond_stage_model, names[encoder]).transformer.get_input_embeddings().weight
            if vectors.shape[1] == table.shape[1]:
                words.setdefault(names[encoder], {})[word] = vectors
            elif allow_mismatch:
                left_out.append(f"the embedding of {word!r} for {encoder}, which takes another size")
            else:
                raise UserError(
                    f"the embedding of {word!r} has {vectors.shape[1]} elements, but {names[encoder]} takes "
                    f"{table.shape[1]}: the concept was made for another base"
                )
    return words, left_out


NODE_CLASS_MAPPINGS = {"LoadAtoms": LoadAtoms, "AtomsTriggerWord": AtomsTriggerWord}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadAtoms": "Load atoms", "AtomsTriggerWord": "Atoms trigger word"}
