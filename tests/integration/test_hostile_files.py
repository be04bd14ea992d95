"""Files made to do harm: nothing in them is run, opened or taken for a file, and they get little time and memory."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import atomdiff
from tests.integration.mutations import SLOW_PATTERNS, Trap, Written

pytestmark = pytest.mark.slow

ALONE = """
import json, os, resource, sys, warnings
warnings.simplefilter("ignore")
import atomdiff
from atomdiff.utils.errors import UserError
from diffusers import StableDiffusionPipeline

base, folder, prefixes = sys.argv[1], sys.argv[2], (sys.argv[2], sys.prefix, sys.base_prefix, "/usr/lib", "/proc/")
pipe = StableDiffusionPipeline.from_pretrained(base)
for name in ("lora", "good.safetensors"):  # whatever is imported late is imported now
    atomdiff.load_atoms(pipe, os.path.join(folder, name), "x")
    atomdiff.unload_atoms(pipe)
seen, forbidden = [], ("os.", "subprocess.", "socket.", "pickle.", "marshal.", "ctypes.", "urllib.", "shutil.", "http.")
quiet = ("os.listdir", "os.scandir", "marshal.loads", "ctypes.addressof")

def watch(event, args):
    if event == "open" and not str(args[0]).startswith(prefixes) or "trap" in str(args)[:9999]:
        seen.append((event, str(args)[:200]))
    elif event.startswith(forbidden) and event not in quiet:
        seen.append((event, str(args)[:200]))

sys.addaudithook(watch)
room = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sorted(os.listdir(folder)):
    try:
        atomdiff.load_atoms(pipe, os.path.join(folder, name), "x")
        atomdiff.unload_atoms(pipe)
        print(json.dumps([name, None]))
    except UserError as error:
        print(json.dumps([name, str(error)]))
