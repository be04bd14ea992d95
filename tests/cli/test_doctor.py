import re
from importlib.metadata import PackageNotFoundError

import pytest

from atomdiff.cli import doctor
from atomdiff.cli.main import main
from atomdiff.utils.precision import choose_precision, compute_device


def report(capsys):
    assert main(["doctor"]) == 0
    return dict(re.split(r" {2,}| (?=\d)", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"atomdiff \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_report_says_what_a_bug_report_needs(capsys):
    found = report(capsys)
    assert found["precision"] == str(choose_precision(None, compute_device()))
    assert "cores" in found["processor"] and found["device"] and "GB" in found["memory"] and "free" in found["disk"]
    assert all(re.match(r"\d", found[name]) for name in ("atomdiff", "python", "torch", "peft", "huggingface-hub"))
    assert "11 files" in found["embedded base"] and found["Hub cache"]


def test_broken_and_missing_packages_spoil_only_their_own_lines(monkeypatch, capsys):
    find, load = doctor.version, doctor.importlib.import_module

    def version(name):
        if name == "bitsandbytes":
            raise PackageNotFoundError(name)
        return "1.0" if name == "xformers" else "0.1" if name == "peft" else find(name)

    def import_module(name):
        if name in ("xformers", "prodigyopt"):
            raise {"xformers": OSError("undefined symbol"), "prodigyopt": SystemExit("no")}[name]
        return load(name)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    found = report(capsys)
    assert found["bitsandbytes"] == 'missing; pip install "atomdiff[gpu]"'
    assert found["xformers"] == "1.0, broken (OSError: undefined symbol)"
    assert "broken (SystemExit: no)" in found["prodigyopt"]
    assert found["peft"].startswith("0.1, but atomdiff expects peft")
    assert found["schedulefree"][0].isdigit()


@pytest.mark.parametrize("line", ["_memory", "describe_device", "_hub_cache", "_precision"])
def test_what_cannot_be_found_out_is_told(line, monkeypatch, capsys):
    def broken():
        raise RuntimeError("driver  too\nold")

    monkeypatch.setattr(doctor, line, broken)
    name = {"_hub_cache": "Hub cache", "describe_device": "device"}.get(line, line[1:])
    assert report(capsys)[name] == "unknown (RuntimeError: driver too old)"
