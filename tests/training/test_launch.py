import dataclasses
from importlib.util import find_spec

import pytest
import torch

from atomdiff.training import launch
from atomdiff.training.launch import start_accelerator
from atomdiff.utils.errors import UserError


@pytest.fixture
def config(train_config):
    return train_config(pretrained_model_name_or_path="base", instance_data_dir="photos")


@pytest.mark.parametrize(
    ("field", "value", "package", "extra"),
    [
        ("use_8bit_adam", True, "bitsandbytes", "gpu"),
        ("enable_xformers_memory_efficient_attention", True, "xformers", "gpu"),
        ("load_in_8bit", True, "bitsandbytes", "gpu"),
        ("load_in_4bit", True, "bitsandbytes", "gpu"),
        ("optimizer", "prodigy", "prodigyopt", "optimizers"),
        ("optimizer", "adamw_schedulefree", "schedulefree", "optimizers"),
    ],
)
def test_missing_packages_are_user_errors(config, field, value, package, extra, monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == package else find_spec(name))
    start_accelerator(config)
    message = rf'{field}={value!r}: {package} is missing; pip install "atomdiff\[{extra}\]"'
    with pytest.raises(UserError, match=message):
        start_accelerator(dataclasses.replace(config, **{field: value}))


def test_fp16_needs_a_gpu(config, half_precision):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match="mixed_precision='fp16'"):
        start_accelerator(dataclasses.replace(config, mixed_precision="fp16"))
    assert (
        start_accelerator(dataclasses.replace(config, mixed_precision=half_precision)).mixed_precision == half_precision
    )


@pytest.fixture
def tf32():
    """Where torch keeps the permission; put back afterwards."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    yield places
    for place, value in zip(places, before, strict=True):
        place.allow_tf32 = value


def test_tf32_is_allowed_when_asked_for(config, tf32):
    for place in tf32:
        place.allow_tf32 = False
    start_accelerator(config)
    assert not any(place.allow_tf32 for place in tf32)
    start_accelerator(dataclasses.replace(config, allow_tf32=True))
    assert all(place.allow_tf32 for place in tf32)
