"""The part of benchmarks/gpu.sh that compares methods: what it packs, and that an earlier call is gone on from."""

import io
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
[[ $* == *sheets* ]] && ls first >packed && exit
for name in subjects-{{mug-seed0,mug-seed1,cat-seed0,fish-seed0}} tuning_subjects-mug-seed0; do
  run={RUNS}/$name
  [ -e $run/result.json ] && echo "kept $name" >>calls && continue
  mkdir -p $run/run
  for file in trial adapter trained; do echo '{{}}' >$run/$file.json; done
  [ $name = subjects-fish-seed0 ] || echo '{{}}' >$run/result.json   # the fish was stopped
  head -c $([ $name = subjects-cat-seed0 ] && echo 200000 || echo 1000) /dev/urandom >$run/run/a.atoms.safetensors
done
echo '{{}}' >out/compare/methods/atoms-tiny.json
echo "1/4 {RUNS}: gain 0.5"
sleep ${{SLEEP:-0}}
"""
ENDED = ("subjects-mug-seed0", "subjects-mug-seed1", "subjects-cat-seed0", "tuning_subjects-mug-seed0")
RESULTS = {f"{RUNS}/{run}/{name}.json" for run in ENDED for name in ("trial", "adapter", "result")}
RESULTS |= {"out/compare/methods/atoms-tiny.json"}
CONCEPT = {f"{RUNS}/subjects-mug-seed0/{name}" for name in ("trained.json", "run/a.atoms.safetensors")}


@pytest.fixture
def call(tmp_path):
    """Run the part in a folder with a copy of the script, in which python3 does not compute."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    write_program(tmp_path / "bin" / "python3", PYTHON)

    def run(out, **variables):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = ["bash", "benchmarks/gpu.sh", "compare", out]
        environment = {**os.environ, "PATH": path, **variables}
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=True)
        assert not done.stderr
        return done.stdout

    return run


def write_program(file, text):
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def packed(folder):
    parts = sorted(folder.glob("compare.tar.xz.*"))
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        return set(archive.getnames())


def test_a_comparison_is_packed_and_gone_on_from(call, tmp_path):
    state = {"STATE": str(tmp_path / "pretrain")}  # of other parts
    printed = call("first", OPTIONS="--trials 1", PROCESSES="3", SLEEP="60", SECONDS_="1", SHEETS="5", **state)
    assert printed == f"1/4 {RUNS}: gain 0.5\n"
    compare, sheets = (tmp_path / "calls").read_text().splitlines()
    assert "--processes 3 --work_dir out/compare/runs --output_dir out/compare/methods --trials 1" in compare
    assert "sheets --processes 3 --work_dir out/compare/runs --results out/compare/methods --images first" in sheets
    assert (tmp_path / "packed").read_text().split() == ["compare.log", "compare.tar.xz.00"]  # before the sheets
    assert packed(tmp_path / "first") == RESULTS | CONCEPT

    shutil.rmtree(tmp_path / "out")
    (tmp_path / "calls").unlink()
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "compare.tar.xz.01").write_text("of a larger archive")
    call("second", FROM="first")
    assert (tmp_path / "calls").read_text().splitlines()[1:] == [f"kept {run}" for run in ENDED]
    assert packed(tmp_path / "second") == RESULTS | CONCEPT


def test_concepts_are_left_out_when_three_files_do_not_hold_them(call, tmp_path):
    write_program(tmp_path / "bin" / "split", f'#!/bin/bash\nexec {shutil.which("split")} -b 300 "${{@:3}}"\n')
    call("out")
    assert packed(tmp_path / "out") == RESULTS
