"""A stand-in for ComfyUI: the part of its interface that the node pack uses, written from how it behaves.

It is faithful in what the tests rely on: names of modules, functions, arguments and keys; patches that are applied to a
float32 copy of the base weight, in their order; a backup that gives back the very same tensors; prompts as tokens with
weights, in which an embedding by name takes the place of a token. It has no devices, no models that can be called, and
no UNet of its own: which key a layer has, it takes from atomdiff's own table for SDXL exports. ComfyUI itself takes its
place in `test_comfyui.py` where `COMFYUI_PATH` says where it is.
"""

from __future__ import annotations

import copy
import re
import sys
import types
from pathlib import Path

import torch
from torch import nn

from atomdiff.bases.stable_diffusion import original_path
from atomdiff.tuner.model import supported_modules
from tests.tiny_models import make_tokenizer

LENGTH = 77


class Node(nn.Module):
    """A module of nothing but parameters, by their paths."""

    def __init__(self, state):
        super().__init__()
        for key, value in state.items():
            *path, name = key.split(".")
            node = self
            for part in path:
                if part not in node._modules:
                    node.add_module(part, Node({}))
                node = node._modules[part]
            node.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))

    def get_input_embeddings(self):
        return self.text_model.embeddings.token_embedding


class WeightAdapterBase:
    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32, original=None
    ):
        raise NotImplementedError


class ModelPatcher:
    def __init__(self, model):
        self.model, self.patches, self.backup = model, {}, {}

    def clone(self):
        other = ModelPatcher(self.model)
        other.patches = {key: entries[:] for key, entries in self.patches.items()}
        other.backup = self.backup
        return other

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        known = [key for key in patches if key in self.model.state_dict()]
        for key in known:
            entry = (strength_patch, patches[key], strength_model, None, None)
            self.patches[key] = [*self.patches.get(key, []), entry]
        return known

    def get_key_patches(self, filter_prefix=""):
        return {
            key: [(self.backup.get(key, weight), lambda value, **_: value), *self.patches.get(key, [])]
            for key, weight in self.model.state_dict(keep_vars=True).items()
            if key.startswith(filter_prefix)
        }

    def patch_model(self, device_to=None):
        for key, entries in self.patches.items():
            path, _, name = key.rpartition(".")
            owner = self.model.get_submodule(path)
            self.backup[key] = getattr(owner, name)
            changed = calculate_weight(entries, self.backup[key].detach().float().clone(), key)
            setattr(owner, name, nn.Parameter(changed.to(self.backup[key].dtype), requires_grad=False))
        return self.model

    def unpatch_model(self, device_to=None):
        for key, weight in self.backup.items():
            path, _, name = key.rpartition(".")
            setattr(self.model.get_submodule(path), name, weight)
        self.backup.clear()


def calculate_weight(entries, weight, key):
    for strength, value, strength_model, offset, function in entries:
        weight = weight * strength_model
        if isinstance(value, list):  # another model's weight with its own patches
            ((base, convert), *others) = value
            value = ("diff", (calculate_weight(others, convert(base.detach().float().clone()), key),))
        if isinstance(value, WeightAdapterBase):
            value = type(value)(value.loaded_keys, copied(value.weights))
            weight = value.calculate_weight(weight, key, strength, strength_model, offset, function)
        else:
            weight = weight + strength * value[1][0]
    return weight


