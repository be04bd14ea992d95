"""The ComfyUI nodes give the weights and prompts of the merged pipeline; COMFYUI_PATH: in ComfyUI itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file

import atomdiff
from atomdiff.concepts.concept_file import read_concept_file, write_concept_file
from atomdiff.concepts.prune import PruneConfig, prune_file
from atomdiff.export.diff import export_diff
from atomdiff.export.kohya import layer_name
from atomdiff.export.lora import export_lora
from atomdiff.pipelines.placeholder_tokens import add_placeholder_tokens, set_token_embedding
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.model import base_modules, supported_modules
from atomdiff.utils.errors import UserError
from atomdiff.utils.versions import atomdiff_version
from integrations import build_comfyui
from tests.comfyui import comfy_stand_in, real_comfy
from tests.comfyui.pack import PACK, import_pack
from tests.helpers import add_adapter, embed, predict
from tests.tiny_models import fresh_copy, make_pipe

comfy = real_comfy if os.environ.get("COMFYUI_PATH") else comfy_stand_in
CPU = torch.device("cpu")
TABLE = "embeddings.token_embedding"  # of a text encoder, longer in ComfyUI
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}

SMALL = {"target_modules": ["conv_in", "conv_out"]}
SPARSE = {"basis": "sparse", "num_atoms": 12, "channel_block": 1, **SMALL}
KINDS = {
    "spatial": {"channel_block": 1},
    "channel blocks": {},
    "few atoms": {"num_atoms": 3},
    "1x1": {"target_modules": "conv+proj"},
    "attention": {"target_modules": "attention"},
    "all layers": {"target_modules": "all"},
    "no blocks, all layers": {"target_modules": "all", "channel_block": 1},
    "patterns": {"channel_block_pattern": {"conv1": 2, "conv_in": 1}},
    "joint": {"joint": True, "channel_block": 2},
    "recursion": {"recursion": 2},
    "recursion, spatial": {"recursion": 2, "channel_block": 1},
    "dct": {"basis": "dct", "target_modules": "all"},
    "sparse": SPARSE,
    "shared": {"share": "kind", "basis": "dct", "share_count": 2, "target_modules": "all"},
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """The pack as ComfyUI loads it, and the folder of ComfyUI's models."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("atoms", "loras"):
        (folder / name).mkdir()
    before = set(sys.modules)
    comfy.install(folder)
    yield import_pack(), folder
    if comfy is comfy_stand_in:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("comfy", "comfyui_atoms", "folder_paths"):
                del sys.modules[name]


@pytest.fixture(params=["sd1", "sdxl"])
def pipe(request):
    return request.getfixturevalue("tiny_pipe" if request.param == "sd1" else "tiny_xl_pipe")


@pytest.fixture
def save(pack):
    """Saves a new random concept with these settings to a file; returns its name."""

    def save(pipe, name="mug", parts=("unet",), words=None, seed=0, **settings):
        add_adapter(pipe, name, AtomConfig(**settings), parts, seed)
        if words:
            generator = torch.Generator().manual_seed(seed)
            add_placeholder_tokens(pipe, words, owner=name)
            for word in words:
                vectors = {part: torch.randn(32, generator=generator) for part in ENCODERS if hasattr(pipe, part)}
                set_token_embedding(pipe, word, vectors)
        file = pack[1] / "atoms" / f"{name}.atoms.safetensors"
        atomdiff.save_atoms(pipe, file, name, trigger_phrase=f"{words[0]} mug" if words else "")
        atomdiff.unload_atoms(pipe)
        return file.name

    return save


@pytest.fixture
def load(pack):
    """Runs the node *Load atoms*."""

    def load(model, clip, file, weight_model=1.0, weight_clip=1.0, **options):
        return pack[0].NODE_CLASS_MAPPINGS["LoadAtoms"]().load(model, clip, file, weight_model, weight_clip, **options)

    return load


def weights_of(patcher):
    return {key: value.detach().clone() for key, value in patcher.model.state_dict().items()}


