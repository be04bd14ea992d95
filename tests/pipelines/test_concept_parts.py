"""All of a concept is loaded, or what is not is named."""

import copy
import re
import warnings

import pytest
import torch
from peft import GraloraConfig, LoraConfig, get_peft_model

import atomdiff
from atomdiff.cli.summary import describe
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapter_state import adapter_layers
from atomdiff.utils.errors import UserError
from tests.helpers import add_adapter
from tests.pipelines.helpers import assert_same_bits, bits


def train(pipe, config, parts=("unet",), words=()):
    """Add an adapter with random numbers, and words with an embedding for each of some text encoders."""
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        of_part = copy.deepcopy(config)
        if part != "unet":
            of_part.target_modules = ["q_proj"]
        add_adapter(pipe, "default", of_part, [part], scale=0.05)
    for word in words:
        add_placeholder_token(pipe, word)
        encoders = [name for name in ("text_encoder", "text_encoder_2") if pipe.components.get(name)]
        set_token_embedding(pipe, word, {name: torch.randn(32, generator=generator) for name in encoders})


def saved(pipe, path, config, parts=("unet",), words=()):
    train(pipe, config, parts, words)
    saved = atomdiff.save_atoms(pipe, path, dtype=torch.float32)
    atomdiff.unload_atoms(pipe)
    return saved


def with_unet(pipe, **changes):
    """Give a pipeline a UNet with other ends and else the same weights."""
    unet, old = type(pipe.unet).from_config(pipe.unet.config, **changes).eval(), pipe.unet.state_dict()
    fits = {key: old[key] for key, value in unet.state_dict().items() if key in old and old[key].shape == value.shape}
    unet.load_state_dict(fits, strict=False)
    pipe.unet = unet
    return pipe


