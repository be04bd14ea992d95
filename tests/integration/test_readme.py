import re
import shlex
from pathlib import Path

import pytest

from atomdiff.classify.config import load_config as load_classifier_config
from atomdiff.cli.demo import DemoConfig
from atomdiff.cli.main import main
from atomdiff.export.export import ExportConfig
from atomdiff.export.extract import ExtractConfig
from atomdiff.sampling.config import SampleConfig
from atomdiff.training.dreambooth import load_config
from atomdiff.utils.options import parse_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CONCEPT = "out/demo/mug.atoms.safetensors"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


@pytest.fixture
def concept(tmp_path, monkeypatch):
    """A concept file of the real base where the README's demo leaves its own."""
    import atomdiff
    from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
    from atomdiff.toybox.base import load_toybox

    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    pipe = load_toybox()
    add_placeholder_token(pipe, "sks")
    set_token_embedding(pipe, "sks", {"text_encoder": pipe.text_encoder.get_input_embeddings().weight[5].detach()})
    pipe.unet.add_adapter(atomdiff.AtomConfig(), "default")
    Path(CONCEPT).parent.mkdir(parents=True)
    atomdiff.save_atoms(pipe, CONCEPT, "default", trigger_phrase="sks mug", base_model="samples/toybox-sd")
    return CONCEPT


def test_make_commands_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [command[1] for command in commands() if command[0] == "make"]
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_every_command_is_accepted(concept, tmp_path, capsys):
    (tmp_path / "my-photos").mkdir()
    seen = set()
    for words in commands():
        if words[0] == "make":
            continue
        verb = Path(words[2]).stem if words[0] == "accelerate" else words[1]
        options = words[3:] if words[0] == "accelerate" else words[2:]
        seen.add(verb)
        if words[0] == "accelerate":
            assert (ROOT / words[2]).is_file()
            {"train_dreambooth": load_config, "train_classifier": load_classifier_config}[verb](options)
        elif verb == "sample":
            parse_config(SampleConfig, options)
        elif verb == "demo":
            parse_config(DemoConfig, options)
        elif verb == "export":
            parse_config(ExportConfig, options)
        elif verb == "extract":
            (tmp_path / "out" / "tuned").mkdir()
            parse_config(ExtractConfig, options)
        else:
            assert verb == "inspect"
            main([verb, *options])
            assert ("sks mug" if CONCEPT in options else "17,524") in capsys.readouterr().out
    assert seen == {"train_dreambooth", "train_classifier", "sample", "demo", "inspect", "export", "extract"}


def test_the_python_of_the_readme_runs(concept):
    (code,) = blocks("python")
    code = code.replace(").images", ", num_inference_steps=1).images")
    names = {}
    exec(code, names)
    assert names["images"][0].size == (64, 64)
    assert not names["atomdiff"].list_atoms(names["pipe"])


def test_files_the_readme_names_are_there():
    for path in re.findall(r"(?:samples|configs|benchmarks|train_scripts)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path
