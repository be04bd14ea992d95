"""The model card says what a concept is, and how to load it."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import ShiraConfig

import atomdiff
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.concepts.push import write_repository
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from tests.fake_hub import card_of
from tests.helpers import predict


def test_the_card_says_what_it_is_and_how_to_load_it(concept, tmp_path):
    file, _ = concept
    folder = write_repository(tmp_path / "repo", file, "ada/mug", license="cc-by-4.0", tags=["mug"])
    assert sorted(item.name for item in folder.iterdir()) == ["README.md", file.name]
    assert (folder / file.name).read_bytes() == file.read_bytes()
    data, text = card_of((folder / "README.md").read_text())
    assert data == {
        "base_model": "someone/stable-diffusion",
        "base_model_relation": "adapter",
        "instance_prompt": "sks mug",
        "library_name": "atomdiff",
        "license": "cc-by-4.0",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "atomdiff", "stable-diffusion", "mug"],
    }
    numbers = sum(
        t.numel() for kinds in read_concept_file(file).layers.values() for k, t in kinds.items() if "delta" in k
    )
    assert f"| trainable parameters | {numbers + 32:,}, of which 32 in token embeddings |" in text
    assert f"| bytes | {file.stat().st_size:,} |" in text
    assert "| training | final loss 0.1235, seed 0, steps 40, learning rate 0.005 |" in text
    assert "Write `sks mug` in a prompt" in text and "<Gallery />" not in text and "{" not in text


@pytest.mark.slow
def test_the_code_of_the_card_runs(hub_server, logged_in, concept, tiny_pipe, monkeypatch):
    file, prediction = concept
    atomdiff.push_to_hub(file, "ada/mug")
    code = re.search("```python\n(.*?)```", hub_server.files("ada/mug")["README.md"].decode(), re.DOTALL)[1]
    called = []

    class Pipe:
        components = tiny_pipe.components

        def __getattr__(self, name):
            return getattr(tiny_pipe, name)

        def __call__(self, prompt):
            called.append((prompt, predict(tiny_pipe, prompt)))
            return type("Output", (), {"images": ["image"]})

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda name: called.append(name) or tiny_pipe)
    monkeypatch.setattr(type(tiny_pipe), "__call__", lambda self, prompt: Pipe()(prompt))
    exec(code, {})
    assert called[0] == "someone/stable-diffusion" and called[1][0] == "a photo of sks mug"
    assert torch.equal(called[1][1], prediction)


def test_names_and_prompts_of_any_script_are_code_in_the_card(concept, tmp_path):
    file = concept[0].rename(concept[0].with_name("tasse \N{HOT BEVERAGE}\N{TEACUP WITHOUT HANDLE}.atoms.safetensors"))
    write_repository(tmp_path / "repo", file, "ada/mug", trigger_phrase='sks "\N{TEACUP WITHOUT HANDLE}"')
    _, text = card_of((tmp_path / "repo" / "README.md").read_text("utf-8"))
    called = re.search(r"load_atoms\(pipe, (.*)\)", text)[1]
    assert eval(f"dict(repo={called})") == {"repo": "ada/mug", "weight_name": file.name}
    assert eval(re.search(r"= pipe\((.*)\)\.images", text)[1]) == 'a photo of sks "\N{TEACUP WITHOUT HANDLE}"'


def test_a_base_of_this_disk_is_no_base_of_the_hub(concept, tiny_pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("samples/toybox-sd").mkdir(parents=True)
    for number, base in enumerate(["samples/toybox-sd", "/home/ada/secret/toybox-sd", "a/b/toybox-sd"]):
        write_repository(f"repo{number}", concept[0], "ada/mug", base_model=base)
        data, text = card_of(Path(f"repo{number}/README.md").read_text())
        assert "base_model" not in data and "base_model_relation" not in data
        assert "for `toybox-sd`" in text and '"path/to/toybox-sd"' in text and "secret" not in text


def test_figures_come_from_the_report_about_this_file_or_are_given(concept, tmp_path):
    file, _ = concept
    report = {"file_bytes": file.stat().st_size, "train_seconds": 86.04, "similarity": {"base": 0.139, "concept": 0.68}}
    (file.parent / "report.json").write_text(json.dumps({**report, "drift": 0.1, "versions": {"torch": "2"}}))
    write_repository(tmp_path / "repo", file, "ada/mug")
    _, text = card_of((tmp_path / "repo" / "README.md").read_text())
    assert "| train seconds | 86.04 |\n| similarity, base | 0.139 |\n| similarity, concept | 0.68 |" in text
    assert "| drift | 0.1 |" in text and "torch" not in text and "file bytes" not in text
    for number, of_another in enumerate(({"file_bytes": 1}, {"file_sha256": "0" * 64})):
        (file.parent / "report.json").write_text(json.dumps({**report, **of_another}))
        write_repository(tmp_path / f"stale{number}", file, "ada/mug")
        assert "similarity" not in (tmp_path / f"stale{number}" / "README.md").read_text()
    write_repository(tmp_path / "given", file, "ada/mug", metrics={"a | b": {"DINO": 0.5}})
    assert r"| a \| b, DINO | 0.5 |" in (tmp_path / "given" / "README.md").read_text()


def test_the_card_of_token_embeddings_alone_names_no_filter_atoms(tiny_pipe, tmp_path):
    add_placeholder_token(tiny_pipe, "sks")
    set_token_embedding(tiny_pipe, "sks", {"text_encoder": torch.zeros(32)})
    file = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", trigger_phrase="sks mug")
    folder = write_repository(tmp_path / "repo", file, "ada/mug")
    text = (folder / "README.md").read_text()
    assert f"made with atomdiff: token embeddings, 32 parameters in {file.stat().st_size:,} bytes." in text
    assert "| method | token embeddings |" in text and "filter atoms" not in text


def test_the_card_of_another_method_counts_what_was_trained(tiny_pipe, tmp_path):
    tiny_pipe.unet.add_adapter(ShiraConfig(r=2, target_modules=["to_q"]))
    trained = sum(parameter.numel() for parameter in tiny_pipe.unet.parameters() if parameter.requires_grad)
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "shira")
    folder = write_repository(tmp_path / "repo", path, "ada/mug")
    assert f"| trainable parameters | {trained:,} |" in (folder / "README.md").read_text()
