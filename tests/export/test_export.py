"""What concepts change, for other programs: named as they name it, as exact as the form allows."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoHaConfig, LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import atomdiff
from atomdiff.bases.architectures import open_architecture
from atomdiff.export import export as export_module
from atomdiff.export.export import ExportConfig, export_concepts
from atomdiff.export.kohya import layer_name, zero_layers
from atomdiff.export.lora import export_lora
from atomdiff.export.lora import low_rank
from atomdiff.export.diff import export_diff
from atomdiff.export.pipeline_folder import export_pipeline
from atomdiff.export.report import describe_export
from atomdiff.pipelines.differences import layer_differences
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import (
    add_placeholder_token,
    add_placeholder_tokens,
    set_token_embedding,
    tokens_in,
)
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.model import supported_modules
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config

ENCODERS = ("text_encoder", "text_encoder_2")
METHODS = {
    "atoms": (
        lambda: AtomConfig(target_modules="all"),
        {f"text_encoder{n}": lambda: AtomConfig(target_modules="all") for n in ("", "_2")},
    ),
    "sparse": (lambda: AtomConfig(basis="sparse", channel_block=1, target_modules=["conv_in", "conv1"]), {}),
    "lora": (
        lambda: LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv2", "proj_in"], init_lora_weights=False),
        {"text_encoder": lambda: LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)},
    ),
    "loha": (lambda: LoHaConfig(r=2, target_modules=["to_k", "conv2"], init_weights=False), {}),
    "ia3": (lambda: IA3Config(target_modules=["to_k", "conv1"], feedforward_modules=[]), {}),
}


def teach(pipe, method="atoms", name="default", seed=0, word=None, size=0.05):
    """Add an adapter with random numbers, and a word, as a training run leaves them."""
    generator = torch.Generator().manual_seed(seed)
    unet, others = METHODS[method]
    for part, config in {"unet": unet, **others}.items():
        model = getattr(pipe, part, None)
        if model is None:
            continue
        model.add_adapter(config(), name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}" in key:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    if word:
        add_placeholder_token(pipe, word)
        vectors = {
            part: torch.randn(model.get_input_embeddings().embedding_dim, generator=generator)
            for part, model in pipeline_models(pipe).items()
            if part.startswith("text_encoder")
        }
        set_token_embedding(pipe, word, vectors)


def draw(pipe, prompt="a photo of ohwx mug"):
    noise = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32} if "XL" in type(pipe).__name__ else {}
    drawn = pipe(prompt, num_inference_steps=2, generator=noise, output_type="latent", **size)
    return drawn.images.float()


def bits(pipe):
    models = pipeline_models(pipe).items()
    return {f"{part}.{key}": value.clone() for part, model in models for key, value in model.state_dict().items()}


def assert_untouched(pipe, before):
    now = bits(pipe)
    assert now.keys() == before.keys() and all(torch.equal(now[key], value) for key, value in before.items())


def fresh(template):
    pipe = copy.deepcopy(template)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sdxl_template(pipe_template):
    """A tiny SDXL pipeline with the block layout of the real one, random."""

    def text(kind, hidden):
        size = {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        known = pipe_template.text_encoder.config
        tokens = {key: getattr(known, key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        return kind(CLIPTextConfig(projection_dim=24, **size, **tokens)).eval()

    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            attention_head_dim=8,
            cross_attention_dim=56,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=24 + 6 * 4,
            norm_num_groups=8,
        )
        pipe = StableDiffusionXLPipeline(
            vae=pipe_template.vae,
            text_encoder=text(CLIPTextModel, 32),
            text_encoder_2=text(CLIPTextModelWithProjection, 24),
            tokenizer=pipe_template.tokenizer,
            tokenizer_2=copy.deepcopy(pipe_template.tokenizer),
            unet=unet.eval(),
            scheduler=DDIMScheduler.from_config(pipe_template.scheduler.config),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_in_diffusers(pipe, report, word="ohwx"):
    if report.path is not None:
        pipe.load_lora_weights(str(report.path))
    for path in [report.embeddings[word]] if report.embeddings else []:
        for key, rows in load_file(path).items():
            number = "_2" if key == "clip_g" else ""
            parts = {part: getattr(pipe, part + number) for part in ("text_encoder", "tokenizer")}
            pipe.load_textual_inversion({word: rows}, token=word, **parts)


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_folder_gives_the_same_images(pipe_template, tmp_path, method):
    pipe = fresh(pipe_template)
    teach(pipe, method, word="ohwx")
    expected, before = draw(pipe), bits(pipe)
    report = export_pipeline(pipe, tmp_path / "merged")
    assert_untouched(pipe, before)
    assert torch.equal(draw(pipe), expected)
    loaded = StableDiffusionPipeline.from_pretrained(report.path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded), expected, atol=1e-4, rtol=0)
    assert not hasattr(loaded.unet, "peft_config") and (draw(pipe_template) - expected).abs().max() > 1e-2
    assert "layer" not in describe_export(report) and str(report.path) in describe_export(report)


def test_a_pipeline_folder_has_the_scheduler_that_the_concepts_were_trained_for(
    pipe_template, tiny_pipe_folder, tmp_path, capsys
):
    pipe, paths = fresh(pipe_template), []
    teach(pipe, "atoms")
    for predicts in ("epsilon", "v_prediction"):
        facts = {"config": {"prediction_type": predicts}}
        paths.append(str(atomdiff.save_atoms(pipe, tmp_path / f"{predicts}.atoms.safetensors", training=facts)))
    export_concepts(ExportConfig(str(tiny_pipe_folder), (paths[0],), "pipeline", f"{tmp_path}/merged", dtype="float32"))
    assert "trained for a DDIMScheduler with prediction_type=epsilon" in capsys.readouterr().out
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "merged", subfolder="scheduler")
    assert scheduler.config.prediction_type == "epsilon"
    export_concepts(ExportConfig(str(tiny_pipe_folder), (paths[1],), "diff", str(tmp_path / "x")))
    assert capsys.readouterr().out == ""
    both = ExportConfig(str(tiny_pipe_folder), tuple(paths), "pipeline", str(tmp_path / "both"))
    with pytest.raises(UserError, match="'epsilon' for a .*, 'v_prediction' for a DDIM.*; export them separately, or"):
        export_concepts(both)
    export_concepts(replace(both, prediction_type="epsilon"))
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "both", subfolder="scheduler")
    assert scheduler.config.prediction_type == "epsilon"


def test_a_file_of_concepts_for_different_schedulers_is_written_and_says_so(
    pipe_template, tiny_pipe_folder, tmp_path, capsys
):
    pipe, paths = fresh(pipe_template), []
    teach(pipe, "atoms")
    for predicts in ("epsilon", "v_prediction"):
        facts = {"config": {"prediction_type": predicts}}
        paths.append(str(atomdiff.save_atoms(pipe, tmp_path / f"{predicts}.atoms.safetensors", training=facts)))
    for to in ("diff", "lora"):
        report = export_concepts(ExportConfig(str(tiny_pipe_folder), tuple(paths), to, str(tmp_path / to)))
        assert report.path.is_file()
        told = capsys.readouterr().out
        assert "'epsilon' for a DDIM" in told and told.endswith("; choose one where you use the file\n")
        with pytest.raises(UserError, match=f"prediction_type='flow': a file of {to} has no scheduler; leave it out"):
            ExportConfig(str(tiny_pipe_folder), tuple(paths), to, str(tmp_path / to), prediction_type="flow")


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_diffusers_generates_a_folder_with_a_flow_concept(pipe_template, sdxl_template, tmp_path, kind):
    pipe = fresh({"sd": pipe_template, "sdxl": sdxl_template}[kind])
    pipe.save_pretrained(tmp_path / "base")
    teach(pipe, "atoms")
    facts = {"config": {"prediction_type": "flow", "flow_shift": 3.0}}
    path = atomdiff.save_atoms(pipe, tmp_path / "mug.atoms.safetensors", training=facts)
    export_concepts(ExportConfig(str(tmp_path / "base"), (str(path),), "pipeline", str(tmp_path / "merged")))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "merged")  # in float32, so that no dtype is needed
    assert {part.dtype for part in pipeline_models(loaded).values()} == {torch.float32}
    assert loaded.scheduler.config.prediction_type == "flow_prediction" and loaded.scheduler.config.flow_shift == 3
    found = draw(loaded)
    pipe.scheduler = loaded.scheduler
    torch.testing.assert_close(draw(pipe), found, atol=1e-3, rtol=0)


def test_a_folder_in_another_precision_says_how_to_open_it(pipe_template, tiny_pipe_folder, tmp_path, capsys):
    pipe = fresh(pipe_template)
    teach(pipe, "atoms")
    path = str(atomdiff.save_atoms(pipe, tmp_path / "mug.atoms.safetensors"))
    config = ExportConfig(str(tiny_pipe_folder), (path,), "pipeline", str(tmp_path / "half"), dtype="float16")
    report = export_concepts(config)
    assert "open it with dtype=torch.float16" in capsys.readouterr().out
    loaded = DiffusionPipeline.from_pretrained(report.path, dtype=torch.float16)
    assert {part.dtype for part in pipeline_models(loaded).values()} == {torch.float16}


def test_a_word_stays_a_word_in_a_folder(pipe_template, tmp_path):
    pipe = fresh(pipe_template)
    teach(pipe, "atoms", word="<my-mug>")
    folder = export_pipeline(pipe, tmp_path / "merged").path
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    assert loaded.tokenizer.tokenize("a <my-mug>") == pipe.tokenizer.tokenize("a <my-mug>")
    assert torch.equal(
        loaded.text_encoder.get_input_embeddings().weight, pipe.text_encoder.get_input_embeddings().weight
    )


def test_a_folder_that_is_in_use_is_not_written_to(tiny_pipe, tiny_pipe_folder):
    teach(tiny_pipe)
    with pytest.raises(UserError, match="exists already"):
        export_pipeline(tiny_pipe, tiny_pipe_folder)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_lora_of_full_rank_gives_the_same_images_in_diffusers(pipe_template, sdxl_template, tmp_path, kind):
    template = {"sd": pipe_template, "sdxl": sdxl_template}[kind]
    pipe = fresh(template)
    teach(pipe, "atoms", word="ohwx", size=0.02)
    expected, before = draw(pipe), bits(pipe)
    report = export_lora(pipe, tmp_path / "mug.safetensors", 1000, dtype=torch.float32)
    assert_untouched(pipe, before)
    assert report.error < 1e-5 and report.path == tmp_path / "mug.safetensors"
    other = fresh(template)
    load_in_diffusers(other, report)
    torch.testing.assert_close(draw(other), expected, atol=2e-3, rtol=0)
    assert (draw(template) - expected).abs().max() > 0.05


@pytest.mark.parametrize("method", ["lora", "loha", "sparse"])
def test_any_method_becomes_a_lora(pipe_template, tmp_path, method):
    pipe = fresh(pipe_template)
    teach(pipe, method)
    expected = draw(pipe)
    report = export_lora(pipe, tmp_path / "x", 4 if method != "sparse" else 1000, dtype=torch.float32)
    assert report.path == tmp_path / "x.safetensors"
    assert report.error < 1e-5 or method == "loha"  # the product of two ranks of 2 has rank 4, too, but not as a kernel
    if method != "loha":
        other = fresh(pipe_template)
        other.load_lora_weights(str(report.path))
        torch.testing.assert_close(draw(other), expected, atol=1e-3, rtol=0)


def test_low_rank_is_the_truncated_svd():
    generator = torch.Generator().manual_seed(0)
    for shape in ((7, 20), (20, 7), (9, 9), (5, 1)):
        matrix = torch.randn(shape, generator=generator)
        for rank in (1, 3, 50):
            up, down = low_rank(matrix, rank)
            kept = min(rank, *shape)
            assert up.shape == (shape[0], kept) and down.shape == (kept, shape[1])
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            best = left[:, :kept] @ torch.diag(values[:kept]) @ right[:kept]
            torch.testing.assert_close(up @ down, best, atol=1e-5, rtol=0)
            torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), atol=1e-5, rtol=0)


def test_low_rank_of_nothing_is_nothing():
    up, down = low_rank(torch.zeros(4, 6), 2)
    assert not (up @ down).any() and torch.isfinite(up).all() and torch.isfinite(down).all()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_error_of_a_low_rank_is_that_of_the_singular_values(rows, columns, rank, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    up, down = low_rank(matrix, rank)
    expected = torch.linalg.svdvals(matrix)[rank:].norm()
    torch.testing.assert_close((matrix - up @ down).norm(), expected, atol=1e-5, rtol=1e-4)


def test_the_reported_error_is_that_of_the_file(pipe_template, tmp_path):
    pipe = fresh(pipe_template)
    teach(pipe)
    wanted = {layer_name(pipe, d.component, d.module): d.parameters["weight"] for d in layer_differences(pipe)}
    report = export_lora(pipe, tmp_path / "x.safetensors", 2)
    file = load_file(report.path)
    assert {layer.name for layer in report.layers} == set(wanted)
    missed, size = 0.0, 0.0
    for layer in report.layers:
        up, down = (file[f"{layer.name}.lora_{side}.weight"].double() for side in ("up", "down"))
        assert layer.rank == len(down) == min(2, len(up), down[0].numel())
        scale = file[f"{layer.name}.alpha"] / len(down)
        found = (scale * up.flatten(1) @ down.flatten(1)).reshape(layer.shape)
        error = float((wanted[layer.name] - found).norm() / wanted[layer.name].norm())
        assert layer.error == pytest.approx(error, rel=1e-4, abs=1e-6)
        missed += float((wanted[layer.name] - found).square().sum())
        size += float(wanted[layer.name].double().square().sum())
    assert report.error == pytest.approx((missed / size) ** 0.5, rel=1e-4) and 0.1 < report.error < 1
    shown = describe_export(report)
    assert f"{len(report.layers)} layers" in shown and "lora_unet_conv_in" in shown and "higher --rank" in shown
    assert "higher --rank" not in describe_export(export_lora(pipe, tmp_path / "x.safetensors", 1000))


def test_a_difference_is_the_whole_difference(pipe_template, tmp_path):
    pipe = fresh(pipe_template)
    teach(pipe, "ia3")
    before = bits(pipe)
    report = export_diff(pipe, tmp_path / "x.safetensors", dtype=torch.float32, trigger_phrase="ohwx mug")
    assert_untouched(pipe, before)
    atomdiff.merge(pipe)
    merged = {path: module for path, module in pipe.unet.named_modules() if hasattr(module, "weight")}
    file = load_file(report.path)
    assert any(key.endswith(".diff_b") for key in file)  # IA3 scales biases
    for path, module in pipe_template.unet.named_modules():
        if (key := f"{layer_name(pipe, 'unet', path)}.diff") in file:
            now = merged[f"{path}.base_layer"]
            assert torch.equal(module.weight + file.pop(key), now.weight)
            if (key_b := f"{key}_b") in file:
                torch.testing.assert_close(module.bias + file.pop(key_b), now.bias)
    assert not file and report.error < 1e-6
    with safe_open(report.path, "pt") as opened:
        facts = opened.metadata()
    assert facts["ss_network_module"] == "lycoris.kohya" and json.loads(facts["ss_network_args"]) == {"algo": "full"}
    assert facts["modelspec.architecture"] == "stable-diffusion/lora" and facts["modelspec.title"] == "x"
    assert facts["modelspec.trigger_phrase"] == "ohwx mug"


def test_biases_that_a_lora_cannot_hold_are_reported(pipe_template, tmp_path):
    pipe = fresh(pipe_template)
    teach(pipe, "ia3")
    report = export_lora(pipe, tmp_path / "x.safetensors")
    assert report.biases_left_out and all("conv1" in name for name in report.biases_left_out)
    assert "has no biases: those of lora_unet_" in describe_export(report)


def test_half_precision_bases_are_exported_as_exactly_as_others(pipe_template, tmp_path):
    pipe = fresh(pipe_template)
    pipe.to(torch.bfloat16)
    wide = fresh(pipe_template)
    wide.to(torch.bfloat16).to(torch.float32)
    files = []
    for each in (pipe, wide):
        teach(each)
        before = bits(each)
        files.append(load_file(export_diff(each, tmp_path / "x.safetensors", dtype=torch.float32).path))
        assert_untouched(each, before)
    for key, value in files[1].items():
        torch.testing.assert_close(files[0][key], value, atol=1e-6, rtol=1e-3)


def test_weights_and_merging_and_what_is_active_count(pipe_template, tmp_path):
    pipe = fresh(pipe_template)
    teach(pipe, name="one")
    teach(pipe, name="two", seed=1)
    pipe.set_adapters(["one", "two"], [0.5, -0.25])
    atomdiff.merge(pipe)
    file = load_file(export_diff(pipe, tmp_path / "x.safetensors", dtype=torch.float32).path)
    assert not any(concept.merged for concept in atomdiff.list_atoms(pipe))
    atomdiff.merge(pipe)
    change = pipe.unet.conv_in.base_layer.weight - pipe_template.unet.conv_in.weight
    torch.testing.assert_close(file["lora_unet_conv_in.diff"], change, atol=1e-6, rtol=0)
    atomdiff.restore(pipe)
    pipe.set_adapters(["one", "two"], [0.0, 0.0])
    with pytest.raises(UserError, match="nothing to export"):
        export_diff(pipe, tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_words_are_files_beside(pipe_template, sdxl_template, tmp_path):
    for template, keys in ((pipe_template, {"emb_params"}), (sdxl_template, {"clip_l", "clip_g"})):
        pipe = fresh(template)
        teach(pipe, word="<sks>")
        report = export_lora(pipe, tmp_path / "mug", 1, dtype=torch.float32)
        assert report.embeddings == {"<sks>": tmp_path / "mug-_sks_.safetensors"}
        rows = load_file(report.embeddings["<sks>"])
        assert rows.keys() == keys
        vector = pipe.text_encoder.get_input_embeddings().weight[-1:]
        assert torch.equal(rows[min(keys & {"emb_params", "clip_l"})], vector)
        assert "embedding:mug-_sks_" in describe_export(report)


def test_a_concept_that_is_only_a_word_is_only_its_embedding(tiny_pipe, tmp_path):
    add_placeholder_token(tiny_pipe, "ohwx")
    set_token_embedding(tiny_pipe, "ohwx", {"text_encoder": torch.ones(32)})
    report = export_lora(tiny_pipe, tmp_path / "mug.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["mug-ohwx.safetensors"]
    assert "mug.safetensors" not in describe_export(report).replace("mug-ohwx.safetensors", "")


def test_a_word_of_several_vectors_is_one_file(pipe_template, sdxl_template, tmp_path):
    for template, keys in ((pipe_template, ["emb_params"]), (sdxl_template, ["clip_l", "clip_g"])):
        pipe = fresh(template)
        add_placeholder_tokens(pipe, ["ohwx", "ohwx_1", "ohwx_2", "<a>", "[a]"])
        for number, word in enumerate(tokens_in(pipe)):
            sizes = {part: getattr(pipe, part).config.hidden_size for part in ENCODERS if hasattr(pipe, part)}
            set_token_embedding(pipe, word, {part: torch.full((n,), float(number)) for part, n in sizes.items()})
        report = export_lora(pipe, tmp_path / "mug", dtype=torch.float32)
        assert {word: file.name for word, file in report.embeddings.items()} == {
            "ohwx": "mug-ohwx.safetensors",
            "<a>": "mug-_a_.safetensors",
            "[a]": "mug-_a_-2.safetensors",  # not the same file
        }
        rows = load_file(report.embeddings["ohwx"])
        assert sorted(rows) == sorted(keys) and all(value[:, 0].tolist() == [0, 1, 2] for value in rows.values())
        other = fresh(template)
        load_in_diffusers(other, SimpleNamespace(embeddings=report.embeddings, path=None), "ohwx")
        pipe.set_progress_bar_config(disable=True)
        torch.testing.assert_close(draw(other), draw(pipe), atol=1e-4, rtol=0)
        assert not torch.allclose(draw(template), draw(pipe), atol=1e-3)


def test_the_lines_of_the_documentation_load_a_word_in_diffusers(pipe_template, sdxl_template, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "exporting.md").read_text()
    lines = [code for code in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "load_textual_inversion" in code]
    monkeypatch.chdir(tmp_path)
    for template, code in zip((pipe_template, sdxl_template), lines, strict=True):
        pipe, other = fresh(template), fresh(template)
        teach(pipe, word="sks")
        file = export_lora(pipe, "out/mug", 1, dtype=torch.float32).embeddings["sks"]
        assert str(file) in code
        exec(code, {"pipe": other})
        for part in ENCODERS[: len(load_file(file))]:
            tokenizer = getattr(other, part.replace("text_encoder", "tokenizer"))
            (token,) = tokenizer("sks", add_special_tokens=False).input_ids
            found = getattr(other, part).get_input_embeddings().weight[token]
            assert torch.equal(found, tokens_in(pipe)["sks"].vectors[part])


def invokeai_width(file):
    """The width by which InvokeAI tells the base: of the first keys that it looks at."""
    widths = {}
    for key, tensor in sorted(file.items()):
        stem, kind = key.split(".", 1)
        if kind not in ("diff", "lora_down.weight"):
            continue
        if stem.startswith("lora_unet_") and stem.endswith(("_attn2_to_k", "_attn2_to_v")):
            return tensor.shape[1]
        if stem.endswith("time_emb_proj") and kind == "lora_down.weight":
            return tensor.shape[1]
        if stem.startswith("lora_te") and "_self_attn_" in stem:
            widths[stem[:8]] = tensor.shape[1]
        if "lora_te_" in widths or len(widths) == 2:
            return sum(widths.values())
    return None


@pytest.mark.parametrize("form", [export_diff, export_lora])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_base_of_every_file_is_known_by_its_cross_attention(pipe_template, sdxl_template, tmp_path, kind, form):
    template = {"sd": pipe_template, "sdxl": sdxl_template}[kind]
    width = template.unet.config.cross_attention_dim
    for part, targets in {
        "unet": ["conv_in", "conv1"],
        "text_encoder": ["fc1"],
        "text_encoder_2": ["self_attn.q_proj", "text_projection"],
    }.items():
        pipe = fresh(template)
        if not hasattr(pipe, part):
            continue
        model = getattr(pipe, part)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        report = form(pipe, tmp_path / "x", dtype=torch.float32)
        file = load_file(report.path)
        assert invokeai_width(file) == width
        added = {key for key in file if key.split(".")[0] not in {layer.name for layer in report.layers}}
        names = {key.split(".")[0] for key in added if "attn2_to_k" in key}
        assert len(names) == 1 and not any(file[key].any() for key in added if not key.endswith(".alpha"))
        if form is export_lora and kind == "sd":  # and diffusers loads it all the same
            other = fresh(template)
            other.load_lora_weights(str(report.path))
            pipe.set_progress_bar_config(disable=True)
            torch.testing.assert_close(draw(other, "a mug"), draw(pipe, "a mug"), atol=1e-3, rtol=0)


@pytest.mark.parametrize("form", [export_diff, export_lora])
def test_an_attention_of_a_text_encoder_is_whole(sdxl_template, tmp_path, form):
    pipe = fresh(sdxl_template)
    targets = ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]  # what PEFT trains by default
    pipe.text_encoder_2.add_adapter(LoraConfig(r=1, target_modules=targets, init_lora_weights=False))
    report = form(pipe, tmp_path / "x")
    file = load_file(report.path)
    names = {key.split(".")[0] for key in file if key.startswith("lora_te")}
    attention = "lora_te2_text_model_encoder_layers_1_self_attn"
    assert names == {f"{attention}_{part}_proj" for part in ("q", "k", "v", "out")}
    trained = {layer.name for layer in report.layers}
    assert trained == {f"{attention}_{part}_proj" for part in ("q", "v")}
    kept = {key: tensor for key, tensor in file.items() if not key.endswith(".alpha")}
    assert not any(kept[key].any() for key in kept if key.split(".")[0] not in trained)


@pytest.mark.parametrize(("architecture", "width"), [("sd-1.5", 768), ("sd-2.1", 1024), ("sdxl", 2048)])
def test_files_for_the_real_architectures_are_known(architecture, width):
    unet = open_architecture(architecture)
    pipe = SimpleNamespace(unet=unet, components={"unet": unet})
    layers = supported_modules(unet)
    for ends in (("conv_in",), ("conv1", "conv2"), ("conv1", "time_emb_proj"), ("up_blocks.1.resnets.0.conv1",)):
        names = {layer_name(pipe, "unet", path): layers[path].weight for path in layers if path.endswith(ends)}
        diff = {f"{name}.diff": weight for name, weight in names.items()}
        lora = {f"{name}.lora_down.weight": weight[:1] for name, weight in names.items()}
        for file in (diff, lora):
            assert invokeai_width(file) != width
            assert invokeai_width(file | zero_layers(pipe, file, 1.0)) == width


def test_what_programs_do_not_read_is_reported(sdxl_template, tmp_path):
    pipe = fresh(sdxl_template)
    targets = ["conv_in", "conv_out", "linear_1", "linear_2", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=1, target_modules=targets, init_lora_weights=False))
    targets = ["fc1", "text_projection"]
    pipe.text_encoder_2.add_adapter(LoraConfig(r=1, target_modules=targets, init_lora_weights=False))
    report = export_lora(pipe, tmp_path / "x", 1)
    kohya = set(report.unread.pop("kohya's merge_lora"))
    assert kohya == {
        f"lora_unet_{name}"
        for name in (
            "input_blocks_0_0",
            "out_2",
            *(f"{part}_{number}" for part in ("time_embed", "label_emb_0") for number in (0, 2)),
        )
    } | {"lora_te2_text_projection"}
    assert report.unread == {"Stable Diffusion WebUI": ("lora_te2_text_projection",)}
    shown = describe_export(report)
    assert "Stable Diffusion WebUI does not read lora_te2_text_projection" in shown
    shown = describe_export(export_diff(pipe, tmp_path / "x"))
    assert "kohya's merge_lora does not read the file: it reads LoRAs only" in shown


def convert(keys, config):
    """The layers that diffusers takes a kohya file's keys for."""
    tensors = {f"{key}.lora_{side}.weight": torch.zeros(1) for key in keys for side in ("down", "up")}
    found, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(tensors, config))
    names = {name.removeprefix("unet.").split(".lora.")[0] for name in found}
    names = {name.partition("_lora.")[0].replace(".processor", "") for name in names}
    return {f"{name}.0" if name.endswith("to_out") else name for name in names}