def copied(value):
    """As ComfyUI copies what an adapter has to the device of a weight: tensors in lists and tuples, which stay such."""
    if isinstance(value, list | tuple):
        return type(value)(copied(each) for each in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


class SDTokenizer:
    def __init__(self, tokenizer, embedding_directory=None):
        self.tokenizer, self.embedding_directory = tokenizer, embedding_directory

    def _try_get_embedding(self, embedding_name):
        name, *leftover = embedding_name.split()
        return None, name, " ".join(leftover)

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        tokens = [(self.tokenizer.bos_token_id, 1.0)]
        for part in re.findall(r"\([^()]*\)|[^()]+", text):
            weight = 1.0
            if part.startswith("("):
                part, weight = part[1:-1], 1.1
                if number := re.search(r":([\d.]+)$", part):
                    part, weight = part[: number.start()], float(number[1])
            plain, *named = re.split(r"(?:^| |\n)embedding:", part)
            tokens += self._plain(plain, weight)
            for name in named if self.embedding_directory is not None else []:
                rows, _, leftover = self._try_get_embedding(name)
                tokens += [(row, weight) for row in (() if rows is None else rows)]
                tokens += self._plain(leftover, weight)
        return [tokens + [(self.tokenizer.eos_token_id, 1.0)] * (LENGTH - len(tokens))]

    def _plain(self, text, weight):
        return [(number, weight) for number in self.tokenizer(text, add_special_tokens=False)["input_ids"]]


class Tokenizer:
    """As SD1Tokenizer and SDXLTokenizer: one for each text encoder, by the last letter of its name."""

    def __init__(self, parts):
        vars(self).update(parts)

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        return {
            name[-1]: part.tokenize_with_weights(text, return_word_ids, **kwargs) for name, part in vars(self).items()
        }


class CLIP:
    def __init__(self, model, tokenizer):
        self.cond_stage_model, self.tokenizer, self.patcher = model, tokenizer, ModelPatcher(model)

    def clone(self):
        other = copy.copy(self)
        other.patcher = self.patcher.clone()
        return other

    def get_key_patches(self):
        return self.patcher.get_key_patches()

    def tokenize(self, text):
        return self.tokenizer.tokenize_with_weights(text)


def unet_to_diffusers(unet_config):
    unet = unet_config.get("unet")
    return {f"{path}.weight": f"{original_path(path, unet)}.weight" for path in supported_modules(unet)} if unet else {}


def make_model(pipe):
    """As a checkpoint loader's MODEL, with the weights of a pipeline's UNet."""
    keys = unet_to_diffusers({"unet": pipe.unet})
    state = pipe.unet.state_dict()
    model = Node({f"diffusion_model.{key}": state[ours] for ours, key in keys.items()})
    model.model_config = types.SimpleNamespace(unet_config={"unet": pipe.unet})
    return ModelPatcher(model)


def make_clip(pipe):
    """As a checkpoint loader's CLIP, with the weights of a pipeline's text encoders."""
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    encoders = {name: getattr(pipe, ours) for ours, name in names.items() if hasattr(pipe, ours)}
    state = {
        f"{name}.transformer.{comfy_name(key)}": value
        for name, encoder in encoders.items()
        for key, value in encoder.state_dict().items()
    }
    return CLIP(Node(state), Tokenizer({name: SDTokenizer(make_tokenizer(), []) for name in encoders}))


def comfy_name(key):
    """The key of a text encoder's parameter in ComfyUI."""
    return key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"


def modules(folder):
    """The modules of ComfyUI that the pack imports, by name, with models in `folder`."""
    paths = {"loras": [str(Path(folder) / "loras")]}

    def filenames(name):
        return sorted(path.name for each in paths[name] if Path(each).is_dir() for path in Path(each).iterdir())

    def full_path(name, file):
        return next((str(Path(each) / file) for each in paths[name] if (Path(each) / file).is_file()), None)

    made = {name: types.ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.weight_adapter", "folder_paths")}
    made["comfy"].utils, made["comfy"].weight_adapter = made["comfy.utils"], made["comfy.weight_adapter"]
    made["comfy.utils"].unet_to_diffusers = unet_to_diffusers
    made["comfy.weight_adapter"].WeightAdapterBase = WeightAdapterBase
    made["folder_paths"].models_dir = str(folder)
    made["folder_paths"].add_model_folder_path = lambda name, path: paths.setdefault(name, []).append(path)
    made["folder_paths"].get_filename_list = filenames
    made["folder_paths"].get_full_path = full_path
    return made


def install(folder):
    """Put the modules in place of ComfyUI's; return the names to take out again."""
    made = modules(folder)
    sys.modules.update(made)
    return list(made)
