"""Which precision is chosen where: never one that a processor has to emulate, unless it was asked for."""

import warnings

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from atomdiff.utils import precision
from atomdiff.utils.errors import UserError
from atomdiff.utils.precision import autocast, choose_precision, training_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def processor(monkeypatch):
    """A function that gives this machine another processor: its instructions, and torch's name of its kernels."""

    def replace(*instructions, kernels="AVX512", onednn=True):
        monkeypatch.setattr(precision, "cpu_capabilities", lambda: dict.fromkeys(instructions, True))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)

    return replace


@pytest.mark.parametrize(
    ("instructions", "kernels", "onednn", "expected"),
    [
        (["avx512_bf16"], "AVX512", True, "bf16"),
        (["amx_bf16"], "AVX512", True, "bf16"),
        (["avx512_fp16"], "AVX512", True, "no"),
        ([], "AVX512", True, "no"),
        ([], "AVX2", True, "no"),
        (["avx512_bf16"], "AVX2", True, "no"),  # ATEN_CPU_CAPABILITY=avx2
        (["bf16"], "SVE256", True, "bf16"),  # Arm
        ([], "SVE256", True, "no"),
        (["bf16"], "DEFAULT", False, "no"),  # torch for macOS
    ],
)
def test_bfloat16_only_where_the_processor_has_instructions(processor, instructions, kernels, onednn, expected):
    processor(*instructions, kernels=kernels, onednn=onednn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = choose_precision(None, CPU)
    assert chosen.name == expected and "this processor" in chosen.reason
    assert autocast(CPU).fast_dtype == torch.bfloat16 if expected == "bf16" else not autocast(CPU)._enabled


@pytest.mark.parametrize(("limit", "expected"), [("AVX2", "no"), ("AVX512_CORE_BF16", "bf16"), ("default", "bf16")])
def test_limits_set_for_onednn_count(processor, limit, expected, monkeypatch):
    processor("avx512_bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert choose_precision(None, CPU).name == expected


@pytest.mark.parametrize("asked", ["bf16", "bfloat16"])
def test_asking_for_emulation_is_warned_of_with_its_cost(processor, asked):
    processor(kernels="AVX2")
    with pytest.warns(UserWarning, match=f"dtype='{asked}': this processor has no bfloat16.*12 times slower"):
        assert choose_precision(asked, CPU, field="dtype").dtype == torch.bfloat16
    processor("avx512_bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_precision(asked, CPU).name == "bf16"
        assert choose_precision("float32", CPU).dtype == torch.float32


def test_what_accelerate_is_configured_to_goes_before_the_processor_and_after_the_option(processor, monkeypatch):
    processor("avx512_bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert choose_precision(None, CPU).name == "no" and choose_precision("bf16", CPU).name == "bf16"
    processor(kernels="AVX2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.warns(UserWarning, match="ACCELERATE_MIXED_PRECISION=bf16: this processor"):
        assert choose_precision(None, CPU).name == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="ACCELERATE_MIXED_PRECISION='fp8': expected one of no, fp16, bf16"):
        choose_precision(None, CPU)


@pytest.mark.parametrize(("able", "expected"), [(True, "bf16"), (False, "no")])
def test_gpus_are_asked_whether_they_have_it(processor, able, expected, monkeypatch):
    processor()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or able)
    assert choose_precision(None, CUDA).name == expected
    assert choose_precision(None, torch.device("mps")).name == "no"
    if not able:
        with pytest.warns(UserWarning, match=r"this GPU \(cuda\) has no bfloat16 instructions"):
            choose_precision("bf16", CUDA)


def test_what_the_launcher_always_sets_says_nothing_about_a_gpu(processor, monkeypatch):
    processor(kernels="AVX2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    arguments = launch_command_parser().parse_args(["script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert choose_precision(None, CUDA).name == "bf16"
    assert choose_precision("no", CUDA).name == choose_precision(None, CPU).name == "no"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert choose_precision(None, CUDA).name == "no"


@pytest.mark.parametrize("configured", [False, True])
def test_a_run_says_what_it_computes_in_and_is_refused_fp16_without_a_gpu(processor, configured, monkeypatch, capsys):
    processor(kernels="AVX2")
    assert training_precision(None).name == "no"
    assert capsys.readouterr().err == "precision: float32 (this processor has no bfloat16 instructions) on cpu\n"
    if configured:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="needs a GPU"):
        training_precision(None if configured else "fp16")


def test_linux_is_asked_where_torch_does_not_say(monkeypatch):
    precision.cpu_capabilities.cache_clear()
    known = precision.cpu_capabilities()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    precision.cpu_capabilities.cache_clear()
    assert precision.cpu_capabilities()["avx512_bf16"] == known["avx512_bf16"]
    precision.cpu_capabilities.cache_clear()


@pytest.mark.parametrize(("there", "kind"), [(True, "cuda"), (True, "mps"), (False, "cpu")])
def test_a_gpu_is_used_where_there_is_one(there, kind, monkeypatch):
    class State:
        def __init__(self, cpu):
            self.device = torch.device("cpu" if cpu else kind)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr("accelerate.PartialState", State)
    assert precision.compute_device().type == kind