@pytest.mark.parametrize("architecture", ["sd-1.5", "sd-2.1", "sdxl"])
def test_diffusers_finds_every_layer_of_the_real_architectures(architecture):
    unet = open_architecture(architecture)
    layers = set(supported_modules(unet))

    class Pipe:
        components = {"unet": unet}

    Pipe.unet = unet
    names = {module: layer_name(Pipe, "unet", module) for module in layers}
    assert len(set(names.values())) == len(layers)
    assert convert(names.values(), unet.config) == layers


def test_sdxl_layers_have_the_names_of_the_original_code():
    class Pipe:
        unet = open_architecture("sdxl")

    Pipe.components = {"unet": Pipe.unet}
    expected = {  # as in files trained by sd-scripts
        "conv_in": "input_blocks_0_0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0": (
            "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0"
        ),
        "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.1.resnets.2.time_emb_proj": "output_blocks_5_0_emb_layers_1",
        "up_blocks.2.resnets.2.conv1": "output_blocks_8_0_in_layers_2",
        "conv_out": "out_2",
    }
    assert {module: layer_name(Pipe, "unet", module) for module in expected} == {
        module: f"lora_unet_{name}" for module, name in expected.items()
    }
    with pytest.raises(UserError, match="no name"):
        layer_name(Pipe, "unet", "something.else")


