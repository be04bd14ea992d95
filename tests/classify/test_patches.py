"""Patches: switched to the bit, in any order, and taken out without a trace; a failed load changes nothing."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForImageClassification, ResNetForImageClassification, ResNetModel

from atomdiff.classify import list_patches, load_classifier, load_patch, open_base, set_active, unload_patch
from atomdiff.utils.errors import UserError
from tests.helpers import change_tensors

NAMES = ("atoms", "lora", "norms", "loha", "frozen", "linear", "followed")


@pytest.fixture
def model(base):
    return open_base(str(base))


@pytest.fixture
def everything():
    """Gives all that can be seen of a model: modules, tensors where they lie and their bits, config and records."""

    def look(model):
        tensors = {path: (tensor.data_ptr(), tensor.clone()) for path, tensor in model.state_dict().items()}
        modules = [(path, id(module), module.training) for path, module in model.named_modules()]
        settings = [(layer._disable_adapters, layer.active_adapters) for layer in model.modules() if is_adapted(layer)]
        flags = [(path, parameter.requires_grad) for path, parameter in model.named_parameters()]
        return tensors, modules, settings, flags, model.config.to_dict(), set(vars(model)), model.num_labels

    return look


def is_adapted(layer):
    return hasattr(layer, "_disable_adapters")


def assert_same(now, before):
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys()
    for path, (address, tensor) in before[0].items():
        assert now[0][path][0] == address and torch.equal(now[0][path][1], tensor), path


def test_every_patch_is_what_was_saved_in_any_order_and_the_base_comes_back(model, patches, logits, everything, base):
    own, before = logits(model), everything(model)
    alone = {name: logits(load_classifier(patches[name])) for name in NAMES}
    assert len({str(values.tolist()) for values in alone.values()}) == len(NAMES)
    for name in NAMES:
        assert load_patch(model, patches[name]) == name
        assert torch.equal(logits(model), alone[name])
    for name in ("lora", "norms", "atoms", None, "linear", "loha", "followed", "frozen", None, "norms"):
        set_active(model, name)
        assert torch.equal(logits(model), own if name is None else alone[name])
        assert model.config.num_labels == model.num_labels == logits(model).shape[1]
    assert model.config.id2label == {0: "across", 1: "down", 2: "tilted"} and model.config.label2id["down"] == 1
    assert [patch.name for patch in list_patches(model) if patch.active] == ["norms"]
    unload_patch(model, "lora")
    set_active(model, "atoms")
    unload_patch(model, "atoms")
    assert torch.equal(logits(model), own)
    set_active(model, "frozen")
    assert torch.equal(logits(model), alone["frozen"])
    unload_patch(model)
    assert_same(everything(model), before)
    assert torch.equal(logits(model), logits(AutoModelForImageClassification.from_pretrained(base)))


def test_patches_are_listed_with_their_classes(model, patches):
    assert list_patches(model) == []
    for name in ("atoms", "lora", "linear"):
        load_patch(model, patches[name], f"my-{name}")
    found = {patch.name: (patch.method, len(patch.classes), patch.active) for patch in list_patches(model)}
    assert found == {"my-atoms": ("ATOMS", 3, False), "my-lora": ("LORA", 2, False), "my-linear": ("", 2, True)}


def test_a_base_without_a_head_gives_its_features(base, patches, logits, tmp_path):
    ResNetModel.from_pretrained(base).save_pretrained(tmp_path / "headless")
    model = open_base(str(tmp_path / "headless"))
    features = logits(model)
    assert features.shape == (4, 16) and model.config.num_labels == 0
    assert torch.equal(features, logits_of_features(model))
    load_patch(model, patches["atoms"])
    assert torch.equal(logits(model), logits(load_classifier(patches["atoms"])))
    unload_patch(model)
    assert torch.equal(logits(model), features) and model.config.id2label == {}


def logits_of_features(model):
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.resnet(pixels).pooler_output.flatten(1)


def copy_of(patch, tmp_path):
    return shutil.copytree(patch, tmp_path / "copy" / "classifier")


def edit(**fields):
    def change(folder):
        file = folder / "classifier.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def without_last(file):
    return lambda folder: change_tensors(folder / file, lambda tensors: dict(list(tensors.items())[:-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(base_sha256="0" * 64), "the weights of .* are not those that it was trained on; use a copy of"),
        (edit(classes=["a", "b"]), "head.safetensors: classifier.1.bias, classifier.1.weight.* of another shape"),
        (without_last("head.safetensors"), "head.safetensors: .* missing, unknown"),
        (without_last("adapter_model.safetensors"), "the adapter does not fit the base: its tensors do not fit"),
        (lambda folder: (folder / "config.json").write_text("{}"), "full tuning has weights of its own"),
        (lambda folder: (folder / "classifier.json").unlink(), "no classifier in it"),
    ],
)
@pytest.mark.parametrize("active", ["followed", None])
def test_a_load_that_fails_changes_nothing(model, patches, logits, everything, change, message, active, tmp_path):
    load_patch(model, patches["lora"])
    load_patch(model, patches["followed"])
    set_active(model, active)
    folder = copy_of(patches["atoms"], tmp_path)
    change(folder)
    own, before = logits(model), everything(model)
    with pytest.raises(UserError, match=message):
        load_patch(model, folder)
    assert_same(everything(model), before)
    assert torch.equal(logits(model), own)


def test_what_cannot_have_patches_is_refused(model, patches, base):
    with pytest.raises(UserError, match="linear: no classifier in it; .*; give .*linear/classifier, the classifier of"):
        load_patch(model, patches["linear"].parent)
    with pytest.raises(UserError, match="ResNetModel cannot be split into head and base"):
        load_patch(ResNetModel.from_pretrained(base), patches["linear"])
    with pytest.raises(UserError, match="weights are torch.bfloat16; .*load them first, then convert"):
        load_patch(ResNetForImageClassification.from_pretrained(base).bfloat16(), patches["linear"])
    other = ResNetForImageClassification.from_pretrained(base)
    other.add_adapter(LoraConfig(r=2, target_modules=["convolution"]), "mine")
    with pytest.raises(UserError, match="adapters that are no patches .mine"):
        load_patch(other, patches["linear"])
    load_patch(model, patches["linear"])
    with pytest.raises(UserError, match="'linear' is loaded already"):
        load_patch(model, patches["atoms"], "linear")
    for call in (set_active, unload_patch):
        with pytest.raises(UserError, match="there is no patch 'atoms'; loaded are: 'linear'"):
            call(model, "atoms")


def test_a_patch_whose_adapter_was_deleted_is_not_half_applied(model, patches, logits):
    own = logits(model)
    load_patch(model, patches["lora"])
    set_active(model, None)
    model.delete_adapter("lora")
    with pytest.raises(UserError, match="adapter of the patch 'lora' has been deleted"):
        set_active(model, "lora")
    unload_patch(model)
    assert torch.equal(logits(model), own)


def test_what_is_not_in_use_follows_the_model(model, patches):
    for name in ("followed", "atoms"):
        load_patch(model, patches[name])
    model.double().train()
    for name in ("followed", None, "atoms"):
        set_active(model, name)
        assert model(torch.zeros(2, 3, 16, 16, dtype=torch.float64)).logits.dtype == torch.float64
        assert all(module.training for path, module in model.named_modules() if path.startswith("classifier"))


def test_statistics_that_follow_images_stay_with_their_patch(model, patches, logits):
    for name in ("followed", "atoms"):
        load_patch(model, patches[name])
    before = {name: (set_active(model, name), logits(model))[1] for name in ("followed", "atoms", None)}
    set_active(model, "followed")
    model.train()(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)))
    after = {name: (set_active(model, name), logits(model))[1] for name in ("followed", "atoms", None)}
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"followed"}


def test_a_loss_has_the_classes_of_the_patch(model, patches):
    load_patch(model, patches["lora"])
    pixels, labels = torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])
    for name, classes in (("lora", 2), (None, 5)):
        set_active(model, name)
        output = model(pixels, labels=labels)
        expected = torch.nn.functional.cross_entropy(output.logits, labels)
        assert output.logits.shape == (2, classes) and torch.allclose(output.loss, expected)
