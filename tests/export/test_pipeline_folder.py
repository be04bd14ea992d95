"""A pipeline folder with merged concepts gives the images of the pipeline, which stays as it is."""

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

import atomdiff
from atomdiff.export.diff import export_diff
from atomdiff.export.export import ExportConfig, export_concepts
from atomdiff.export.lora import export_lora
from atomdiff.export.pipeline_folder import export_pipeline
from atomdiff.export.report import describe_export
from atomdiff.pipelines.models import pipeline_models
from atomdiff.utils.errors import UserError
from tests.export.helpers import METHODS, add_random_adapter, copy_of, generate_latents
from tests.helpers import assert_unchanged, snapshot


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_folder_gives_the_same_images(pipe_template, tmp_path, method):
    pipe = copy_of(pipe_template)
    add_random_adapter(pipe, method, word="ohwx")
    expected, before = generate_latents(pipe), snapshot(pipe)
    report = export_pipeline(pipe, tmp_path / "merged")
    assert_unchanged(pipe, before)
    assert torch.equal(generate_latents(pipe), expected)
    loaded = StableDiffusionPipeline.from_pretrained(report.path)
    torch.testing.assert_close(generate_latents(loaded), expected, atol=1e-4, rtol=0)
    assert not hasattr(loaded.unet, "peft_config") and (generate_latents(pipe_template) - expected).abs().max() > 1e-2
    assert "layer" not in describe_export(report) and str(report.path) in describe_export(report)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_diffusers_generates_a_folder_with_a_flow_concept(pipe_template, sdxl_template, tmp_path, kind):
    pipe = copy_of({"sd": pipe_template, "sdxl": sdxl_template}[kind])
    pipe.save_pretrained(tmp_path / "base")
    add_random_adapter(pipe, "atoms")
    training = {"config": {"prediction_type": "flow", "flow_shift": 3.0}}
    path = atomdiff.save_atoms(pipe, tmp_path / "mug.atoms.safetensors", training=training)
    export_concepts(ExportConfig(str(tmp_path / "base"), (str(path),), "pipeline", str(tmp_path / "merged")))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "merged")  # in float32, so that no dtype is needed
    assert {part.dtype for part in pipeline_models(loaded).values()} == {torch.float32}
    assert loaded.scheduler.config.prediction_type == "flow_prediction" and loaded.scheduler.config.flow_shift == 3
    found = generate_latents(loaded)
    pipe.scheduler = loaded.scheduler
    torch.testing.assert_close(generate_latents(pipe), found, atol=1e-3, rtol=0)


def test_a_word_stays_a_word_in_a_folder(pipe_template, tmp_path):
    pipe = copy_of(pipe_template)
    add_random_adapter(pipe, "atoms", word="<my-mug>")
    folder = export_pipeline(pipe, tmp_path / "merged").path
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    assert loaded.tokenizer.tokenize("a <my-mug>") == pipe.tokenizer.tokenize("a <my-mug>")
    assert torch.equal(
        loaded.text_encoder.get_input_embeddings().weight, pipe.text_encoder.get_input_embeddings().weight
    )


def test_a_folder_that_is_in_use_is_not_written_to(tiny_pipe, tiny_pipe_folder):
    add_random_adapter(tiny_pipe)
    with pytest.raises(UserError, match="exists already"):
        export_pipeline(tiny_pipe, tiny_pipe_folder)
    with pytest.raises(UserError, match="File name too long"):
        export_pipeline(tiny_pipe, "x" * 300)


def state_of(pipe):
    """What of a pipeline an export could change beside what a snapshot has."""
    concepts, models = atomdiff.list_atoms(pipe), pipeline_models(pipe)
    modules = [module for model in models.values() for module in model.modules()]
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    return {
        "concepts": concepts,
        "components": {name: id(part) for name, part in pipe.components.items()},
        "modules": [id(module) for module in modules],
        "memory": [(p.data_ptr(), p.requires_grad) for model in models.values() for p in model.parameters()],
        "layers": [(each.active_adapters, each.disable_adapters, {**each.scaling}) for each in layers],
        "scheduler": {name: value for name, value in pipe.scheduler.config.items() if name[0] != "_"},
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", [export_pipeline, export_diff, export_lora])
@pytest.mark.parametrize("merged", [False, True])
def test_the_pipeline_of_the_caller_stays_as_it_is_to_the_bit(tiny_pipe, tmp_path, form, merged):
    add_random_adapter(tiny_pipe, "atoms", "one", word="ohwx")
    add_random_adapter(tiny_pipe, "lora", "two", seed=1)
    tiny_pipe.set_adapters(["one", "two"], [0.5, 0.25])
    expected = generate_latents(tiny_pipe)
    if merged:
        atomdiff.merge(tiny_pipe)
        expected_now = generate_latents(tiny_pipe)
    before, state = snapshot(tiny_pipe), state_of(tiny_pipe)
    report = form(tiny_pipe, tmp_path / "out")
    assert_unchanged(tiny_pipe, before)
    assert state_of(tiny_pipe) == state
    if merged:
        assert torch.equal(generate_latents(tiny_pipe), expected_now)
        atomdiff.restore(tiny_pipe)
    assert torch.equal(generate_latents(tiny_pipe), expected)
    if form is export_pipeline:
        loaded = StableDiffusionPipeline.from_pretrained(report.path)
        torch.testing.assert_close(generate_latents(loaded), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_others_see_the_concepts_unmerged_while_a_folder_is_written(tiny_pipe, tmp_path, monkeypatch):
    add_random_adapter(tiny_pipe, word="ohwx")
    before, state, save = snapshot(tiny_pipe), state_of(tiny_pipe), type(tiny_pipe).save_pretrained

    def look(self, *args, **kwargs):
        assert self is not tiny_pipe and state_of(tiny_pipe) == state
        assert_unchanged(tiny_pipe, before)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(type(tiny_pipe), "save_pretrained", look)
    export_pipeline(tiny_pipe, tmp_path / "merged")
