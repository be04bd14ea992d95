"""Token embeddings of trigger words in files beside an export."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file

import atomdiff
from atomdiff.export.embeddings import active_embeddings
from atomdiff.export.export import ExportConfig, export_concepts
from atomdiff.export.lora import export_lora
from atomdiff.export.report import describe_export
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import add_placeholder_tokens, set_token_embedding, tokens_in
from tests.export.helpers import add_random_adapter, copy_of, generate_latents, load_textual_inversion
from tests.helpers import assert_same_tensors


def add_tokens(pipe, tokens):
    """Add placeholder tokens whose embeddings are 0, 1, 2, ... in all places."""
    sizes = {part: model.config.hidden_size for part, model in pipeline_models(pipe).items() if "text_encoder" in part}
    add_placeholder_tokens(pipe, tokens)
    for number, token in enumerate(tokens):
        set_token_embedding(pipe, token, {part: torch.full((n,), float(number)) for part, n in sizes.items()})


@pytest.mark.slow
def test_words_are_files_beside(pipe_template, sdxl_template, tmp_path):
    for template, keys in ((pipe_template, {"emb_params"}), (sdxl_template, {"clip_l", "clip_g"})):
        pipe = copy_of(template)
        add_random_adapter(pipe, word="<sks>")
        report = export_lora(pipe, tmp_path / "mug", 1, dtype=torch.float32)
        assert report.embeddings == {"<sks>": tmp_path / "mug-_sks_.safetensors"}
        rows = load_file(report.embeddings["<sks>"])
        assert rows.keys() == keys
        vector = pipe.text_encoder.get_input_embeddings().weight[-1:]
        assert torch.equal(rows[min(keys & {"emb_params", "clip_l"})], vector)
        assert "embedding:mug-_sks_" in describe_export(report)


def test_a_concept_that_is_only_a_word_is_only_its_embedding(tiny_pipe, tmp_path):
    add_tokens(tiny_pipe, ["ohwx"])
    report = export_lora(tiny_pipe, tmp_path / "mug.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["mug-ohwx.safetensors"]
    assert "mug.safetensors" not in describe_export(report).replace("mug-ohwx.safetensors", "")


@pytest.mark.slow
def test_words_of_concepts_that_are_not_active_are_left_out(tiny_pipe, concepts):
    one, two = (atomdiff.load_atoms(tiny_pipe, path) for path in concepts)
    for active, words in (({one: 1, two: 1}, ["sks", "ohwx"]), ({two: 0.5}, ["ohwx"])):
        atomdiff.set_active(tiny_pipe, active)
        assert list(active_embeddings(tiny_pipe)) == words


def test_an_embedding_that_was_never_set_is_read_where_it_is_offloaded(sdxl_template):
    pipe = copy_of(sdxl_template)
    add_placeholder_tokens(pipe, ["ohwx"])
    set_token_embedding(pipe, "ohwx", {"text_encoder": torch.ones(pipe.text_encoder.config.hidden_size)})
    expected = active_embeddings(pipe)["ohwx"]
    cpu_offload(pipe.text_encoder_2, torch.device("cpu"))
    assert pipe.text_encoder_2.get_input_embeddings().weight.is_meta
    assert_same_tensors(active_embeddings(pipe)["ohwx"], expected)


@pytest.mark.slow
def test_a_word_of_several_vectors_is_one_file(pipe_template, sdxl_template, tmp_path):
    for template, keys in ((pipe_template, ["emb_params"]), (sdxl_template, ["clip_l", "clip_g"])):
        pipe = copy_of(template)
        add_tokens(pipe, ["ohwx", "ohwx_1", "ohwx_2", "<a>", "[a]"])
        report = export_lora(pipe, tmp_path / "mug", dtype=torch.float32)
        assert {word: file.name for word, file in report.embeddings.items()} == {
            "ohwx": "mug-ohwx.safetensors",
            "<a>": "mug-_a_.safetensors",
            "[a]": "mug-_a_-2.safetensors",  # not the same file
        }
        rows = load_file(report.embeddings["ohwx"])
        assert sorted(rows) == sorted(keys) and all(value[:, 0].tolist() == [0, 1, 2] for value in rows.values())
        other = copy_of(template)
        load_textual_inversion(other, "ohwx", report.embeddings["ohwx"])
        torch.testing.assert_close(generate_latents(other), generate_latents(pipe), atol=1e-4, rtol=0)
        assert not torch.allclose(generate_latents(template), generate_latents(pipe), atol=1e-3)


@pytest.mark.slow
def test_the_lines_of_the_documentation_load_a_word_in_diffusers(pipe_template, sdxl_template, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "exporting.md").read_text()
    lines = [code for code in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "load_textual_inversion" in code]
    monkeypatch.chdir(tmp_path)
    for template, code in zip((pipe_template, sdxl_template), lines, strict=True):
        pipe, other = copy_of(template), copy_of(template)
        add_random_adapter(pipe, word="sks")
        file = export_lora(pipe, "out/mug", 1, dtype=torch.float32).embeddings["sks"]
        assert str(file) in code
        exec(code, {"pipe": other})
        for part in ["text_encoder", "text_encoder_2"][: len(load_file(file))]:
            tokenizer = getattr(other, part.replace("text_encoder", "tokenizer"))
            (token,) = tokenizer("sks", add_special_tokens=False).input_ids
            found = getattr(other, part).get_input_embeddings().weight[token]
            assert torch.equal(found, tokens_in(pipe)["sks"].vectors[part])


def test_a_lone_word_needs_no_base(pipe_template, sdxl_template, tmp_path):
    for template in (pipe_template, sdxl_template):
        pipe = copy_of(template)
        add_tokens(pipe, ["ohwx", "ohwx_1"])
        file = str(atomdiff.save_atoms(pipe, tmp_path / "word.atoms.safetensors", dtype=torch.float32))
        expected = load_file(export_lora(pipe, tmp_path / "x", dtype=torch.float32).embeddings["ohwx"])
        config = ExportConfig("no/such/base", (file,), "lora", str(tmp_path / "y"), dtype="float32")
        report = export_concepts(config)
        assert not report.layers and not report.path.exists() and "embedding:y-ohwx" in describe_export(report)
        found = load_file(report.embeddings["ohwx"])
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        report = export_concepts(replace(config, trigger_words=("zzz",)))
        file = report.embeddings["zzz"]
        assert file.name == "y-zzz.safetensors" and load_file(file).keys() == found.keys()