def test_grouped_and_depthwise_layers_merge_exactly(tiny_pipe, tmp_path):
    for name, groups in (("a", 4), ("b", 8), ("c", 1)):
        tiny_pipe.unet.add_module(f"extra_{name}", nn.Conv2d(8, 8, 3, groups=groups))
    tiny_pipe.unet.add_module("extra_linear", nn.Linear(6, 5))
    names = [f"extra_{name}" for name in ("a", "b", "c", "linear")]
    tiny_pipe.unet.add_adapter(AtomConfig(channel_block=1, target_modules=names))
    for layer in names:
        nn.init.normal_(getattr(tiny_pipe.unet, layer).atom_delta["default"])
    wanted = {f"lora_unet_{d.module}": d.parameters["weight"] for d in layer_differences(tiny_pipe)}
    report = export_lora(tiny_pipe, tmp_path / "x", 100, dtype=torch.float32)
    file = load_file(report.path)
    assert len(report.layers) == 4 and report.error < 1e-6
    assert {layer.name: layer.rank for layer in report.layers} == {
        "lora_unet_extra_a": 8,
        "lora_unet_extra_b": 8,
        "lora_unet_extra_c": 8,
        "lora_unet_extra_linear": 5,
    }
    for name, weight in wanted.items():
        up, down = (file[f"{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        scale = file[f"{name}.alpha"] / up.shape[1]
        torch.testing.assert_close((scale * up @ down).reshape(weight.shape), weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pipe: pipe.vae.add_module("extra", nn.Linear(4, 4)) or ("vae", ["extra"]), "vae.extra"),
        (lambda pipe: pipe.unet.add_module("extra", nn.ConvTranspose2d(4, 4, 3)) or ("unet", ["extra"]), "transposed"),
    ],
)
def test_what_has_no_form_in_such_a_file_is_refused(tiny_pipe, tmp_path, change, said):
    part, names = change(tiny_pipe)
    model = getattr(tiny_pipe, part)
    model.add_adapter(AtomConfig(target_modules=names, channel_block=2), "x")
    nn.init.normal_(next(p for key, p in model.named_parameters() if "_delta.x" in key))
    with pytest.raises(UserError, match=said):
        export_lora(tiny_pipe, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_modules_taken_over_as_a_whole_are_refused(tiny_pipe, tmp_path):
    tiny_pipe.unet.add_adapter(AtomConfig(modules_to_save=["conv_out"]))
    for export in (export_lora, export_diff, export_pipeline):
        with pytest.raises(UserError, match="conv_out as a whole"):
            export(tiny_pipe, tmp_path / "x")


def test_numbers_that_half_precision_cannot_hold_are_refused(tiny_pipe, tmp_path):
    teach(tiny_pipe, size=1e6)
    with pytest.raises(UserError, match="too large for torch.float16"):
        export_diff(tiny_pipe, tmp_path / "x")
    with pytest.raises(UserError, match="rank=0"):
        export_lora(tiny_pipe, tmp_path / "x", 0)


@pytest.fixture
def concepts(pipe_template, tmp_path):
    """Two concept files with a word each."""
    paths = []
    for seed, word in enumerate(["sks", "ohwx"]):
        pipe = fresh(pipe_template)
        teach(pipe, seed=seed, word=word)
        path = tmp_path / f"{word}.atoms.safetensors"
        paths.append(str(atomdiff.save_atoms(pipe, path, dtype=torch.float32, trigger_phrase=f"{word} mug")))
    return paths


@pytest.mark.parametrize("to", ["pipeline", "diff", "lora"])
def test_files_are_exported_with_their_weights(pipe_template, tiny_pipe_folder, concepts, tmp_path, to):
    config = ExportConfig(
        str(tiny_pipe_folder), tuple(concepts), to, str(tmp_path / "out"), 1000, "float32", weights=(0.5, 0.25)
    )
    report = export_concepts(config)
    pipe = fresh(pipe_template)
    names = [atomdiff.load_atoms(pipe, path) for path in concepts]
    pipe.set_adapters(names, [0.5, 0.25])
    expected = draw(pipe, "a sks ohwx mug")
    if to == "diff":
        atomdiff.merge(pipe)
        change = pipe.unet.conv_in.base_layer.weight - pipe_template.unet.conv_in.weight
        torch.testing.assert_close(load_file(report.path)["lora_unet_conv_in.diff"], change, atol=1e-6, rtol=0)
        assert list(report.embeddings) == ["sks", "ohwx"]
        return
    if to == "pipeline":
        other = StableDiffusionPipeline.from_pretrained(report.path)
    else:
        other = fresh(pipe_template)
        other.load_lora_weights(str(report.path))
        with safe_open(report.path, "pt") as file:
            assert file.metadata()["modelspec.trigger_phrase"] == "sks mug, ohwx mug"
        for word, path in report.embeddings.items():  # sks is a known word here, which diffusers would not overwrite
            add_placeholder_token(other, word)
            set_token_embedding(other, word, {"text_encoder": load_file(path)["emb_params"][0]})
    other.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(other, "a sks ohwx mug"), expected, atol=1e-3, rtol=0)