def patched(patcher):
    """The weights while patched, after which every bit must be as before."""
    patcher.unpatch_model(CPU)  # ComfyUI loads text encoders at once
    before = weights_of(patcher)
    patcher.patch_model(CPU)
    changed = weights_of(patcher)
    patcher.unpatch_model(CPU)
    after = weights_of(patcher)
    assert [key for key in before if not torch.equal(after[key], before[key])] == []
    return changed, [key for key in before if not torch.equal(changed[key], before[key])]


def check_same(pipe, model, clip):
    """Check patched weights against those of the pipeline, whose concepts are merged; return how many are changed."""
    from comfyui_atoms import base

    count = 0
    keys = {"unet": base.unet_keys(model), **dict.fromkeys(ENCODERS, base.text_encoder_keys(clip))}
    for part, patcher in (("unet", model), *((name, clip.patcher) for name in ENCODERS if hasattr(pipe, name))):
        weights, changed = patched(patcher)
        for path, module in base_modules(getattr(pipe, part)):
            key = keys[part].get(f"{part}.{path}")
            if key is not None and not path.endswith(TABLE):
                torch.testing.assert_close(weights[key], module.weight.detach(), rtol=1e-6, atol=1e-6)
                count += key in changed
    return count


def file_of(pack, name):
    return pack[1] / "atoms" / name


def merge_in(pipe, pack, weights, **options):
    """Load concepts into a pipeline and merge them: file -> adapter weight."""
    names = {atomdiff.load_atoms(pipe, file_of(pack, file), **options): weight for file, weight in weights.items()}
    atomdiff.set_active(pipe, names)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_merged_pipeline(pipe, pack, save, load, kind):
    file = save(pipe, **KINDS[kind])
    model, clip = load(comfy.make_model(pipe), comfy.make_clip(pipe), file, 0.7)
    merge_in(pipe, pack, {file: 0.7})
    assert check_same(pipe, model, clip) == len(read_concept_file(file_of(pack, file)).layers)


def test_pruned_concepts(tiny_pipe, pack, save, load):
    file = save(tiny_pipe, "whole", target_modules="all")
    pruned = file_of(pack, "pruned.atoms.safetensors")
    prune_file(PruneConfig(str(file_of(pack, file)), str(pruned), keep=0.3))
    model, clip = load(comfy.make_model(tiny_pipe), comfy.make_clip(tiny_pipe), pruned.name)
    merge_in(tiny_pipe, pack, {pruned.name: 1.0})
    concept = read_concept_file(pruned)
    assert concept.config.pruned
    assert check_same(tiny_pipe, model, clip) == len(concept.layers)


def test_text_encoders(pipe, pack, save, load):
    parts = ["unet", *(name for name in ENCODERS if hasattr(pipe, name))]
    file = save(pipe, parts=parts, target_modules="all")
    model, clip = load(comfy.make_model(pipe), comfy.make_clip(pipe), file, 0.5, 0.5)
    merge_in(pipe, pack, {file: 0.5})
    layers = read_concept_file(file_of(pack, file)).layers
    assert {layer.partition(".")[0] for layer in layers} == {*parts}
    assert check_same(pipe, model, clip) == len(layers)


def test_several_are_added_up_before_the_weight_is_touched(pipe, pack, save, load):
    files = {
        save(pipe, "first", target_modules="all", seed=1): 0.8,
        save(pipe, "second", recursion=2, seed=2): -0.5,
        save(pipe, "third", seed=3, **SPARSE): 1.0,
    }
    model, clip = comfy.make_model(pipe), comfy.make_clip(pipe)
    bare = weights_of(model)
    for file, weight in reversed(files.items()):
        model, clip = load(model, clip, file, weight)
    merge_in(pipe, pack, files)
    layers = {layer for file in files for layer in read_concept_file(file_of(pack, file)).layers}
    assert check_same(pipe, model, clip) == len(layers)
    assert all(torch.equal(value, bare[key]) for key, value in weights_of(model).items())


def test_half_precision_is_rounded_once(tiny_pipe, pack, save, load):
    file = save(tiny_pipe)
    tiny_pipe.unet.half()
    model, clip = comfy.make_model(tiny_pipe), comfy.make_clip(tiny_pipe)
    model.model.half()
    exact = comfy.make_model(fresh_copy(tiny_pipe, requires_safety_checker=False))
    exact.model.float()
    weights, changed = patched(load(model, clip, file)[0])
    expected, _ = patched(load(exact, clip, file)[0])
    assert changed
    for key in changed:
        assert weights[key].dtype == torch.float16
        error = (weights[key].float() - expected[key]).abs()
        assert (error <= 1e-3 * expected[key].abs() + 1e-7).all()  # one rounding to half precision


