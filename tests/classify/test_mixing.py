"""Mixed batches: each sample gets the logits that its patch gives it alone, and nothing is left behind."""

import json

import pytest
import torch
from torch import inf
from transformers import ResNetModel, SwinConfig, SwinForImageClassification

from atomdiff.classify import list_patches, load_patch, mixed_batch, open_base, set_active, unload_patch
from atomdiff.classify.config import ClassifyConfig
from atomdiff.classify.train import train_classifier
from atomdiff.tuner.adapter_state import adapter_layers
from atomdiff.utils.errors import UserError


@pytest.fixture
def model(base, patches):
    model = open_base(str(base))
    for name in ("lora", "atoms", "linear", "followed", "frozen", "loha"):
        load_patch(model, patches[name])
    set_active(model, "linear")
    return model


@torch.no_grad()
def assert_mixes(model, samples, side=16):
    """Compare with each sample alone; classes that it does not have are at -inf."""
    pixels = torch.randn(len(samples), 3, side, side, generator=torch.Generator().manual_seed(1))
    active = [patch.name for patch in list_patches(model) if patch.active]
    alone = []
    for sample, image in zip(samples, pixels, strict=True):
        set_active(model, sample)
        alone.append(model(image[None]).logits[0])
    set_active(model, *active)
    before = model(pixels).logits
    with mixed_batch(model, samples):
        mixed = model(pixel_values=pixels).logits
    assert mixed.shape == (len(samples), max(map(len, alone)))
    for row, own in zip(mixed, alone, strict=True):
        torch.testing.assert_close(row[: len(own)], own, atol=1e-5, rtol=1e-5)
        assert (row[len(own) :] == -inf).all()
    assert len({str(own.tolist()) for own in alone}) == len(samples)
    assert torch.equal(model(pixels).logits, before)
    return mixed


@pytest.mark.parametrize(
    "samples",
    [
        ["atoms", "frozen", "atoms", None],
        ["followed", "linear", None],
        ["lora", "atoms", "lora", "frozen", None, "followed"],
        ["lora", "linear"],
        ["frozen"],
    ],
)
def test_each_sample_has_its_own_patch(model, samples):
    assert_mixes(model, samples)


def test_adapters_of_activations_mix_too(model, patches):
    for name in ("mona", "conv_adapter", "combined"):
        load_patch(model, patches[name])
    assert_mixes(model, ["mona", "atoms", "conv_adapter", None, "mona", "combined"])


def test_adapters_of_both_kinds_wrap_each_other_in_any_order(base, patches):
    model = open_base(str(base))
    for name in ("atoms", "lora", "frozen"):  # LoRA around atoms; above, atoms around LoRA
        load_patch(model, patches[name])
    assert_mixes(model, ["lora", "frozen", None, "atoms", "lora"])


def test_nothing_is_left_behind(model, patches):
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="by the user"):
        with mixed_batch(model, ["atoms", "lora", "followed"]):
            raise RuntimeError("by the user")
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [patch.name for patch in list_patches(model) if patch.active] == ["linear"]
    unload_patch(model)
    assert not vars(model).keys() & {"peft_config", "_atomdiff_patches"}


def test_what_cannot_be_mixed_is_refused(model, patches):
    pixels = torch.zeros(2, 3, 16, 16)
    for samples, message in (
        ("atoms", "give a list"),
        ([], "give a list"),
        (["atoms", "missing"], "there is no patch 'missing'"),
        (["atoms", "loha"], "'loha' is a LOHA adapter, which PEFT cannot give to some samples"),
    ):
        with pytest.raises(UserError, match=message):
            with mixed_batch(model, samples):
                pass
    with mixed_batch(model, ["atoms", None]):
        with pytest.raises(UserError, match="batch of 3 for 2 samples"):
            model(torch.zeros(3, 3, 16, 16))
        with pytest.raises(UserError, match="no loss"):
            model(pixels, labels=torch.zeros(2, dtype=torch.long))
        for call in (
            lambda: set_active(model, None),
            lambda: unload_patch(model),
            mixed_batch(model, [None]).__enter__,
        ):
            with pytest.raises(UserError, match="a mixed batch is in progress"):
                call()
    model.train()
    with pytest.raises(UserError, match="model.eval"):
        with mixed_batch(model, ["atoms"]):
            pass
    assert [patch.name for patch in list_patches(model) if patch.active] == ["linear"]


def test_dora_is_refused(model, monkeypatch):
    for layer in adapter_layers(model, "lora").values():
        monkeypatch.setitem(layer.use_dora, "lora", True)
    with pytest.raises(UserError, match="'lora' is a LORA adapter, which PEFT cannot give to some samples"):
        with mixed_batch(model, ["lora", None]):
            pass


def test_a_base_without_a_head_has_no_classes_for_a_sample(base, patches, tmp_path):
    ResNetModel.from_pretrained(base).save_pretrained(tmp_path / "headless")
    model = open_base(str(tmp_path / "headless"))
    for name in ("atoms", "followed"):
        load_patch(model, patches[name])
    assert_mixes(model, ["followed", "atoms"])
    with pytest.raises(UserError, match="the base has no head of its own"):
        with mixed_batch(model, ["atoms", None]):
            pass


ADAPTERS = {
    "atoms": {"peft_type": "ATOMS", "target_modules": "all", "channel_block": 4},
    "lora": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "query", "dense"], "init_lora_weights": False},
    "road": {"peft_type": "ROAD", "group_size": 4, "target_modules": ["q_proj", "query", "dense"]},
}


def test_windows_of_an_image_are_its_own(images, tmp_path):
    """Swin lays the windows of all images along the first axis."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = SwinForImageClassification(
            SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4, num_labels=4)
        )
    base.save_pretrained(tmp_path / "base")
    model = open_base(str(tmp_path / "base"))
    for name, adapter in ADAPTERS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(adapter))
        train_classifier(
            ClassifyConfig(
                pretrained_model_name_or_path=str(tmp_path / "base"),
                train_data_dir=str(images),
                output_dir=str(tmp_path / name),
                adapter=str(tmp_path / f"{name}.json"),
                learning_rate=3e-2,
                max_train_steps=2,
                train_batch_size=4,
            )
        )
        load_patch(model, tmp_path / name / "classifier")
    assert_mixes(model, ["atoms", "road", None, "lora"])