def test_mistakes_in_a_config_are_reported(tiny_pipe_folder, concepts, tmp_path):
    base = str(tiny_pipe_folder)
    for wrong, said in [
        ({"concepts": ()}, "no concept"),
        ({"weights": ("much", 1.0)}, "found the adapter weight 'much'"),
        ({"weights": ({"steps": {0: 1, 1: 0.5}}, 1.0)}, "weights: steps=.* cannot be exported; leave steps out"),
        ({"weights": (1.0,)}, "1 weights for 2 concepts"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 10**30}, "rank=10+: expected 1 to 65536"),
        ({"weights": (0, {"weight": 0.0})}, "weights: all are 0, so there is nothing to export"),
    ]:
        with pytest.raises(UserError, match=said):
            ExportConfig(
                **{"pretrained_model_name_or_path": base, "concepts": tuple(concepts), "to": "lora", "output": "x"}
                | wrong
            )
    with pytest.raises(UserError, match="cannot be loaded"):
        export_concepts(ExportConfig(str(tmp_path), tuple(concepts), "lora", "x"))
    with pytest.raises(UserError, match="there is no file or directory 'none'"):
        export_concepts(ExportConfig(base, ("none",), "lora", "x"))


def test_weights_go_by_block_as_in_sampling(pipe_template, tiny_pipe_folder, concepts, tmp_path):
    weights = ({"weight": 0.5, "blocks": {"down": 0.25, "mid": 0}}, 0.75)
    options = ["--pretrained_model_name_or_path", str(tiny_pipe_folder), "--concepts", *concepts, "--to", "diff"]
    options += ["--output", str(tmp_path / "out"), "--dtype", "float32", "--weights", *map(json.dumps, weights)]
    config = parse_config(ExportConfig, options)
    assert config.weights == weights
    file = load_file(export_concepts(config).path)
    pipe = fresh(pipe_template)
    names = [atomdiff.load_atoms(pipe, path) for path in concepts]
    atomdiff.set_active(pipe, dict(zip(names, weights, strict=True)))
    for path in ("conv_in", "down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1"):
        change = pipe.unet.get_submodule(path).base_layer.weight - pipe_template.unet.get_submodule(path).weight
        torch.testing.assert_close(file[f"{layer_name(pipe, 'unet', path)}.diff"], change, atol=1e-6, rtol=0)


