from types import SimpleNamespace

import diffusers
import pytest

from atomdiff.bases import find
from atomdiff.bases.find import BASES, base_of_architecture, base_of_class, denoiser_of, find_base, register_base
from atomdiff.bases.stable_diffusion import StableDiffusion


def test_pipelines_are_told_by_their_components(tiny_pipe, tiny_sd2_pipe, tiny_xl_pipe):
    first, xl = find_base(tiny_pipe.components), find_base(tiny_xl_pipe.components)
    assert first is find_base(tiny_sd2_pipe.components) is base_of_class("StableDiffusionPipeline")
    assert xl is base_of_class("StableDiffusionXLPipeline")
    for pipe, base in ((tiny_pipe, first), (tiny_xl_pipe, xl)):
        assert denoiser_of(pipe) is pipe.unet
        assert base_of_architecture(f"{base.architecture(pipe)}/atoms") is base


def test_a_registered_base_is_asked_before_those_that_match_too(tiny_pipe, monkeypatch):
    monkeypatch.setattr(find, "BASES", list(BASES))
    register_base(special := StableDiffusion())
    assert find_base(tiny_pipe.components) is special


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_others_have_a_transformer_and_an_unknown_architecture(name):
    pipe = type(name, (), {"components": {"transformer": SimpleNamespace(config=SimpleNamespace(sample_size=None))}})()
    base = find_base(pipe.components)
    assert base.denoiser == "transformer" and base.architecture(pipe) == "other" and base.native_size(pipe) is None
    assert base_of_class(name) is base_of_architecture("other/atoms") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("StableDiffusionPipeline", True),
        ("StableDiffusionXLPipeline", True),
        ("StableDiffusionImg2ImgPipeline", False),
        ("StableDiffusion3Pipeline", False),
    ],
)
def test_only_pipelines_from_text_with_a_known_denoiser_generate_from_text(name, expected):
    assert any(base.generates_from_text(getattr(diffusers, name)) for base in BASES) == expected


def test_sides_are_multiples_of_what_vae_and_unet_divide_by(tiny_pipe, tiny_xl_pipe):
    for pipe in (tiny_pipe, tiny_xl_pipe):
        base = find_base(pipe.components)
        assert (base.size_multiple(pipe), base.native_size(pipe)) == (8, (32, 32))
