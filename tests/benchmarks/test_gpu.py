"""The part of benchmarks/gpu.sh that compares methods: what it packs, and that an earlier call is gone on from."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
RUNS = "out/compare/runs/atoms/tiny/0.001"
PYTHON = f"""#!/bin/bash
echo "$*" >>calls
[[ $* == *sheets* ]] && exit 0
for name in mug-seed0 mug-seed1 cat-seed0 fish-seed0; do
  run={RUNS}/subjects-$name
  [ -e $run/result.json ] && echo "kept $name" >>calls
  mkdir -p $run/run out/compare/methods
  for file in trial adapter trained; do echo '{{}}' >$run/$file.json; done
  [ $name = fish-seed0 ] || echo '{{}}' >$run/result.json   # the fish was stopped
  head -c $([ $name = cat-seed0 ] && echo 200000 || echo 1000) /dev/urandom >$run/run/${{name%-*}}.atoms.safetensors
done
echo '{{}}' >out/compare/methods/atoms-tiny.json
echo "1/4 {RUNS}: gain 0.5"
sleep ${{SLEEP:-0}}
"""


@pytest.fixture
def call(tmp_path):
    """Run the part in a folder with a copy of the script, in which python3 does not compute."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "python3").chmod(0o755)

    def run(out, **variables):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = ["bash", "benchmarks/gpu.sh", "compare", out]
        return subprocess.check_output(command, cwd=tmp_path, env={**os.environ, "PATH": path, **variables}, text=True)

    return run


def test_a_comparison_is_packed_and_gone_on_from(call, tmp_path):
    printed = call("first", OPTIONS="--trials 1", PROCESSES="3", SLEEP="60", SECONDS_="1", SHEETS="5")
    assert printed == f"1/4 {RUNS}: gain 0.5\n"
    compare, sheets = (tmp_path / "calls").read_text().splitlines()
    assert "--processes 3 --work_dir out/compare/runs --output_dir out/compare/methods --trials 1" in compare
    assert "benchmarks.sheets --work_dir out/compare/runs --results out/compare/methods --images first" in sheets
    assert sorted(file.name for file in (tmp_path / "first").iterdir()) == ["compare.log", "compare.tar.xz.00"]
    with tarfile.open(tmp_path / "first" / "compare.tar.xz.00") as packed:
        names = set(packed.getnames())
    ended = {f"{RUNS}/subjects-{name}" for name in ("mug-seed0", "mug-seed1", "cat-seed0")}
    expected = {f"{run}/{name}.json" for run in ended for name in ("trial", "adapter", "result")}
    concept = {f"{RUNS}/subjects-mug-seed0/{name}" for name in ("trained.json", "run/mug.atoms.safetensors")}
    assert names == expected | concept | {"out/compare/methods/atoms-tiny.json"}

    shutil.rmtree(tmp_path / "out")
    (tmp_path / "calls").unlink()
    call("second", FROM="first")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1:] == ["kept mug-seed0", "kept mug-seed1", "kept cat-seed0"]
