from types import SimpleNamespace

import pytest

from atomdiff.concepts.modelspec import model_spec
from atomdiff.export import kohya


def pipeline(kind, width, predicts):
    """A pipeline as far as its fields are concerned."""
    added = "text_time" if "XL" in kind else None
    unet = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=width, sample_size=64, addition_embed_type=added))
    parts = {"unet": unet, "scheduler": SimpleNamespace(config=SimpleNamespace(prediction_type=predicts))}
    return type(kind, (), {"components": parts, "unet": unet})()


@pytest.mark.parametrize(
    ("kind", "width", "predicts", "architecture", "version", "second"),
    [
        ("StableDiffusionPipeline", 768, "epsilon", "stable-diffusion-v1", "sd_v1", "False"),
        ("StableDiffusionPipeline", 1024, "epsilon", "stable-diffusion-v2-512", "sd_v2", "True"),
        ("StableDiffusionPipeline", 1024, "v_prediction", "stable-diffusion-v2-768-v", "sd_v2_v", "True"),
        ("StableDiffusionXLPipeline", 2048, "epsilon", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
    ],
)
def test_architectures_have_the_names_that_other_programs_know(kind, width, predicts, architecture, version, second):
    pipe = pipeline(kind, width, predicts)
    fields = model_spec(pipe, "teapot")
    assert fields["architecture"] == f"{architecture}/atoms"
    assert fields["prediction_type"] == ("v" if predicts == "v_prediction" else predicts)
    assert fields["resolution"] == "512x512"
    exported = kohya.file_metadata(pipe, "teapot", "", 4)
    assert exported["ss_base_model_version"] == version and exported["ss_v2"] == second
    assert exported["modelspec.architecture"] == f"{architecture}/lora"
