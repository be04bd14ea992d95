"""ComfyUI's own server runs the example workflows, and says what is wrong; only where COMFYUI_PATH says where it is."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from PIL import ImageChops, ImageStat

import atomdiff
from atomdiff.pipelines.placeholder_tokens import add_placeholder_tokens, set_token_embedding
from atomdiff.tuner import AtomConfig
from tests.comfyui import checkpoints, real_comfy
from tests.comfyui.pack import PACK
from tests.comfyui.server import bypass, start, to_prompt
from tests.helpers import add_adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="set COMFYUI_PATH to a folder with ComfyUI's source"),
]
WORKFLOWS = {path.stem: json.loads(path.read_text()) for path in sorted(PACK.glob("example_workflows/*.json"))}
BASES = {"v1-5-pruned-emaonly-fp16.safetensors": "sd1", "sd_xl_base_1.0.safetensors": "sdxl"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server, with a checkpoint of each base and the concepts of the example workflows."""
    folder = tmp_path_factory.mktemp("comfyui")
    models = folder / "models"
    for name in ("checkpoints", "atoms", "loras"):
        (models / name).mkdir(parents=True)
    real_comfy.install(models)
    for checkpoint, base in BASES.items():
        pipe = checkpoints.make_pipe(base)
        checkpoints.write_checkpoint(pipe, models / "checkpoints" / checkpoint)
        pipe.to(torch.float16).to(torch.float32)  # as in the checkpoint
        for seed, name in enumerate(_concepts(checkpoint)):
            _save(pipe, models / "atoms" / name, seed)
    with start(folder) as running:
        running.folder = folder
        yield running


def _concepts(checkpoint):
    """The concepts that the workflows with a checkpoint load."""
    nodes = [node for workflow in WORKFLOWS.values() if checkpoint in str(workflow) for node in workflow["nodes"]]
    return sorted({node["widgets_values"][0] for node in nodes if node["type"] == "LoadAtoms"})


def _save(pipe, path, seed):
    """Save a random concept with a trigger word."""
    name = path.name.partition(".")[0]
    add_adapter(pipe, name, AtomConfig(), ("unet",), seed)
    word, generator = f"{name}word", torch.Generator().manual_seed(seed)
    add_placeholder_tokens(pipe, [word], owner=name)
    encoders = [part for part in ("text_encoder", "text_encoder_2") if part in pipe.components]
    widths = {part: pipe.components[part].config.hidden_size for part in encoders}
    vectors = {part: torch.randn(width, generator=generator) for part, width in widths.items()}
    set_token_embedding(pipe, word, vectors)
    atomdiff.save_atoms(pipe, path, name, trigger_phrase=f"{word} {name}")
    atomdiff.unload_atoms(pipe)


def _prompt(server, name, **changes):
    """An example workflow as a prompt, for a small image in two steps; changes are of all inputs of a name."""
    prompt = to_prompt(WORKFLOWS[name], server.nodes())
    for node in prompt.values():
        small = {"width": 64, "height": 64, "steps": 2, **changes}
        node["inputs"] |= {key: value for key, value in small.items() if key in node["inputs"]}
    return prompt


def _difference(one, other):
    return max(ImageStat.Stat(ImageChops.difference(one, other)).mean)


def _loaders(prompt):
    return [number for number, node in prompt.items() if node["class_type"] == "LoadAtoms"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_example_workflows(server, name):
    """An image comes out, which the concepts change; a bypassed node and weights of 0 give that of the bare base."""
    prompt = _prompt(server, name)
    image = server.image(server.run(prompt))
    assert image.size == (64, 64)
    bare = prompt
    for number in _loaders(prompt):
        bare = bypass(bare, number)
    without = server.image(server.run(bare))
    assert _difference(image, without) > 1
    off = server.image(server.run(_prompt(server, name, weight_model=0, weight_clip=0)))
    assert _difference(off, without) == 0
    assert _difference(server.image(server.run({**prompt})), image) == 0  # the base was given back to the bit
    negative = server.image(server.run(_prompt(server, name, weight_model=-1.0)))
    assert _difference(negative, image) > 1 and _difference(negative, without) > 1


def test_each_of_two_concepts_counts(server):
    prompt = _prompt(server, "atoms_two_concepts")
    both = server.image(server.run(prompt))
    for number in _loaders(prompt):
        assert _difference(server.image(server.run(bypass(prompt, number))), both) > 1


def test_files_are_listed_while_the_server_runs(server):
    def listed():
        return server.nodes()["LoadAtoms"]["input"]["required"]["file"][0]

    added = server.folder / "models/loras/added.atoms.safetensors"
    assert "mug.atoms.safetensors" in listed() and added.name not in listed()
    shutil.copy(server.folder / "models/atoms/mug.atoms.safetensors", added)
    assert added.name in listed()
    added.unlink()
    assert added.name not in listed()


def test_a_missing_file_is_named_before_anything_runs(server):
    status, answer = server.post(_prompt(server, "atoms_sd1", file="gone.atoms.safetensors"))
    errors = [error["details"] for node in answer["node_errors"].values() for error in node["errors"]]
    assert status == 400
    expected = "there is no 'gone.atoms.safetensors' in ComfyUI's models/atoms or models/loras: put it there"
    assert errors == [f"file - {expected}"] * 2


def test_a_concept_of_another_base_is_refused(server):
    checkpoint = next(iter(BASES))
    entry = server.run(_prompt(server, "atoms_sdxl", ckpt_name=checkpoint))
    assert entry["status"]["status_str"] == "error"
    ((_, error),) = [message for message in entry["status"]["messages"] if message[0] == "execution_error"]
    assert error["node_type"] == "LoadAtoms" and error["exception_type"] == "atomdiff.utils.errors.UserError"
    assert "the concept was made for another architecture" in error["exception_message"]
    assert server.image(server.run(_prompt(server, "atoms_sd1")))  # the server goes on


def test_a_damaged_file_is_refused(server):
    path = server.folder / "models/atoms/damaged.atoms.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0no JSON!")
    entry = server.run(_prompt(server, "atoms_sd1", file=path.name))
    path.unlink()
    ((_, error),) = [message for message in entry["status"]["messages"] if message[0] == "execution_error"]
    assert error["exception_type"] == "atomdiff.utils.errors.UserError"


def test_a_file_is_loaded_again_only_when_it_has_changed(server):
    path = server.folder / "models/atoms/changing.atoms.safetensors"
    atoms = server.folder / "models/atoms"
    prompt = _prompt(server, "atoms_sd1", file=path.name)

    def run():
        entry = server.run(prompt)
        ((_, cached),) = [message for message in entry["status"]["messages"] if message[0] == "execution_cached"]
        return server.image(entry) if entry["outputs"] else None, {*cached["nodes"]}

    shutil.copy(atoms / "mug.atoms.safetensors", path)
    first, _ = run()
    _, cached = run()
    assert cached >= {*_loaders(prompt)}
    shutil.copy(atoms / "robot.atoms.safetensors", path)
    second, cached = run()
    assert not cached & {*_loaders(prompt)}
    assert _difference(first, second) > 1
    path.unlink()