METHODS = {
    "atoms": lambda: AtomConfig(),
    "joint": lambda: AtomConfig(joint=True, num_atoms=40),
    "lora": lambda: LoraConfig(r=2, target_modules=["conv_in", "conv_out", "conv1", "to_q"]),
    "lora by pattern": lambda: LoraConfig(r=2, target_modules=r".*(conv_in|conv_out|conv1)", exclude_modules=r"up_.*"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ends", [{"in_channels": 9}, {"in_channels": 5, "out_channels": 6}])
def test_an_end_for_other_latents_is_left_out_and_named(tiny_pipe, tmp_path, method, ends, user_warnings):
    suffix = ".safetensors" if "lora" not in method else ""
    path = saved(tiny_pipe, tmp_path / f"mug{suffix}", METHODS[method]())
    atomdiff.load_atoms(tiny_pipe, path, "mug")
    atomdiff.set_active(tiny_pipe, "mug")
    expected = tiny_pipe.unet.down_blocks[0].resnets[0].conv1.get_base_layer().weight.clone()
    atomdiff.unload_atoms(tiny_pipe)
    before = bits(with_unet(tiny_pipe, **ends))
    gone = {"in_channels": "conv_in", "out_channels": "conv_out"}
    with pytest.warns(UserWarning, match="loaded 'mug' without ") as caught:
        atomdiff.load_atoms(tiny_pipe, path, "mug")
    (warning,) = user_warnings(caught)
    assert all(f"unet.{gone[end]}" in str(warning.message) for end in ends)
    atomdiff.set_active(tiny_pipe, "mug")
    assert torch.equal(tiny_pipe.unet.down_blocks[0].resnets[0].conv1.get_base_layer().weight, expected)
    for end in ends:
        assert isinstance(getattr(tiny_pipe.unet, gone[end]), torch.nn.Conv2d)
    atomdiff.unload_atoms(tiny_pipe)
    assert_same_bits(bits(tiny_pipe), before)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atoms", "lora"])
def test_a_base_without_some_layers_takes_the_rest_where_that_is_asked_for(tiny_pipe, tmp_path, method):
    path = saved(tiny_pipe, tmp_path / ("mug.safetensors" if method == "atoms" else "mug"), METHODS[method]())
    before = bits(with_unet(tiny_pipe, mid_block_type=None))
    with pytest.raises(UserError, match="allow_base_mismatch=True (loads|for) the"):
        atomdiff.load_atoms(tiny_pipe, path, "mug")
    assert_same_bits(bits(tiny_pipe), before)
    with pytest.warns(UserWarning, match=r"without unet.mid_block\S+"):
        atomdiff.load_atoms(tiny_pipe, path, "mug", allow_base_mismatch=True)
    assert adapter_layers(tiny_pipe.unet, "mug")
    atomdiff.unload_atoms(tiny_pipe)
    assert_same_bits(bits(tiny_pipe), before)


@pytest.mark.parametrize("change", [{"mid_block_type": None}, {"cross_attention_dim": 48}])
def test_methods_that_cannot_exclude_modules_leave_them_out_as_others_do(tiny_pipe, tmp_path, change):
    path = saved(tiny_pipe, tmp_path / "mug", GraloraConfig(r=2, gralora_k=2, target_modules=["to_k"]))
    before = bits(with_unet(tiny_pipe, **change))
    with pytest.warns(UserWarning, match=r"without unet\.\S+to_k"):
        atomdiff.load_atoms(tiny_pipe, path, "mug", allow_base_mismatch=True)
    assert adapter_layers(tiny_pipe.unet, "mug")
    atomdiff.unload_atoms(tiny_pipe)
    assert_same_bits(bits(tiny_pipe), before)


def test_a_base_in_which_nothing_fits_is_refused_in_any_case(tiny_pipe, tmp_path):
    path = saved(tiny_pipe, tmp_path / "mug.safetensors", AtomConfig(target_modules=["conv_in"]))
    with_unet(tiny_pipe, in_channels=9)
    for allowed in (False, True):
        with pytest.raises(UserError, match=r"does not fit this base: unet\.conv_in"):
            atomdiff.load_atoms(tiny_pipe, path, allow_base_mismatch=allowed)


def test_inspect_names_what_does_not_fit(tiny_pipe, tmp_path):
    path = saved(tiny_pipe, tmp_path / "mug.safetensors", AtomConfig())
    text = describe(path, with_unet(tiny_pipe, in_channels=9))
    assert re.search(r"does not fit +unet.conv_in \(from 9 to 32 channels here\)", text)
    assert "unet atom_delta" in text


def test_parts_for_text_encoders_that_are_not_there_are_named(tiny_xl_pipe, tmp_path):
    encoders = ("text_encoder", "text_encoder_2")
    path = saved(tiny_xl_pipe, tmp_path / "mug.safetensors", AtomConfig(), ("unet", *encoders), ["sks"])
    tiny_xl_pipe.text_encoder = tiny_xl_pipe.tokenizer = None
    before = bits(tiny_xl_pipe)
    with pytest.warns(
        UserWarning, match="the layers of text_encoder, .*; without the embedding of 'sks' for text_encoder,"
    ):
        atomdiff.load_atoms(tiny_xl_pipe, path, "mug")
    (concept,) = atomdiff.list_atoms(tiny_xl_pipe)
    assert set(concept.layers) == {"unet", "text_encoder_2"} and concept.trigger_words == ("sks",)
    atomdiff.unload_atoms(tiny_xl_pipe)
    assert_same_bits(bits(tiny_xl_pipe), before)
    tiny_xl_pipe.text_encoder_2 = tiny_xl_pipe.tokenizer_2 = None
    with pytest.warns(UserWarning, match="without the layers of text_encoder_2"):
        atomdiff.load_atoms(tiny_xl_pipe, path, "mug")
    (concept,) = atomdiff.list_atoms(tiny_xl_pipe)
    assert set(concept.layers) == {"unet"} and not concept.trigger_words


def test_a_word_for_other_text_encoders_only_is_refused(tiny_pipe, tiny_xl_pipe, tmp_path):
    add_placeholder_token(tiny_xl_pipe, "sks")
    set_token_embedding(tiny_xl_pipe, "sks", {"text_encoder_2": torch.ones(32)})
    path = atomdiff.save_atoms(tiny_xl_pipe, tmp_path / "word.safetensors")
    with pytest.raises(UserError, match="nothing of it .* the embedding of 'sks' for text_encoder_2"):
        atomdiff.load_atoms(tiny_pipe, path)
    set_token_embedding(tiny_xl_pipe, "sks", {"text_encoder": torch.ones(32)})
    atomdiff.save_atoms(tiny_xl_pipe, path)
    with pytest.warns(UserWarning, match="without the embedding of 'sks' for text_encoder_2"):
        assert atomdiff.load_atoms(tiny_pipe, path) == "word"


@pytest.fixture
def peft_folder(tiny_pipe, tmp_path):
    """What a script leaves that trains with `get_peft_model` and calls `save_pretrained` for each model."""
    for part, target in (("unet", "to_q"), ("text_encoder", "q_proj")):
        model = copy.deepcopy(getattr(tiny_pipe, part))
        config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_peft_model(model, config).save_pretrained(tmp_path / "mug" / part)
    return tmp_path / "mug"


def test_a_folder_with_an_adapter_for_each_model_loads_all(tiny_pipe, peft_folder):
    before = bits(tiny_pipe)
    assert atomdiff.load_atoms(tiny_pipe, peft_folder) == "mug"
    assert atomdiff.list_atoms(tiny_pipe)[0].layers == {"text_encoder": 2, "unet": 8}
    atomdiff.unload_atoms(tiny_pipe)
    assert_same_bits(bits(tiny_pipe), before)
    assert atomdiff.load_atoms(tiny_pipe, peft_folder / "unet") == "unet"
    assert atomdiff.list_atoms(tiny_pipe)[0].layers == {"unet": 8}


def test_adapters_for_models_that_are_not_there_are_named(tiny_pipe, peft_folder):
    (peft_folder / "text_encoder").rename(peft_folder / "text_encoder_2")
    with pytest.warns(UserWarning, match="loaded 'mug' without the adapters in text_encoder_2, which this pipeline"):
        atomdiff.load_atoms(tiny_pipe, peft_folder)
    assert atomdiff.list_atoms(tiny_pipe)[0].layers == {"unet": 8}


def test_two_adapters_for_one_model_are_refused(tiny_pipe, peft_folder):
    for file in (peft_folder / "unet").iterdir():
        (peft_folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="both hold an adapter for unet"):
        atomdiff.load_atoms(tiny_pipe, peft_folder)


@pytest.mark.slow
def test_a_folder_of_concepts_says_how_to_choose(tiny_pipe, peft_folder):
    (peft_folder / "unet").rename(peft_folder / "cat")
    (peft_folder / "text_encoder").rename(peft_folder / "text_encoder_2")
    with pytest.raises(UserError, match="adapters for cat, text_encoder_2, .*choose one by subfolder"):
        atomdiff.load_atoms(tiny_pipe, peft_folder)
    assert atomdiff.load_atoms(tiny_pipe, peft_folder, subfolder="cat") == "cat"
