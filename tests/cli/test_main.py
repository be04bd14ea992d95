"""`atomdiff <verb>`: what is printed, exit statuses, and the verbs from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import atomdiff
from atomdiff.cli.main import VERBS, main
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.sampling import sample
from atomdiff.training import dreambooth
from atomdiff.utils.errors import UserError

ROOT = Path(__file__).parents[2]


def test_without_a_verb_the_verbs_are_listed(capsys):
    assert main([]) == 2
    assert "  train " in capsys.readouterr().err
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in ("train", "sample", "inspect", "similar", "export", "extract", "demo"))
    assert main(["paint"]) == 2


@pytest.mark.parametrize("verb", ["train", "sample", "inspect", "similar", "average", "export", "extract", "demo"])
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: atomdiff {verb}" in capsys.readouterr().out


def test_sample_draws_and_says_where(tiny_pipe_folder, tmp_path, capfd):
    options = ["--pretrained_model_name_or_path", str(tiny_pipe_folder), "--output_dir", str(tmp_path / "out")]
    options += ["--prompts", "a red mug", "a cat", "--seeds", "0", "1", "--num_inference_steps", "1"]
    assert main(["sample", *options]) == 0
    shown = capfd.readouterr()
    assert shown.out == f"the images, grid.png and manifest.json are in {tmp_path / 'out'}\n"
    assert [line.split(" (")[0] for line in shown.err.splitlines()] == ["precision: float32", "generating: 4 images"]
    assert len(list((tmp_path / "out").glob("*-seed*.png"))) == 4


def test_inspect_shows_a_file(tiny_pipe, tiny_pipe_folder, tmp_path, capsys):
    tiny_pipe.unet.add_adapter(atomdiff.AtomConfig(target_modules=["conv1"]))
    path = str(atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", trigger_phrase="sks mug"))
    assert main(["inspect", path, "--base", str(tiny_pipe_folder)]) == 0
    shown = capsys.readouterr().out
    assert "sks mug" in shown and "distance" in shown


def test_inspect_counts_an_adapter_on_an_architecture(tmp_path, capsys):
    (tmp_path / "adapter.json").write_text('{"peft_type": "ATOMS", "channel_block": 1}')
    assert main(["inspect", "--base", "resnet-50", "--config", str(tmp_path / "adapter.json")]) == 0
    shown = capsys.readouterr().out
    assert "25,557,032" in shown and "3,697 parameters (0.0145 %" in shown
    assert main(["inspect"]) == 2 and main(["inspect", "--config", "atoms"]) == 2
    assert "such as sd-1.5" in capsys.readouterr().err


@pytest.mark.slow
def test_a_concept_is_exported_and_extracted_again(tiny_pipe, tiny_pipe_folder, tmp_path, capsys):
    tiny_pipe.unet.add_adapter(atomdiff.AtomConfig(target_modules=["conv_in"]))
    add_placeholder_token(tiny_pipe, "ohwx")
    set_token_embedding(tiny_pipe, "ohwx", {"text_encoder": torch.ones(32)})
    torch.nn.init.normal_(tiny_pipe.unet.conv_in.atom_delta["default"], std=0.1)
    path = str(atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", dtype=torch.float32))
    base = ["--pretrained_model_name_or_path", str(tiny_pipe_folder)]
    assert main(["export", *base, "--concepts", path, "--to", "lora", "--rank", "4", "--output", f"{tmp_path}/l"]) == 0
    shown = capsys.readouterr().out
    assert "lora_unet_conv_in" in shown and "1 layers, relative error" in shown
    assert f"saved {tmp_path}/l.safetensors\nsaved {tmp_path}/l-ohwx.safetensors, the embedding of 'ohwx'" in shown
    folder = str(tmp_path / "merged")
    options = ["--to", "pipeline", "--dtype", "float32", "--output", folder]
    assert main(["export", *base, "--concepts", path, *options]) == 0
    assert capsys.readouterr().out.startswith(f"saved {folder}\n")
    assert main(["extract", *base, "--tuned", folder, "--output", f"{tmp_path}/again.atoms.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "explained: 1.0000 of the squared difference of 1 layers" in shown and "tensors of the text_encoder" in shown
    assert (tmp_path / "again.atoms.safetensors").is_file()
    assert main(["export", *base, "--concepts", path, *options]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["extract", *base, "--tuned", str(tiny_pipe_folder), "--output", "x"]) == 2
    assert "same parameters as the base" in capsys.readouterr().err


def test_train_hands_its_config_over(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(dreambooth, "train", lambda config: seen.append(config) or Path("out/mug.atoms.safetensors"))
    options = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "photos", "--class_name", "mug"]
    assert main(["train", *options, "--max_train_steps", "7"]) == 0
    assert (seen[0].class_name, seen[0].max_train_steps) == ("mug", 7)
    assert capsys.readouterr().out == "saved out/mug.atoms.safetensors\n"


def test_demo_says_where_things_are_and_how_to_use_them(tiny_pipe, monkeypatch, tmp_path, capsys):
    tiny_pipe.unet.add_adapter(atomdiff.AtomConfig(target_modules=["conv1"]))
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", trigger_phrase="sks mug")
    report = {
        "similarity": {"base": 0.1, "concept": 0.7, "real": None},
        "scene_accuracy": {"base": 1.0, "concept": 0.95},
        **{
            "drift": 0.138,
            "file_bytes": 12345,
            "num_trainable_parameters": 81,
            "total_seconds": 99,
            "train_seconds": 70.4,
        },
        **{"precision": "float32", "concept": str(path), "base": "samples/toybox-sd", "guidance_scale": 2.5},
    }
    monkeypatch.setattr("atomdiff.cli.demo.run_demo", lambda config: report)
    assert main(["demo", "--instance_data_dir", str(tmp_path), "--class_name", "mug"]) == 0
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines()[:4]] == [
        ["base", "concept", "between", "photos"],
        ["similarity", "0.100", "0.700", "-"],
        ["scenes", "right", "1.000", "0.950"],
        ["drift", "0.138"],
    ]
    assert "12,345 bytes, 81 parameters" in shown and "99 s, 70 s of them training" in shown
    assert str(path) in shown and str(tmp_path / "before_after.png") in shown
    code = [line.strip() for line in shown.splitlines() if line.startswith("    ") and "pipe" in line]
    assert len(code) == 2 and "from_pretrained('samples/toybox-sd')" in code[0]
    exec(code[1].replace("guidance_scale=2.5", "num_inference_steps=1"), {"atomdiff": atomdiff, "pipe": tiny_pipe})
    assert (tmp_path / "image.png").is_file()


@pytest.mark.parametrize(
    "args",
    [
        ["sample", "--pretrained_model_name_or_path", "x", "--prompts", "a", "--concepts", "none.safetensors"],
        ["sample", "--pretrained_model_name_or_path", "x", "--output_dir", "{folder}/out"],
        ["inspect", "none.safetensors"],
        ["inspect", "x" * 300],
        ["inspect", "--config", "atoms", "--base", "x" * 300],
        ["demo", "--instance_data_dir", "none"],
    ],
)
def test_mistakes_are_one_line_on_stderr(args, capsys, tmp_path):
    assert main([arg.format(folder=tmp_path) for arg in args]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"atomdiff {args[0]}: error: ") and shown.err.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(monkeypatch, tiny_pipe_folder, tmp_path, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate_each", stop)
    options = ["--pretrained_model_name_or_path", str(tiny_pipe_folder), "--output_dir", str(tmp_path)]
    assert main(["sample", *options, "--prompts", "a mug"]) == 130
    assert "the same command generates what is missing" in capsys.readouterr().err
    monkeypatch.setitem(VERBS, "train", stop)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "stopped\n"


BUG = "atomdiff train: error: RuntimeError: bug. This is a bug in atomdiff;"


@pytest.mark.parametrize(
    ("rank", "processes", "end", "expected", "waits"),
    [
        (0, 1, RuntimeError("bug"), BUG, 0),
        (0, 2, RuntimeError("bug"), BUG, 1),
        (0, 2, UserError("wrong"), "atomdiff train: error: wrong", 0),
        (0, 2, KeyboardInterrupt("saved"), "saved", 0),
        (1, 2, RuntimeError("bug"), BUG, 1),
        (1, 2, UserError("wrong"), "atomdiff train: error: wrong", 1),
        (1, 2, SystemExit("no such option"), "no such option", 1),
        (1, 2, KeyboardInterrupt("saved"), "", 0),
    ],
)
def test_processes_after_the_first_wait_before_they_tell(rank, processes, end, expected, waits, monkeypatch, capsys):
    def verb(_):
        raise end

    slept = []
    monkeypatch.setattr("atomdiff.cli.run_program.time.sleep", lambda _: slept.append(capsys.readouterr().err))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setitem(VERBS, "train", verb)
    statuses = {KeyboardInterrupt: 130, RuntimeError: 1}
    assert main(["train"]) == statuses.get(type(end), 2)
    assert slept == [""] * waits
    printed = capsys.readouterr().err.strip()
    assert printed.startswith(expected) if expected == BUG else printed == expected


@pytest.mark.parametrize("full", [False, True])
def test_what_nobody_foresaw_is_one_line_with_its_traceback_in_a_file(monkeypatch, tmp_path, capsys, full):
    def verb(_):
        raise RuntimeError("a\nbug")

    monkeypatch.setattr("atomdiff.cli.run_program.tempfile.tempdir", str(tmp_path / "none" if full else tmp_path))
    monkeypatch.setitem(VERBS, "train", verb)
    assert main(["train"]) == 1
    printed = capsys.readouterr().err
    if full:
        assert "Traceback" in printed and 'RuntimeError("a' in printed
        return
    (file,) = tmp_path.iterdir()
    assert printed == f"{BUG.replace('bug.', 'a bug.', 1)} please report it with {file}\n"
    assert 'raise RuntimeError("a' in file.read_text()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried"), RuntimeError("x can't allocate memory")]
)
def test_too_little_memory_is_no_bug(monkeypatch, capsys, error):
    def verb(_):
        raise error

    monkeypatch.setitem(VERBS, "train", verb)
    assert main(["train"]) == 1
    printed = capsys.readouterr().err
    assert "error: out of memory" in printed and "bug" not in printed and printed.count("\n") == 1


def test_a_reader_that_has_gone_is_no_error():
    code = (
        "import sys; from atomdiff.cli.run_program import run_program; "
        "sys.exit(run_program('x', lambda: print('y' * 10**6)))"
    )
    command = f'{sys.executable} -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "y", "")


def test_warnings_are_short_and_only_ours(monkeypatch, tiny_pipe_folder, tmp_path, capsys):
    options = ["--pretrained_model_name_or_path", str(tiny_pipe_folder), "--output_dir", str(tmp_path)]
    assert main(["sample", *options, "--prompts", "mug " * 90, "--num_inference_steps", "1"]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "arning" in line]
    assert len(warned) == 1 and warned[0].startswith("warning: the base reads 77 of the 92 tokens of 'mug mug")


@pytest.mark.slow
def test_the_script_splits_a_job_over_processes(tiny_pipe_folder, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(ROOT / "train_scripts" / "generate_samples.py")
    options = ["--pretrained_model_name_or_path", str(tiny_pipe_folder), "--output_dir", str(tmp_path / "out")]
    options += ["--prompts", "a red mug", "a cat", "a robot", "--num_inference_steps", "1"]
    done = subprocess.run([*launch, script, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("are in") == 1
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["images"]) == 3
    assert done.stderr.count("generating: 2 images") == 1  # the main process drew two of three


@pytest.mark.slow
def test_what_the_output_cannot_spell_is_escaped() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "atomdiff", "inspect", "müll-猫.atoms.safetensors"],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    assert process.returncode == 2
    assert b"m\\xfcll-\\u732b" in process.stderr
    assert b"Traceback" not in process.stderr
