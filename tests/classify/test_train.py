import dataclasses
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from atomdiff.classify import train as training
from atomdiff.classify.config import ClassifyConfig
from atomdiff.classify.model import open_model, open_processor
from atomdiff.classify.saving import load_classifier
from atomdiff.classify.train import train_classifier
from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder

LORA = {"peft_type": "LORA", "r": 2, "lora_dropout": 0.2, "target_modules": ["convolution"]}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
METHODS = ("linear", "full", "atoms", "lora")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny random ResNet with batch statistics unlike those it was born with."""
    folder = tmp_path_factory.mktemp("base")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetForImageClassification(config).train()
        model(torch.randn(16, 3, 16, 16))
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes, told apart by the direction of their stripes, 12 images each."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    for name, wave in {"across": y, "down": x, "tilted": x + y}.items():
        (folder / name).mkdir()
        for number in range(12):
            stripes = 128 + 90 * np.sin(wave * np.pi / 2 + random.uniform(0, 6))[..., None]
            pixels = (stripes + random.normal(0, 20, (16, 16, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def config(base, images, tmp_path):
    return ClassifyConfig(
        pretrained_model_name_or_path=str(base),
        train_data_dir=str(images),
        output_dir=str(tmp_path / "out"),
        resolution=16,
        validation_share=0.25,
        test_share=0.25,
        max_train_steps=4,
        train_batch_size=8,
        validation_steps=2,
    )


def with_method(config, method, tmp_path, **fields):
    if method == "lora":
        (tmp_path / "lora.json").write_text(json.dumps(LORA))
        method = str(tmp_path / "lora.json")
    rate = {"linear": None, "full": 1e-2}.get(method, 3e-2)
    return dataclasses.replace(config, adapter=method, learning_rate=rate, **fields)


def logits(model):
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(pixels).logits


def keep_trained(monkeypatch):
    """A list that fills with the trained models."""
    trained, save = [], training.save_classifier

    def note(folder, model, *rest):
        trained.append(model)
        save(folder, model, *rest)

    monkeypatch.setattr(training, "save_classifier", note)
    return trained


def base_model(base):
    return ResNetForImageClassification.from_pretrained(base)


def untrained(config):
    return open_model(config.pretrained_model_name_or_path, ["across", "down", "tilted"], seed=config.seed)


def weight_of(model):
    return model.resnet.embedder.embedder.convolution.weight


def classifier(config):
    return Path(config.output_dir) / "classifier"


@pytest.mark.parametrize("method", METHODS)
def test_what_was_saved_gives_the_logits_that_were_trained(config, method, tmp_path, monkeypatch):
    config = with_method(config, method, tmp_path)
    trained = keep_trained(monkeypatch)
    train_classifier(config)
    loaded = load_classifier(classifier(config))
    assert not loaded.training and loaded.config.id2label == {0: "across", 1: "down", 2: "tilted"}
    assert torch.equal(logits(loaded), logits(trained[0]))
    assert (logits(loaded) - logits(untrained(config))).abs().max() > 1e-3
    assert AutoImageProcessor.from_pretrained(classifier(config)).size["shortest_edge"] == 16


@pytest.mark.parametrize("batch_norm", [None, "frozen"])
@pytest.mark.parametrize("method", METHODS)
def test_only_what_the_method_names_moves_and_it_is_counted(config, method, batch_norm, tmp_path, monkeypatch):
    config = with_method(config, method, tmp_path, batch_norm=batch_norm)
    trained = keep_trained(monkeypatch)
    report = train_classifier(config)
    before = untrained(config).state_dict()
    after = {name.replace("base_layer.", ""): tensor for name, tensor in trained[0].state_dict().items()}
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    heads, statistics = (names(before, what) for what in ("classifier", "running|num_batches"))
    updated = statistics if method != "linear" and batch_norm is None else set()
    assert moved == heads | updated | (before.keys() - statistics if method == "full" else set())
    sizes = {name.replace("base_layer.", ""): tensor.numel() for name, tensor in trained[0].named_parameters()}
    base = sum(before[name].numel() for name in before.keys() - heads - names(before, "num_batches"))
    added = sum(size for name, size in sizes.items() if name not in before)
    assert (added > 0) == (method in ("atoms", "lora"))
    counted = sum(before[name].numel() for name in names(before, "running")) if updated else 0
    adapter = sum(before[name].numel() for name in before.keys() - heads - statistics) if method == "full" else added
    assert report["num_trainable_parameters"] == {"adapter": adapter, "statistics": counted, "head": 16 * 3 + 3}
    assert report["num_base_parameters"] == base and report["trainable_share"] == (adapter + counted) / base


def names(tensors, pattern):
    return {name for name in tensors if re.search(pattern, name)}


def test_statistics_of_batch_norms_are_saved(config, monkeypatch):
    train_classifier(config)
    loaded, base = load_classifier(classifier(config)).resnet, untrained(config).resnet
    mean = loaded.embedder.embedder.normalization.running_mean
    assert not torch.equal(mean, base.embedder.embedder.normalization.running_mean)


@pytest.mark.parametrize("targets", ["all", "conv+proj"])
def test_an_adapter_for_all_layers_spares_the_head(config, targets, tmp_path):
    (tmp_path / "adapter.json").write_text(json.dumps({"peft_type": "ATOMS", "target_modules": targets}))
    report = train_classifier(dataclasses.replace(config, adapter=str(tmp_path / "adapter.json")))
    assert report["num_trainable_parameters"]["head"] == 16 * 3 + 3
    assert not hasattr(load_classifier(classifier(config)).classifier[1], "base_layer")


def test_atoms_alone_learn(config):
    config = dataclasses.replace(config, head_learning_rate=0.0, batch_norm="frozen", max_train_steps=60)
    report = train_classifier(dataclasses.replace(config, learning_rate=0.05, validation_steps=20))
    start = train_classifier(dataclasses.replace(config, learning_rate=0.0, max_train_steps=1))
    assert start["accuracy"]["train"] < 0.7
    assert report["accuracy"]["train"] > 0.9 and report["accuracy"]["test"] > 0.8
    assert report["images"] == {"train": 18, "validation": 9, "test": 9}


def test_the_weights_of_the_best_validation_are_kept(config, monkeypatch):
    usual, scores, weights = training.evaluate, iter((0.2, 0.7, 0.7, 0.7, 0.5)), []
    losses = iter((1.0, 1.0, 0.8, 0.9, 0.1))

    def judge(run, images):
        if images is not run.splits.validation or len(weights) == 5:
            return usual(run, images)
        weights.append(run.model.classifier[1].weight.detach().clone())
        return {"accuracy": next(scores), "loss": next(losses)}

    monkeypatch.setattr(training, "evaluate", judge)
    report = train_classifier(dataclasses.replace(config, validation_steps=2, max_train_steps=10))
    assert [validation["step"] for validation in report["validations"]] == [2, 4, 6, 8, 10]
    assert report["best_step"] == 6
    kept = load_classifier(classifier(config)).classifier[1].weight
    assert [torch.equal(kept, weight) for weight in weights] == [False, False, True, False, False]


def test_a_run_without_progress_stops_early(config, monkeypatch):
    scores = iter((0.5, 0.6, 0.4, 0.6, 0.9))
    monkeypatch.setattr(training, "evaluate", lambda run, images: {"accuracy": next(scores, 0.0), "loss": 1.0})
    report = train_classifier(dataclasses.replace(config, max_train_steps=10, early_stopping_patience=2))
    assert [validation["step"] for validation in report["validations"]] == [2, 4, 6, 8] and report["best_step"] == 4


def test_same_config_same_numbers_and_the_seed_changes_all_choices(config, half_precision, tmp_path, monkeypatch):
    config = dataclasses.replace(config, random_flip=True, random_resized_crop=0.5, max_train_steps=2)
    config = with_method(config, "lora", tmp_path, mixed_precision=half_precision)
    trained = keep_trained(monkeypatch)
    reports = [train_classifier(run) for run in (config, config, dataclasses.replace(config, seed=1))]
    for report in reports:
        report.pop("train_seconds")
    assert reports[0] == reports[1]
    assert torch.equal(logits(trained[0]), logits(trained[1]))
    assert (logits(trained[0]) - logits(trained[2])).abs().max() > 1e-2


def test_workers_change_nothing(config, monkeypatch):
    config = dataclasses.replace(config, random_flip=True, random_resized_crop=0.5, max_train_steps=2)
    trained = keep_trained(monkeypatch)
    for workers in (0, 1):
        train_classifier(dataclasses.replace(config, dataloader_num_workers=workers))
    assert torch.equal(logits(trained[0]), logits(trained[1]))


def test_a_head_of_the_same_size_is_replaced_too_and_follows_from_the_seed(base):
    pretrained = base_model(base)
    one, again, other = (open_model(str(base), list("abcde"), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(weight_of(one), weight_of(pretrained))
    heads = [model.classifier[1].weight for model in (one, again, other, pretrained)]
    assert [torch.equal(heads[0], head) for head in heads] == [True, True, False, False]


def test_learning_rates_follow_the_schedule(config):
    config = dataclasses.replace(config, lr_scheduler="linear", lr_warmup_steps=2, learning_rate=0.01, logging_steps=1)
    train_classifier(config)
    lines = (Path(config.output_dir) / "training_log.jsonl").read_text().splitlines()
    np.testing.assert_allclose([json.loads(line)["lr"] for line in lines], [0, 0.005, 0.01, 0.005])


def test_a_base_from_scratch_is_trained_whole_from_its_config_alone(config, base, tmp_path):
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "config.json").write_text((base / "config.json").read_text())
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "plan"), from_scratch=True)
    report = train_classifier(dataclasses.replace(config, adapter="full", learning_rate=1e-2))
    assert report["trainable_share"] == 1.0
    assert not torch.allclose(weight_of(load_classifier(classifier(config))), weight_of(base_model(base)), atol=0.05)
    with pytest.raises(UserError, match="adapter='atoms': from_scratch .* adapter \"full\""):
        train_classifier(config)


def test_the_bases_own_preprocessing_is_used_unless_a_resolution_is_asked_for(config, base, tmp_path):
    model = untrained(config)
    plain = open_processor(str(base), model)
    assert plain.size["shortest_edge"] == 224  # a ResNet's config does not know its images' size
    own = type(plain)(size={"shortest_edge": 20}, image_mean=[0.1] * 3, crop_pct=1.0)
    for part in base.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    own.save_pretrained(tmp_path)
    for resolution, side in ((None, 20), (16, 16)):
        processor = open_processor(str(tmp_path), model, resolution=resolution)
        pixels = processor(Image.new("RGB", (30, 40)), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, side, side) and list(processor.image_mean) == [0.1] * 3


def test_another_base_is_refused(config, tmp_path):
    train_classifier(config)
    other = ResNetForImageClassification.from_pretrained(config.pretrained_model_name_or_path)
    with torch.no_grad():
        weight_of(other)[0, 0, 0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    load_classifier(classifier(config), config.pretrained_model_name_or_path)
    with pytest.raises(UserError, match="not those that it was trained on"):
        load_classifier(classifier(config), str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pretrained_model_name_or_path": "no/such/folder"}, "'no/such/folder': neither a folder"),
        ({"train_data_dir": "nowhere"}, "train_data_dir='nowhere': no such folder"),
        ({"adapter": "nowhere.json"}, "adapter='nowhere.json': no such file"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
        ({"train_batch_size": 1, "resolution": 8}, "train_batch_size=1: .*at least 2, or batch_norm frozen"),
        ({"output_dir": "{images}/out"}, "output_dir=.*is inside train_data_dir"),
        ({"learning_rate": 1e30}, "step [23]: the (loss|gradient's norm) is (nan|inf); lower learning_rate"),
    ],
)
def test_mistakes_are_user_errors(config, fields, message):
    if "output_dir" in fields:
        fields = {"output_dir": fields["output_dir"].format(images=config.train_data_dir)}
    with pytest.raises(UserError, match=message):
        train_classifier(dataclasses.replace(config, **fields))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {**LORA, "target_modules": ["convolution", "classifier.1"], "exclude_modules": ["embedder.convolution"]},
            r"targets the head \(classifier.1\)",
        ),
        ({**LORA, "modules_to_save": ["classifier"]}, "modules_to_save=.*: leave it out"),
        ({**LORA, "init_lora_weights": "pissa"}, "init_lora_weights='pissa' rewrites the base"),
        ({**LORA, "target_modules": ["nothing"]}, "the adapter does not fit the base"),
        ({"peft_type": "ATOMS", "target_modules": ["normalization"]}, "atoms adapt"),
    ],
)
def test_adapters_that_do_not_fit_are_user_errors(config, adapter, message, tmp_path):
    (tmp_path / "adapter.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match=message):
        train_classifier(dataclasses.replace(config, adapter=str(tmp_path / "adapter.json")))


@pytest.fixture
def own_base(base, tmp_path):
    """A copy of the base that a test may change."""
    return Path(shutil.copytree(base, tmp_path / "base"))


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_base_from_scratch_is_in_float32_whatever_its_config_says(config, own_base, dtype):
    change(own_base / "config.json", dtype=dtype)
    assert open_model(str(own_base), "abc", from_scratch=True).dtype == torch.float32
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(own_base), from_scratch=True)
    assert train_classifier(dataclasses.replace(config, adapter="full"))["trainable_share"] == 1.0


@pytest.mark.parametrize(
    ("fields", "lost"),
    [({"depths": [1, 2]}, "layers.1.layer.0.convolution.weight"), ({"hidden_sizes": [8, 24]}, "convolution.weight")],
)
def test_a_base_whose_weights_would_partly_be_random_is_refused(own_base, fields, lost):
    change(own_base / "config.json", **fields)
    with pytest.raises(UserError, match=f"its weights lack .*{lost}"):
        open_model(str(own_base), "abc")


def test_damaged_weights_are_a_user_error(own_base):
    weights = own_base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="neither a folder with an image classifier .*header"):
        open_model(str(own_base), "abc")


def test_a_model_without_a_head_of_its_own_is_a_user_error(base, monkeypatch):
    build = ResNetForImageClassification.__init__

    def headless(self, config):
        build(self, config)
        self.resnet.classifier, self.classifier = self.classifier, torch.nn.Identity()

    monkeypatch.setattr(ResNetForImageClassification, "__init__", headless)
    with pytest.raises(UserError, match="does not tell its head from the rest"):
        open_model(str(base), "abc", from_scratch=True)


def test_damaged_preprocessing_is_told_and_not_replaced_by_another(own_base):
    (own_base / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="preprocessor_config.json: cannot be used .*; mend it, or remove it"):
        open_processor(str(own_base), open_model(str(own_base), "abc"))


@pytest.mark.parametrize("fields", [{"image_size": 32}, {"num_channels": 1}])
def test_pictures_that_a_base_does_not_take_are_told_before_training(config, tmp_path, fields):
    ViTConfig(**{**SMALL, "image_size": 16, "patch_size": 4, **fields}).save_pretrained(tmp_path / "vit")
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "vit"), from_scratch=True)
    with pytest.raises(UserError, match=r"images do not go through the model \(.*\); use another resolution"):
        train_classifier(dataclasses.replace(config, adapter="full"))


def test_a_method_that_needs_more_than_pictures_is_told_before_training(config, tmp_path):
    model = ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=4))
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "adapter.json").write_text(json.dumps({"peft_type": "POLY", "target_modules": ["q_proj", "query"]}))
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "vit"))
    with pytest.raises(UserError, match="do not go through the model .*task_ids.*or adapter"):
        train_classifier(dataclasses.replace(config, adapter=str(tmp_path / "adapter.json")))


def test_the_base_is_not_replaced_by_what_is_trained_on_it(config):
    train_classifier(dataclasses.replace(config, adapter="full"))
    before = (classifier(config) / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="would be replaced, but holds .*; name another output_dir"):
        train_classifier(dataclasses.replace(config, pretrained_model_name_or_path=str(classifier(config))))
    assert (classifier(config) / "model.safetensors").read_bytes() == before


def test_a_classifier_is_replaced_but_nothing_else(config):
    for method in ("full", "linear"):
        train_classifier(dataclasses.replace(config, adapter=method))
    assert not (classifier(config) / "model.safetensors").exists()
    (classifier(config) / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="is no classifier; move it away"):
        train_classifier(config)
    assert (classifier(config) / "head.safetensors").is_file()
    shutil.rmtree(classifier(config))
    classifier(config).write_text("a file of somebody")
    with pytest.raises(UserError, match="is no classifier; move it away"):
        train_classifier(config)


def test_a_save_that_fails_leaves_the_earlier_classifier(config, monkeypatch):
    train_classifier(config)
    before = logits(load_classifier(classifier(config)))

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("atomdiff.classify.saving.save_file", fail)
    with pytest.raises(WriteError, match="classifier: cannot be written .No space"):
        train_classifier(dataclasses.replace(config, seed=1))
    assert torch.equal(logits(load_classifier(classifier(config))), before)


def test_a_classifier_that_cannot_be_written_is_kept_elsewhere(config, monkeypatch, tmp_path):
    usual, spare = training.save_classifier, tmp_path / "spare"

    def full(folder, *rest):
        if folder.is_relative_to(config.output_dir):
            raise WriteError(folder, "No space left on device", "free some space")
        usual(folder, *rest)

    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    monkeypatch.setattr(training, "save_classifier", full)
    with pytest.raises(WriteError, match="classifier: cannot be written .No space.*spare"):
        train_classifier(config)
    load_classifier(next(spare.rglob("classifier")))
    assert not (Path(config.output_dir) / "report.json").exists()


def test_a_folder_in_which_another_run_writes_is_refused(config):
    with lock_folder(Path(config.output_dir)), pytest.raises(UserError, match="another run is writing there .process"):
        train_classifier(config)


def spoil(file, change):
    tensors = load_file(file)
    save_file(change(tensors), file)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("classifier.json", lambda file: file.write_text("{"), "classifier.json: not JSON .*; copy the folder again"),
        ("classifier.json", lambda file: file.write_text("{}"), "classifier.json: expected base_model, base_sha256"),
        (
            "head.safetensors",
            lambda file: spoil(
                file, lambda tensors: {name: tensor[:2] for name, tensor in tensors.items() if tensor.ndim}
            ),
            "head.safetensors: classifier.1.bias, classifier.1.weight.* missing, unknown or of another shape",
        ),
        (
            "head.safetensors",
            lambda file: spoil(file, lambda tensors: dict(list(tensors.items())[:-1])),
            "head.safetensors: .* missing, unknown",
        ),
        (
            "adapter_model.safetensors",
            lambda file: spoil(file, lambda tensors: dict(list(tensors.items())[:-1])),
            "the adapter does not fit the base: its tensors do not fit",
        ),
    ],
)
def test_damaged_classifiers_are_user_errors(config, file, damage, message):
    train_classifier(config)
    damage(classifier(config) / file)
    with pytest.raises(UserError, match=message):
        load_classifier(classifier(config))


def test_a_model_that_is_no_classifier_is_a_user_error(config, tmp_path):
    base = tmp_path / "base"
    CLIPConfig().text_config.save_pretrained(base)
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(base), from_scratch=True, adapter="full")
    with pytest.raises(UserError, match="neither a folder with an image classifier"):
        train_classifier(config)


def test_a_transformer_goes_through_as_well(config, tmp_path):
    ViTConfig(**SMALL, image_size=16, patch_size=4).save_pretrained(tmp_path / "base")
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "base"), resolution=None)
    report = train_classifier(dataclasses.replace(config, from_scratch=True, adapter="full"))
    tuned = dataclasses.replace(
        config, pretrained_model_name_or_path=str(classifier(config)), output_dir=f"{tmp_path}/t"
    )
    (tmp_path / "adapter.json").write_text(json.dumps({"peft_type": "ATOMS", "target_modules": "attention"}))
    report = train_classifier(dataclasses.replace(tuned, adapter=str(tmp_path / "adapter.json")))
    assert (
        report["num_trainable_parameters"]["adapter"] > 0 and report["num_trainable_parameters"]["head"] == 16 * 3 + 3
    )
    assert load_classifier(classifier(tuned)).config.image_size == 16