def test_loras_act_on_top_in_any_order(tiny_pipe, save, load):
    file = save(tiny_pipe)
    model, clip = comfy.make_model(tiny_pipe), comfy.make_clip(tiny_pipe)
    key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    difference = {key: ("diff", (torch.full_like(weights_of(model)[key], 0.1),))}
    before, after = model.clone(), load(model, clip, file)[0]
    before.add_patches(difference, 0.5)
    after.add_patches(difference, 0.5)
    found, changed = patched(load(before, clip, file)[0])
    expected, _ = patched(after)
    assert key in changed
    torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
    torch.testing.assert_close(found[key], patched(load(model, clip, file)[0])[0][key] + 0.05)


def test_a_merge_of_models_is_the_base(tiny_pipe, save, load):
    file = save(tiny_pipe)
    one, clip = comfy.make_model(tiny_pipe), comfy.make_clip(tiny_pipe)
    with torch.no_grad():
        for parameter in tiny_pipe.unet.parameters():
            parameter.mul_(1.1)
    other = comfy.make_model(tiny_pipe)
    merged = one.clone()
    merged.add_patches(other.get_key_patches("diffusion_model."), 1.0, 0.0)  # all of the other, none of the first
    found, changed = patched(load(merged, clip, file, allow_base_mismatch=True)[0])
    expected, _ = patched(load(other, clip, file, allow_base_mismatch=True)[0])
    assert changed
    for key in changed:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-6)


PROMPTS = [
    "a photo of ohwx mug",
    "ohwx",
    "OHWX, red (ohwx mug:1.3) and (ohwx)",
    "an ohwx's mug\nohwx in blue",
    "a cohwxy mug with twoo vectors, ohwx.",
    "two or three Qux vectors of qux",
]


def test_prompts_get_the_embeddings_of_the_pipeline(pipe, pack, save, load):
    words = {"one": ["ohwx"], "two": ["qux", "qux_1", "qux_2"]}
    files = [save(pipe, name, words=of_name, **SMALL) for name, of_name in words.items()]
    model, bare = comfy.make_model(pipe), comfy.make_clip(pipe)
    before, clip = [bare.tokenize(prompt) for prompt in PROMPTS], bare
    for file in files:
        model, clip = load(model, clip, file)
        atomdiff.load_atoms(pipe, file_of(pack, file))
    for prompt in PROMPTS:
        plain = prompt.replace("(", "").replace(":1.3)", "").replace(")", "")
        for name, encoder in ENCODERS.items():
            if hasattr(pipe, name):
                tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
                ids = tokenizer(plain, padding="max_length", max_length=77).input_ids
                expected = getattr(pipe, name).get_input_embeddings().weight[torch.tensor(ids)]
                torch.testing.assert_close(embedded(clip, encoder, prompt), expected.detach(), rtol=0, atol=0)
                weights = {round(weight, 3) for _, weight in clip.tokenize(prompt)[encoder[-1]][0]}
                assert ({1.3, 1.1} <= weights) == ("(" in prompt)
    assert [bare.tokenize(prompt) for prompt in PROMPTS] == before


def embedded(clip, encoder, prompt):
    """The embeddings (77, hidden) that a prompt goes into a text encoder with."""
    table = getattr(clip.cond_stage_model, encoder).transformer.get_input_embeddings().weight
    ((*tokens,),) = clip.tokenize(prompt)[encoder[-1]]
    return torch.stack([each if isinstance(each, torch.Tensor) else table[each] for each, _ in tokens])


def test_embeddings_by_name_are_left_to_comfyui(tiny_pipe, pack, save, load):
    bare = comfy.make_clip(tiny_pipe)
    _, clip = load(comfy.make_model(tiny_pipe), bare, save(tiny_pipe, words=["ohwx"], **SMALL))
    prompt = "red embedding:ohwx-style mug"
    assert clip.tokenize(prompt) == bare.tokenize(prompt)