def test_other_methods_are_weighted_as_far_as_they_can(pipe_template, tiny_pipe_folder, tmp_path):
    base = str(tiny_pipe_folder)
    for method, weight, said in [
        ("lora", {"blocks": {"down": 0.5}}, "only those can be weighted by block"),
        ("ia3", 0.5, "gives no weight such as 0.5"),
    ]:
        pipe = fresh(pipe_template)
        teach(pipe, method)
        folder = str(atomdiff.save_atoms(pipe, tmp_path / method))
        with pytest.raises(UserError, match=said):
            export_concepts(ExportConfig(base, (folder,), "diff", "x", weights=(weight,)))
        assert export_concepts(ExportConfig(base, (folder,), "diff", str(tmp_path / f"{method}-out"))).layers


def test_bases_in_half_precision_are_not_loaded_wider_than_they_are(pipe_template, tmp_path, monkeypatch):
    half = fresh(pipe_template)
    half.to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    half.to(torch.float32)
    half.save_pretrained(tmp_path / "wide")
    opened = []
    real = export_module.open_base
    monkeypatch.setattr(export_module, "open_base", lambda *args, **kw: opened.append(real(*args, **kw)) or opened[-1])
    for method in ("atoms", "sparse", "lora", "loha"):
        pipe = fresh(pipe_template)
        teach(pipe, method, word="ohwx", seed=3)
        concept = str(atomdiff.save_atoms(pipe, tmp_path / f"{method}.atoms.safetensors", dtype=torch.float32))
        files = {}
        for base in ("half", "wide"):
            config = ExportConfig(str(tmp_path / base), (concept,), "diff", str(tmp_path / "out"), dtype="float32")
            report = export_concepts(config)
            files[base] = load_file(report.path) | load_file(report.embeddings["ohwx"])
        for key, value in files["wide"].items():
            torch.testing.assert_close(files["half"][key], value, atol=2e-6, rtol=2e-4)
        from_half, _ = opened
        opened.clear()
        adapted = {part.get_submodule(path) for part in (from_half.unet,) for path in ("time_embedding.linear_1",)}
        assert {layer.weight.dtype for layer in adapted} == {torch.float16}  # no method above changes it but atoms
        assert from_half.vae.dtype == torch.float16


