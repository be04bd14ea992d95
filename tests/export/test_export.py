"""`atomdiff export`: concepts with their weights, in each form."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import atomdiff
from atomdiff.activation_adapters import MonaConfig
from atomdiff.export import export as export_module
from atomdiff.export.diff import export_diff
from atomdiff.export.export import ExportConfig, export_concepts
from atomdiff.export.kohya import layer_name
from atomdiff.export.lora import export_lora
from atomdiff.export.pipeline_folder import export_pipeline
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from tests.export.helpers import add_random_adapter, copy_of, generate_latents
from tests.helpers import add_adapter


@pytest.fixture
def make_config(tiny_pipe_folder, tmp_path):
    """Makes an ExportConfig of concepts on the tiny pipeline, that writes a file in float32 at `out`."""

    def make(concepts, to, output="out", dtype="float32", **fields):
        return ExportConfig(
            str(tiny_pipe_folder), tuple(map(str, concepts)), to, str(tmp_path / output), dtype=dtype, **fields
        )

    return make


@pytest.fixture
def by_prediction_type(tiny_pipe, tmp_path):
    """Concept files by what they were trained to predict; the base predicts v."""
    add_random_adapter(tiny_pipe)
    return {
        predicted: atomdiff.save_atoms(
            tiny_pipe, tmp_path / f"{predicted}.atoms.safetensors", training={"config": {"prediction_type": predicted}}
        )
        for predicted in ("epsilon", "v_prediction")
    }


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pipeline", "diff", "lora"])
def test_files_are_exported_with_their_weights(pipe_template, concepts, make_config, to):
    report = export_concepts(make_config(concepts, to, rank=1000, weights=(0.5, 0.25)))
    pipe = copy_of(pipe_template)
    names = [atomdiff.load_atoms(pipe, path) for path in concepts]
    pipe.set_adapters(names, [0.5, 0.25])
    expected = generate_latents(pipe, "a sks ohwx mug")
    if to == "diff":
        atomdiff.merge(pipe)
        change = pipe.unet.conv_in.base_layer.weight - pipe_template.unet.conv_in.weight
        torch.testing.assert_close(load_file(report.path)["lora_unet_conv_in.diff"], change, atol=1e-6, rtol=0)
        assert list(report.embeddings) == ["sks", "ohwx"]
        return
    if to == "pipeline":
        other = StableDiffusionPipeline.from_pretrained(report.path)
    else:
        other = copy_of(pipe_template)
        other.load_lora_weights(str(report.path))
        with safe_open(report.path, "pt") as file:
            assert file.metadata()["modelspec.trigger_phrase"] == "sks mug, ohwx mug"
        for word, path in report.embeddings.items():  # sks is a known word here, which diffusers would not overwrite
            add_placeholder_token(other, word)
            set_token_embedding(other, word, {"text_encoder": load_file(path)["emb_params"][0]})
    torch.testing.assert_close(generate_latents(other, "a sks ohwx mug"), expected, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_a_pipeline_folder_has_the_scheduler_that_the_concepts_were_trained_for(
    by_prediction_type, make_config, tmp_path, capsys
):
    def scheduler(output):
        return DDIMScheduler.from_pretrained(tmp_path / output, subfolder="scheduler").config.prediction_type

    export_concepts(make_config([by_prediction_type["epsilon"]], "pipeline", "merged"))
    assert "trained for a DDIMScheduler with prediction_type=epsilon" in capsys.readouterr().out
    assert scheduler("merged") == "epsilon"
    export_concepts(make_config([by_prediction_type["v_prediction"]], "diff"))
    assert capsys.readouterr().out == ""
    both = make_config(by_prediction_type.values(), "pipeline", "both")
    with pytest.raises(UserError, match="'epsilon' for a .*, 'v_prediction' for a DDIM.*; export them separately, or"):
        export_concepts(both)
    export_concepts(replace(both, prediction_type="epsilon"))
    assert scheduler("both") == "epsilon"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["diff", "lora"])
def test_a_file_of_concepts_for_different_schedulers_is_written_and_says_so(
    by_prediction_type, make_config, capsys, to
):
    config = make_config(by_prediction_type.values(), to)
    assert export_concepts(config).path.is_file()
    printed = capsys.readouterr().out
    assert "'epsilon' for a DDIM" in printed and printed.endswith("; choose one where you use the file\n")
    with pytest.raises(UserError, match=f"prediction_type='flow': a file of {to} has no scheduler; leave it out"):
        replace(config, prediction_type="flow")


@pytest.mark.slow
def test_a_folder_in_another_precision_says_how_to_open_it(concepts, make_config, capsys):
    report = export_concepts(make_config(concepts[:1], "pipeline", dtype="float16"))
    assert "open it with dtype=torch.float16" in capsys.readouterr().out
    loaded = DiffusionPipeline.from_pretrained(report.path, dtype=torch.float16)
    assert {part.dtype for part in pipeline_models(loaded).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"concepts": ()}, "no concept"),
        ({"weights": ("much", 1.0)}, "found the adapter weight 'much'"),
        ({"weights": ({"steps": {0: 1, 1: 0.5}}, 1.0)}, "weights: steps=.* cannot be exported; leave steps out"),
        ({"weights": (1.0,)}, "1 weights for 2 concepts"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 10**30}, "rank=10+: expected 1 to 65536"),
        ({"weights": (0, {"weight": 0.0})}, "weights: all are 0, so there is nothing to export"),
    ],
)
def test_mistakes_in_a_config_are_reported(make_config, fields, message):
    config = make_config(["one", "two"], "lora")
    with pytest.raises(UserError, match=message):
        replace(config, **fields)


def test_a_missing_base_or_concept_is_reported(concepts, make_config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        export_concepts(replace(make_config(concepts, "lora"), pretrained_model_name_or_path=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="there is no file or directory 'none'"):
        export_concepts(make_config(["none"], "lora"))


@pytest.mark.slow
def test_weights_go_by_block_as_in_sampling(pipe_template, tiny_pipe_folder, concepts, tmp_path):
    weights = ({"weight": 0.5, "blocks": {"down": 0.25, "mid": 0}}, 0.75)
    options = ["--pretrained_model_name_or_path", str(tiny_pipe_folder), "--concepts", *concepts, "--to", "diff"]
    options += ["--output", str(tmp_path / "out"), "--dtype", "float32", "--weights", *map(json.dumps, weights)]
    config = parse_config(ExportConfig, options)
    assert config.weights == weights
    file = load_file(export_concepts(config).path)
    pipe = copy_of(pipe_template)
    names = [atomdiff.load_atoms(pipe, path) for path in concepts]
    atomdiff.set_active(pipe, dict(zip(names, weights, strict=True)))
    for path in ("conv_in", "down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1"):
        change = pipe.unet.get_submodule(path).base_layer.weight - pipe_template.unet.get_submodule(path).weight
        torch.testing.assert_close(file[f"{layer_name(pipe, 'unet', path)}.diff"], change, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "weight", "message"),
    [
        ("lora", {"blocks": {"down": 0.5}}, "only those can be weighted by block"),
        ("ia3", 0.5, "gives no weight such as 0.5"),
    ],
)
def test_other_methods_are_weighted_as_far_as_they_can(tiny_pipe, make_config, tmp_path, method, weight, message):
    add_random_adapter(tiny_pipe, method)
    config = make_config([atomdiff.save_atoms(tiny_pipe, tmp_path / method)], "diff")
    with pytest.raises(UserError, match=message):
        export_concepts(replace(config, weights=(weight,)))
    assert export_concepts(config).layers


@pytest.mark.parametrize("to", ["pipeline", "diff", "lora"])
def test_what_has_no_weight_to_be_merged_into_is_refused_in_words(tiny_pipe, make_config, tmp_path, to):
    add_adapter(tiny_pipe, "mona", MonaConfig(hidden_size=4))
    config = make_config([atomdiff.save_atoms(tiny_pipe, tmp_path / "mona", "mona")], to)
    with pytest.raises(UserError, match="mona is a MONA adapter, which cannot be exported: .* depends on its input"):
        export_concepts(config)
    atomdiff.load_atoms(tiny_pipe, *config.concepts, adapter_name="by_hand")
    with pytest.raises(UserError, match="cannot be merged, and so not exported: what 'by_hand' adds depends on its"):
        export_pipeline(tiny_pipe, tmp_path / "by hand")


@pytest.mark.slow
def test_bases_in_half_precision_are_not_loaded_wider_than_they_are(pipe_template, make_config, tmp_path, monkeypatch):
    base = copy_of(pipe_template)
    base.to(torch.float16).save_pretrained(tmp_path / "half")
    base.to(torch.float32).save_pretrained(tmp_path / "wide")
    opened, open_base = [], export_module.open_base
    monkeypatch.setattr(
        export_module, "open_base", lambda *args, **kw: opened.append(open_base(*args, **kw)) or opened[-1]
    )
    for method in ("atoms", "sparse", "lora", "loha"):
        pipe = copy_of(pipe_template)
        add_random_adapter(pipe, method, word="ohwx", seed=3)
        concept = atomdiff.save_atoms(pipe, tmp_path / f"{method}.atoms.safetensors", dtype=torch.float32)
        files = {}
        for name in ("half", "wide"):
            config = replace(make_config([concept], "diff"), pretrained_model_name_or_path=str(tmp_path / name))
            report = export_concepts(config)
            files[name] = load_file(report.path) | load_file(report.embeddings["ohwx"])
        for key, value in files["wide"].items():
            torch.testing.assert_close(files["half"][key], value, atol=2e-6, rtol=2e-4)
        from_half, _ = opened
        opened.clear()
        assert from_half.vae.dtype == torch.float16
        assert from_half.unet.time_embedding.linear_1.weight.dtype == torch.float16  # which atoms alone adapt


def test_outputs_that_are_in_the_way_are_refused_before_anything_is_loaded(concepts, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "open_base", None)
    (tmp_path / "used.safetensors").mkdir()
    (tmp_path / "used.safetensors" / "x").touch()
    file = concepts[0]
    for base, to, output, message in [
        ("base", "pipeline", str(tmp_path), "exists already: give a new or empty folder"),
        ("base", "pipeline", file, "exists already: give a new or empty folder"),
        ("base", "diff", str(tmp_path / "used"), "is a folder: give the name of a file"),
        ("base", "lora", file, "is also an input: give another name"),
        (file, "lora", file.removesuffix(".safetensors"), "is also an input: give another name"),
        ("base", "lora", "x" * 300, "File name too long"),
        ("base", "lora", "x" * 250, "File name too long"),  # with its ending
        ("base", "pipeline", "x" * 300, "File name too long"),
    ]:
        with pytest.raises(UserError, match=message):
            export_concepts(ExportConfig(base, (concepts[0],), to, output))


@pytest.mark.slow
def test_a_lora_of_another_program_is_exported_as_it_generates(tiny_pipe, make_config, tmp_path):
    add_random_adapter(tiny_pipe, "lora")
    lora = export_lora(tiny_pipe, tmp_path / "kohya", 2, dtype=torch.float32).path
    expected = load_file(export_diff(tiny_pipe, tmp_path / "expected", dtype=torch.float32).path)
    found = load_file(export_concepts(make_config([lora], "diff")).path)
    for key in expected.keys() | found.keys():
        if key.endswith(".diff"):
            torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-4)
    loaded = StableDiffusionPipeline.from_pretrained(export_concepts(make_config([lora], "pipeline", "merged")).path)
    images = [generate_latents(pipe, "a mug") for pipe in (loaded, tiny_pipe)]
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_concepts_on_the_hub_are_exported(hub_server, concepts, make_config):
    hub_server.put("ada/mug", {"mug.atoms.safetensors": concepts[0]})
    found, expected = (
        load_file(export_concepts(make_config([each], "diff")).path) for each in ("ada/mug", concepts[0])
    )
    assert found and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
