"""Exported folders open with transformers 4 as well, and give checkpoints with tables of the base's size."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPTokenizer

from atomdiff.export.pipeline_folder import export_pipeline
from atomdiff.export.report import describe_export
from atomdiff.pipelines.placeholder_tokens import add_placeholder_tokens, set_token_embedding
from atomdiff.pipelines.portable import _prefix_keys
from atomdiff.training.saving import save_trained

NOT_ASCII = [chr(number) for number in (*range(0xA1, 0xAD), *range(0xAE, 0x100))]  # bytes in a byte-level vocabulary


def whole_vocabulary(tokenizer):
    """A tiny tokenizer, with all bytes and its special tokens last, as CLIP has them."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    first = [token for token in sorted(model["vocab"], key=model["vocab"].get) if "<|" not in token]
    bytes_ = [f"{character}{end}" for end in ("", "</w>") for character in NOT_ASCII]
    tokens = [*first, *bytes_, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge) for merge in model["merges"]], model_max_length=77)


@pytest.fixture(params=["tiny_pipe", "tiny_xl_pipe"])
def pipe(request):
    """A tiny pipeline with trained words that no vocabulary has, one of them of two vectors."""
    pipe = request.getfixturevalue(request.param)
    own, names = pipe.tokenizer, list(encoders(pipe))
    for name in names:
        tokenizer, encoder = whole_vocabulary(own), pipe.components[name]
        ids = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in ("bos", "eos", "pad")}
        config = {**encoder.config.to_dict(), "vocab_size": len(tokenizer), **ids}
        pipe.register_modules(**{name: type(encoder)(type(encoder.config)(**config)).eval()})
        pipe.register_modules(**{name.replace("text_encoder", "tokenizer"): tokenizer})
    words = ["<mug>", "Robo", "ohwx", "ohwx_1"]
    add_placeholder_tokens(pipe, words)
    for word in words:
        set_token_embedding(pipe, word, {name: torch.randn(32) for name in names})
    return pipe


def generate(pipe, prompt):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=1, generator=noise, output_type="latent", height=32, width=32).images


def test_a_folder_has_the_files_and_keys_of_transformers_4(pipe, tmp_path):
    if "feature_extractor" in pipe.components:
        pipe.register_modules(feature_extractor=CLIPImageProcessor())
    folder = export_pipeline(pipe, tmp_path / "merged").path
    for name in [name for name in pipe.components if name.startswith("tokenizer")]:
        vocabulary = json.loads((folder / name / "vocab.json").read_text(encoding="utf-8"))
        merges = (folder / name / "merges.txt").read_text(encoding="utf-8").splitlines()
        assert merges[0] == "#version: 0.2" and all(len(merge.split(" ")) == 2 for merge in merges[1:])
        assert all("".join(merge.split(" ")) in vocabulary for merge in merges[1:])
        added = json.loads((folder / name / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        assert {entry["content"]: int(number) for number, entry in added.items()} == {
            word: vocabulary[word] for word in ("<|startoftext|>", "<|endoftext|>", "<mug>", "Robo", "ohwx", "ohwx_1")
        }
        ours = CLIPTokenizer(str(folder / name / "vocab.json"), str(folder / name / "merges.txt"))
        assert ours("a photo of a cat").input_ids == pipe.tokenizer("a photo of a cat").input_ids
        with safe_open(folder / name.replace("tokenizer", "text_encoder") / "model.safetensors", "pt") as file:
            assert all(key.startswith(("text_model.", "text_projection.")) for key in file.keys())  # noqa: SIM118
    named = {
        value[1] for value in json.loads((folder / "model_index.json").read_text()).values() if type(value) is list
    }
    assert not any(str(name).endswith(("Pil", "Fast")) for name in named)


def test_words_take_places_that_no_text_needs(pipe, tmp_path):
    rows = {name: part.get_input_embeddings().weight for name, part in encoders(pipe).items()}
    before = {name: (row.clone(), pipe.components[name].config.vocab_size) for name, row in rows.items()}
    report = export_pipeline(pipe, tmp_path / "merged")
    assert all(torch.equal(rows[name], row) for name, (row, _) in before.items())
    loaded = DiffusionPipeline.from_pretrained(report.path)
    for name, part in encoders(loaded).items():
        table, tokenizer = part.get_input_embeddings(), getattr(loaded, name.replace("text_encoder", "tokenizer"))
        standard = before[name][1] - 4
        assert table.num_embeddings == len(tokenizer) == part.config.vocab_size == standard == len(rows[name]) - 4
        assert pipe.components[name].config.vocab_size == standard + 4
    for prompt in ("a <mug> on a Robo ohwx", "Über naïve café, ÀÁõö÷øùúûüýþÿ 猫 \U0001f600"):
        torch.testing.assert_close(generate(loaded, prompt), generate(pipe, prompt), atol=1e-5, rtol=0)
    assert not torch.allclose(generate(loaded, "a <mug>"), generate(loaded, "a Robo"), atol=1e-3)
    file = report.embeddings["ohwx"]
    assert file == report.path / "embeddings" / "ohwx.safetensors" and len(report.embeddings) == 3
    assert next(iter(load_file(file).values())).shape == (2, 32)
    assert f"saved {report.path}\n" in describe_export(report)


def encoders(pipe):
    return {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}


def test_more_words_than_places_are_told(tiny_pipe, tmp_path):
    add_placeholder_tokens(tiny_pipe, ["<mug>"])  # its vocabulary has no bytes
    set_token_embedding(tiny_pipe, "<mug>", {"text_encoder": torch.ones(32)})
    report = export_pipeline(tiny_pipe, tmp_path / "merged")
    assert list(report.longer_tables) == ["text_encoder"]
    assert "ComfyUI refuses a checkpoint made of it" in describe_export(report)
    loaded = DiffusionPipeline.from_pretrained(report.path)
    torch.testing.assert_close(generate(loaded, "a <mug>"), generate(tiny_pipe, "a <mug>"), atol=1e-5, rtol=0)


def test_fully_tuned_pipelines_are_saved_so_too(tiny_pipe, tmp_path):
    save_trained(tiny_pipe, None, tmp_path / "tuned")
    assert (tmp_path / "tuned" / "tokenizer" / "merges.txt").is_file()
    with safe_open(tmp_path / "tuned" / "text_encoder" / "model.safetensors", "pt") as file:
        assert "text_model.final_layer_norm.weight" in file.keys()  # noqa: SIM118


def test_keys_get_their_prefix_once(tmp_path):
    tensors = {"embeddings.a": torch.arange(3.0), "text_model.b": torch.arange(4, dtype=torch.int64)}
    file, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    save_file(tensors, file, metadata={"format": "pt"})
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, file.name)}))
    for _ in range(2):
        for each in (file, index):
            _prefix_keys(each)
        found = load_file(file)
        assert sorted(found) == ["text_model.b", "text_model.embeddings.a"]
        assert all(torch.equal(found[f"text_model.{key.removeprefix('text_model.')}"], tensors[key]) for key in tensors)
        assert sorted(json.loads(index.read_text())["weight_map"]) == sorted(found)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