def test_weight_zero_leaves_a_side_alone(tiny_pipe, pack, save, load):
    file = save(tiny_pipe, parts=("unet", "text_encoder"), target_modules="all", words=["ohwx"])
    model, clip = comfy.make_model(tiny_pipe), comfy.make_clip(tiny_pipe)
    loaded, read = load(model, clip, file, weight_model=0.0)
    assert patched(loaded)[1] == [] and patched(read.patcher)[1] != []
    loaded, read = load(model, clip, file, weight_clip=0.0)
    assert patched(loaded)[1] != [] and patched(read.patcher)[1] == []
    assert read.tokenize("ohwx") == clip.tokenize("ohwx")


def test_another_trigger_word(tiny_pipe, pack, save, load):
    one, two = (save(tiny_pipe, name, words=["ohwx"], seed=seed, **SMALL) for seed, name in enumerate(("one", "two")))
    model, clip = load(comfy.make_model(tiny_pipe), comfy.make_clip(tiny_pipe), one)
    with pytest.raises(UserError, match="the trigger word 'ohwx' is taken"):
        load(model, clip, two)
    model, clip = load(model, clip, two, trigger_word=" Zebu ")
    tokens = read_concept_file(file_of(pack, two)).tokens
    assert torch.equal(embedded(clip, "clip_l", "a zebu")[2], tokens["ohwx"]["text_encoder"])
    node = pack[0].NODE_CLASS_MAPPINGS["AtomsTriggerWord"]()
    assert (node.read(two), node.read(two, "zebu")) == (("ohwx mug",), ("zebu mug",))


def test_trigger_word_without_a_phrase(tiny_pipe, pack, save):
    concept = read_concept_file(file_of(pack, save(tiny_pipe, words=["ohwx", "ohwx_1", "zebu"], **SMALL)))
    node = pack[0].NODE_CLASS_MAPPINGS["AtomsTriggerWord"]()
    write_concept_file(file_of(pack, "b.safetensors"), dataclasses.replace(concept, trigger_phrase=""))
    assert node.read("b.safetensors") == ("ohwx, zebu",)
    assert node.read(save(tiny_pipe, "silent")) == ("",)


def test_other_bases_are_refused(tiny_pipe, tiny_xl_pipe, pack, save, load):
    file = save(tiny_pipe, words=["ohwx"])
    with torch.no_grad():
        for parameter in tiny_pipe.unet.parameters():
            parameter.copy_(torch.rand_like(parameter))
    model, clip = comfy.make_model(tiny_pipe), comfy.make_clip(tiny_pipe)
    with pytest.raises(UserError, match="allow_base_mismatch"):
        load(model, clip, file)
    assert patched(load(model, clip, file, allow_base_mismatch=True)[0])[1] != []
    xl = save(tiny_xl_pipe, "xl", target_modules="all", words=["ohwx"])
    with pytest.raises(UserError, match="does not fit this base|has no unet"):
        load(model, clip, xl)


def test_files_are_found_in_both_folders(tiny_pipe, pack, save):
    file = save(tiny_pipe, "found")
    shutil.copy(file_of(pack, file), pack[1] / "loras" / "other.atoms.safetensors")
    (pack[1] / "loras" / "lora.safetensors").write_bytes(b"")
    load_atoms = pack[0].NODE_CLASS_MAPPINGS["LoadAtoms"]
    (names, _) = load_atoms.INPUT_TYPES()["required"]["file"]
    assert {"found.atoms.safetensors", "other.atoms.safetensors"} <= set(names) and "lora.safetensors" not in names
    state = load_atoms.IS_CHANGED(file)
    assert load_atoms.IS_CHANGED("other.atoms.safetensors")[1] == state[1]
    os.utime(file_of(pack, file), ns=(1, 1))
    assert load_atoms.IS_CHANGED(file) != state
    assert load_atoms.VALIDATE_INPUTS(file) is True
    assert load_atoms.VALIDATE_INPUTS("gone.safetensors").startswith("there is no 'gone.safetensors' in ComfyUI's")