def test_a_lone_word_needs_no_base(pipe_template, sdxl_template, tmp_path):
    for template in (pipe_template, sdxl_template):
        pipe = fresh(template)
        words = ["ohwx", "ohwx_1"]
        add_placeholder_tokens(pipe, words)
        sizes = {part: getattr(pipe, part).config.hidden_size for part in ENCODERS if hasattr(pipe, part)}
        for word in words:
            set_token_embedding(pipe, word, {part: torch.randn(size) for part, size in sizes.items()})
        file = str(atomdiff.save_atoms(pipe, tmp_path / "word.atoms.safetensors", dtype=torch.float32))
        expected = load_file(export_lora(pipe, tmp_path / "x", dtype=torch.float32).embeddings["ohwx"])
        config = ExportConfig("no/such/base", (file,), "lora", str(tmp_path / "y"), dtype="float32")
        report = export_concepts(config)
        assert not report.layers and not report.path.exists() and "embedding:y-ohwx" in describe_export(report)
        found = load_file(report.embeddings["ohwx"])
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        report = export_concepts(replace(config, trigger_words=("zzz",)))
        assert report.embeddings["zzz"].name == "y-zzz.safetensors" and len(load_file(report.embeddings["zzz"])) == len(
            found
        )


def test_outputs_that_are_in_the_way_are_refused_before_anything_is_loaded(concepts, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "open_base", None)
    (tmp_path / "used.safetensors").mkdir()
    (tmp_path / "used.safetensors" / "x").touch()
    file = concepts[0]
    for base, to, output, said in [
        ("base", "pipeline", str(tmp_path), "exists already: give a new or empty folder"),
        ("base", "pipeline", file, "exists already: give a new or empty folder"),
        ("base", "diff", str(tmp_path / "used"), "is a folder: give the name of a file"),
        ("base", "lora", file, "is also an input: give another name"),
        (file, "lora", file.removesuffix(".safetensors"), "is also an input: give another name"),
    ]:
        with pytest.raises(UserError, match=said):
            export_concepts(ExportConfig(base, (concepts[0],), to, output))


def test_a_lora_of_another_program_is_exported_as_it_draws(pipe_template, tiny_pipe_folder, tmp_path):
    pipe = fresh(pipe_template)
    teach(pipe, "lora")
    lora = str(export_lora(pipe, tmp_path / "kohya", 2, dtype=torch.float32).path)
    expected = load_file(export_diff(pipe, tmp_path / "expected", dtype=torch.float32).path)
    config = ExportConfig(str(tiny_pipe_folder), (lora,), "diff", str(tmp_path / "again"), dtype="float32")
    found = load_file(export_concepts(config).path)
    for key in expected.keys() | found.keys():
        if key.endswith(".diff"):
            torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-4)
    folder = export_concepts(replace(config, to="pipeline", output=str(tmp_path / "merged"))).path
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded, "a mug"), draw(pipe, "a mug"), atol=1e-4, rtol=0)