print(json.dumps(["grown by MB", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10]))
print(json.dumps(["seen", seen]))
"""


def bombs(folder, valid_files):
    """Files that say little and ask for much; one too large to be kept in memory is made of a hole."""
    default, joint, sparse = (valid_files[name] for name in ("default", "joint", "sparse"))
    (folder / "spaces").write_bytes((10**8).to_bytes(8, "little") + b" " * 10**8)
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    file = Written(default)
    start, size = len(file.data), 1 << 40
    file.more = [
        ("unet.conv_in.recursion_mix", {"dtype": "F16", "shape": [size // 2], "data_offsets": [start, start + size]})
    ]
    (folder / "hole").write_bytes(file.to_bytes())
    os.truncate(folder / "hole", (folder / "hole").stat().st_size + size)
    for name in ("lists", "names", "words"):
        file = Written(default)
        if name == "lists":
            file.set("base_fingerprint", "[" + "[]," * 1_000_000 + "0]")
        else:
            key = "unet.x{}.atom_delta" if name == "names" else "token.x{}"
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(file.data)] * 2}
            file.more = [(key.format(i), empty) for i in range(50_000)]
        (folder / name).write_bytes(file.to_bytes())
    for name, settings in {
        "atoms": {"num_atoms": 10**18, "basis": "sparse"},
        "block": {"channel_block": 10**9, "joint": True},
        "recursion": {"recursion": 10**12},
        "patterns": {"channel_block_pattern": {SLOW_PATTERNS[1]: 4}},
        "targets": {"target_modules": SLOW_PATTERNS[1], "exclude_modules": SLOW_PATTERNS[0]},
    }.items():
        file = Written(default)
        file.set("adapter_config", json.dumps(file.get("adapter_config") | settings))
        (folder / name).write_bytes(file.to_bytes())
    for name, original, settings, module, shape in (
        ("row", joint, {"channel_block": 32, "num_atoms": 1}, "unet.down_blocks.0.resnets.0.conv1", (1, 32 * 32 * 9)),
        ("code", sparse, {"num_atoms": 100_000}, "unet.conv_in", (100_000, 9)),
    ):
        tensors = {f"{module}.{kind}": torch.zeros(shape, dtype=torch.float16) for kind in ("atom_delta", "atom_basis")}
        file = Written(save(tensors, dict(Written(original).metadata)))
        file.set("adapter_config", json.dumps(file.get("adapter_config") | settings))
        file.set("base_fingerprint", json.dumps({module: [1] * shape[1]}))
        (folder / name).write_bytes(file.to_bytes())


def traps(folder, trap, valid_files, valid_folder):
    """Concepts that name files, modules and programs wherever a text is read; none of them may be touched."""
    (trap / "trap.py").write_text("raise SystemExit(77)")
    for name in ("adapter_model.bin", "model.pt", "adapter_config.json", "config.json", "tokenizer.json"):
        (trap / name).write_bytes(pickle.dumps(Trap()))
    file = Written(valid_files["default"])
    for name in ("base_model", "trigger_phrase", "modelspec.thumbnail", "__reduce__", "auto_map"):
        file.set(name, str(trap))
    file.set("training", json.dumps({"script": str(trap / "trap.py"), "base": str(trap)}))
    settings = file.get("adapter_config") | {"target_modules": [str(trap)], "layers_pattern": str(trap / "trap.py")}
    file.set("adapter_config", json.dumps(settings))
    (folder / "paths").write_bytes(file.to_bytes())
    (folder / "pickle").write_bytes(pickle.dumps(Trap()))
    torch.save({"state_dict": {}, "trap": Trap()}, folder / "checkpoint.ckpt")
    modules = {"auto_mapping": {"base_model_class": "trap", "parent_library": "trap"}}
    for name, settings in {
        "lora": {},
        "lora paths": {"base_model_name_or_path": str(trap), "revision": "../trap", **modules},
        "lora megatron": {"megatron_config": {"a": 1}, "megatron_core": "megatron.trap"},
        "lora corda": {"init_lora_weights": "corda", "corda_config": {"cache_file": str(trap / "model.pt")}},
        "lora slow": {"target_modules": SLOW_PATTERNS[1]},
        "xlora": {"peft_type": "XLORA", "adapters": {"a": str(trap)}, "hidden_size": 8},
        "shadow": {"peft_type": "SHADOW", "shadow_model": str(trap)},
        "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1, "tokenizer_name_or_path": str(trap)}
        | {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "x",
            "tokenizer_kwargs": {"trust_remote_code": True},
        },
    }.items():
        (folder / name).mkdir()
        kept = json.loads(valid_folder["adapter_config.json"]) if name.startswith("lora") else {}
        files = valid_folder | {"adapter_config.json": json.dumps(kept | settings).encode()}
        for file_name, data in files.items():
            (folder / name / file_name).write_bytes(data)
    (folder / "lora bin").mkdir()
    (folder / "lora bin" / "adapter_config.json").write_bytes(valid_folder["adapter_config.json"])
    (folder / "lora bin" / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))


def test_nothing_is_opened_run_or_taken_for_a_file(valid_files, valid_folder, tiny_pipe_folder, tmp_path):
    """In a process of its own, with a gigabyte to spare and two minutes' time for all of them."""
    folder, trap = tmp_path / "concepts", tmp_path / "trap"
    folder.mkdir()
    trap.mkdir()
    (folder / "good.safetensors").write_bytes(valid_files["default"])
    bombs(folder, valid_files)
    traps(folder, trap, valid_files, valid_folder)
    command = [sys.executable, "-c", ALONE, str(tiny_pipe_folder), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(atomdiff.__file__).parents[1]), str(trap)])}
    ended = subprocess.run(command, env=environment, cwd=trap, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = dict(map(json.loads, ended.stdout.splitlines()))
    assert found.pop("seen") == [] and found.pop("grown by MB") < 500
    loaded = sorted(name for name, error in found.items() if error is None)
    assert loaded == ["good.safetensors", "lora", "lora paths", "paths", "targets"]
    assert len(found) == 27, sorted(found)