def test_a_file_that_another_node_names(pack):
    """ComfyUI knows no value of it before it runs."""
    for node in pack[0].NODE_CLASS_MAPPINGS.values():
        assert node.VALIDATE_INPUTS(None) is True
        assert node.IS_CHANGED(None) != node.IS_CHANGED(None)


def test_the_built_pack_needs_nothing_else(tmp_path):
    """It reads a concept, with its own part of atomdiff, in a process that has only what ComfyUI has."""
    built = tmp_path / "atoms"
    build_comfyui.build(built)
    files = {path.name for path in built.iterdir()}
    assert {"LICENSE", "README.md", "__init__.py", "pyproject.toml", "example_workflows", "vendor"} <= files
    blocked = "diffusers peft transformers accelerate huggingface_hub jsonargparse xxhash cachetools tensorboard jinja2"
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked.split()}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(built / "vendor")!r})
{chr(10).join(build_comfyui.imports())}
for name in ("robot", "shared"):
    concept = read_concept_file({str(PACK.parents[1] / "tests/fixtures")!r} + f"/{{name}}.atoms.safetensors", True)
    print(type(concept.config).__name__, len(concept.layers) > 0)
print(all("vendor" in module.__file__ for name, module in sys.modules.items() if name.startswith("atomdiff")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["AtomSettings", "True"] * 2 + ["True"], done.stderr


def test_what_the_registry_asks_for():
    """Names, versions and fields of `pyproject.toml` as https://docs.comfy.org/registry/specifications has them."""
    described = pytest.importorskip("tomllib").loads((PACK / "pyproject.toml").read_text())
    project, pack = described["project"], described["tool"]["comfy"]
    assert re.fullmatch(r"[a-z]+([-_.][a-z0-9]+|[a-z0-9])*", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"]) and project["version"] == atomdiff_version()
    assert project["license"] == {"text": "Apache-2.0"} and project["dependencies"] == []
    assert pack["PublisherId"] and pack["DisplayName"] and SpecifierSet(pack["requires-comfyui"]).contains("0.33.0")


@pytest.mark.parametrize("path", sorted(PACK.glob("example_workflows/*.json")), ids=lambda path: path.stem)
def test_example_workflows(pack, path):
    """Nodes of the pack have the inputs and outputs that their classes say, and links join what exists."""
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    own = [node for node in nodes.values() if node["type"] in pack[0].NODE_CLASS_MAPPINGS]
    assert {node["type"] for node in own} == {*pack[0].NODE_CLASS_MAPPINGS}
    for node in own:
        node_class = pack[0].NODE_CLASS_MAPPINGS[node["type"]]
        inputs = {key: value for kind in node_class.INPUT_TYPES().values() for key, value in kind.items()}
        links = [key for key, value in inputs.items() if value[0] in ("MODEL", "CLIP")]
        assert [each["name"] for each in node["inputs"] if "widget" not in each] == links
        assert len(node["widgets_values"]) == len(inputs) - len(links)
        assert [each["type"] for each in node["outputs"]] == [*node_class.RETURN_TYPES]
    for number, source, slot, target, goal, kind in workflow["links"]:
        output, taken = nodes[source]["outputs"][slot], nodes[target]["inputs"][goal]
        assert number in output["links"] and taken["link"] == number and output["type"] == taken["type"] == kind


@pytest.mark.skipif(comfy is comfy_stand_in, reason="set COMFYUI_PATH to a folder with ComfyUI's source")
class TestComfyUIItself:
    """What only ComfyUI's own models and loader can show."""

    def test_conditioning_is_that_of_the_pipeline(self, pipe, pack, save, load):
        parts = [name for name in ENCODERS if hasattr(pipe, name)]
        file = save(pipe, parts=["unet", *parts], target_modules="all", words=["ohwx", "ohwx_1"])
        _, clip = load(comfy.make_model(pipe), comfy.make_clip(pipe), file)
        merge_in(pipe, pack, {file: 1.0})
        found, pooled = clip.encode_from_tokens(clip.tokenize("a photo of OHWX mug"), return_pooled=True)
        with torch.no_grad():
            expected = pipe.encode_prompt(
                "a photo of OHWX mug", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
        if len(parts) > 1:
            torch.testing.assert_close(pooled, expected[2], rtol=1e-4, atol=1e-5)

    def test_predictions_are_those_of_the_pipeline(self, pack, save, load):
        pipe = make_pipe(norm_num_groups=32)  # as ComfyUI has it
        file = save(pipe, target_modules="all")
        model, _ = load(comfy.make_model(pipe), comfy.make_clip(pipe), file)
        bare = predict(pipe)
        merge_in(pipe, pack, {file: 1.0})
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        text = embed(pipe, "a photo of ohwx mug")
        model.patch_model(CPU)
        with torch.no_grad():
            found = model.model.diffusion_model(latents, torch.tensor([5.0]), context=text)
        model.unpatch_model(CPU)
        torch.testing.assert_close(found, predict(pipe), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, bare, rtol=1e-2, atol=1e-3)

    def test_low_memory(self, tiny_pipe, save, load):
        """Weights that stay offloaded are patched at each call, and never in place."""
        model, _ = load(comfy.make_model(tiny_pipe), comfy.make_clip(tiny_pipe), save(tiny_pipe))
        expected, changed = patched(model)
        before = weights_of(model)
        model.patch_model(CPU, lowvram_model_memory=1)
        functions = {
            f"{path}.weight": module.weight_function[0]
            for path, module in model.model.named_modules()
            if getattr(module, "weight_function", [])
        }
        assert functions.keys() == set(changed)
        for key, function in functions.items():
            if hasattr(function, "prepare"):  # newer versions copy what a patch has to the device of the weight
                function.prepare(torch.empty(function.memory_required(), dtype=torch.uint8), None)
            torch.testing.assert_close(function(before[key].clone()), expected[key], rtol=0, atol=1e-7)
        model.unpatch_model(CPU)
        assert all(torch.equal(value, before[key]) for key, value in weights_of(model).items())

    def test_comfyui_loads_the_pack(self, pack, monkeypatch):
        nodes = pytest.importorskip("nodes")
        import asyncio

        assert asyncio.run(nodes.load_custom_node(str(PACK)))
        assert {"LoadAtoms", "AtomsTriggerWord"} <= nodes.NODE_CLASS_MAPPINGS.keys()

    @pytest.mark.parametrize("file_format", ["diff", "lora"])
    @pytest.mark.parametrize("kind", ["channel blocks", "attention", "all layers"])
    def test_exports_are_read(self, pipe, pack, tmp_path, kind, file_format):
        """By ComfyUI's own *Load LoRA*: each layer, with the difference that the file holds."""
        from comfy.sd import load_lora_for_models
        from comfyui_atoms import base

        model, clip = comfy.make_model(pipe), comfy.make_clip(pipe)
        parts = ["unet", *(name for name in ENCODERS if hasattr(pipe, name))]
        layers = [(part, path) for part in parts for path in supported_modules(getattr(pipe, part))]
        keys = {**base.unet_keys(model), **base.text_encoder_keys(clip)}
        keys = {layer_name(pipe, part, path): keys[f"{part}.{path}"] for part, path in layers}
        add_adapter(pipe, "mug", AtomConfig(**KINDS[kind]), parts if kind == "all layers" else ["unet"])
        path = tmp_path / "mug.safetensors"
        report = export_diff(pipe, path) if file_format == "diff" else export_lora(pipe, path, rank=4)
        state = load_file(path)
        before = weights_of(model) | weights_of(clip.patcher)
        read, read_clip = load_lora_for_models(model, clip, dict(state), 1.0, 1.0)
        after = patched(read)[0] | patched(read_clip.patcher)[0]
        assert len(report.layers) > 5
        for layer in report.layers:
            change, expected = after[keys[layer.name]] - before[keys[layer.name]], held(state, layer.name)
            torch.testing.assert_close(change, expected.reshape(change.shape), rtol=0, atol=1e-3 * expected.abs().max())


def held(state, name):
    """The difference of a weight that an export holds."""
    if f"{name}.diff" in state:
        return state[f"{name}.diff"].float()
    up, down = (state[f"{name}.lora_{side}.weight"].float().flatten(1) for side in ("up", "down"))
    return up @ down * state[f"{name}.alpha"] / len(down)
