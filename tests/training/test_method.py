import json

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig

from atomdiff.training.method import make_trainable, read_text_adapter
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.read_config import adapts_nothing, describe_adapter, read_adapter
from atomdiff.utils.errors import UserError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def write(tmp_path, content):
    file = tmp_path / "adapter.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_reading(tmp_path):
    assert read_adapter("full") is None
    assert read_adapter(write(tmp_path, {"peft_type": "FULL"})) is None
    assert describe_adapter(read_adapter("atoms")) == describe_adapter(AtomConfig())
    nothing = read_adapter("none")
    assert adapts_nothing(nothing) and not adapts_nothing(AtomConfig()) and not adapts_nothing(None)
    assert describe_adapter(read_adapter(write(tmp_path, {"peft_type": "NONE"}))) == describe_adapter(nothing)
    lora = read_adapter(write(tmp_path, {"peft_type": "LORA", "r": 3, "target_modules": ATTENTION}))
    assert isinstance(lora, LoraConfig) and lora.r == 3
    atoms = read_adapter(write(tmp_path, {"peft_type": "ATOMS", "channel_block": 2}))
    assert isinstance(atoms, AtomConfig) and atoms.channel_block == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as YAML or JSON"),
        ("[1]", "expected a JSON object"),
        ({"r": 4}, "peft_type=None; expected one of FULL, .*LORA"),
        ({"peft_type": "LORE"}, "peft_type='LORE'; expected one of FULL, NONE"),
        ({"peft_type": "NONE", "r": 4}, "found peft_type, r; expected peft_type='NONE' alone"),
        ({"peft_type": "LORA", "rank": 4}, "LoraConfig has no field rank; it has: .*r, "),
        ({"peft_type": "MONA", "hidden": 4}, "MonaConfig has no field hidden; it has: dropout, .*hidden_size"),
        ({"peft_type": "ATOMS", "channel_block": 0}, "channel_block=0"),
        ({"peft_type": "ATOMS", "modules_to_save": ["conv_in"]}, "replaces whole modules: leave it out"),
        ({"peft_type": "OFT", "bias": "all"}, "bias='all' trains biases of the base"),
        ({"peft_type": "HRA", "bias": "hra_only"}, "bias='hra_only' trains biases of the base"),
        ({"peft_type": "LORA", "bias": "lora_only"}, "bias='lora_only' trains biases of the base"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "init_lora_weights='pissa' rewrites the base"),
        ({"peft_type": "LORA", "target_parameters": ["weight"]}, "target_parameters=.* leave it out"),
    ],
)
def test_bad_files_are_user_errors(tmp_path, content, message):
    with pytest.raises(UserError, match=f"adapter.json: .*{message}"):
        read_adapter(write(tmp_path, content))


@pytest.mark.parametrize(
    ("unet", "text", "message"),
    [
        (
            {"select_budget": "8KB"},
            {"select_budget": "9KB"},
            "found 8,000 bytes and 9,000 bytes .* give all of them the",
        ),
        ({"select_budget": "8KB"}, {}, "found 8,000 bytes and none .* one size"),
        ({"select_budget": "8KB"}, {"peft_type": "LORA"}, "no concept file, whose size select_budget='8KB' is"),
        ({"peft_type": "LORA"}, {"select_budget": "8KB"}, "no concept file, whose size select_budget='8KB' is"),
    ],
)
def test_two_budgets_and_a_budget_of_no_file_are_refused(tmp_path, unet, text, message):
    def config(values):
        is_lora = values.get("peft_type") == "LORA"
        usual = {"target_modules": ATTENTION} if is_lora else {"peft_type": "ATOMS", "select": "adaptive"}
        return write(tmp_path, usual | values)

    adapter = read_adapter(config(unet))
    with pytest.raises(UserError, match=message):
        read_text_adapter(config(text), adapter)


def test_one_budget_of_both_is_read_as_people_write_it(tmp_path):
    adapter = AtomConfig(select="adaptive", select_budget="8KB")
    text = {"peft_type": "ATOMS", "select": "adaptive", "select_budget": 8000, "target_modules": "attention"}
    assert read_text_adapter(write(tmp_path, text), adapter).budget == adapter.budget
    plain = write(tmp_path, {"peft_type": "ATOMS", "target_modules": "attention"})
    assert read_text_adapter(plain, adapter).budget is None


def test_a_missing_file_is_a_user_error():
    with pytest.raises(UserError, match="adapter='nowhere.json': no such file"):
        read_adapter("nowhere.json")


def test_descriptions_are_equal_for_equal_configs():
    one, two = (LoraConfig(target_modules=targets) for targets in (ATTENTION, ATTENTION[::-1]))
    assert describe_adapter(one) == describe_adapter(two) == json.loads(json.dumps(describe_adapter(one)))
    assert describe_adapter(one) != describe_adapter(LoraConfig(r=2, target_modules=ATTENTION))


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        AtomConfig(channel_block=2),
        LoraConfig(r=2, target_modules=ATTENTION),
        OFTConfig(oft_block_size=8, target_modules=ATTENTION),
    ],
    ids=["atoms", "lora", "oft"],
)
def test_only_the_adapter_is_trained_in_float32_and_starts_from_the_seed(tiny_pipe, adapter):
    base = {name for name, _ in tiny_pipe.unet.named_parameters()}
    random_state = torch.get_rng_state()
    unet = tiny_pipe.unet.to(torch.bfloat16)
    make_trainable(unet, adapter, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trained and not base & trained.keys()
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}

    again = type(unet).from_config(unet.config).to(torch.bfloat16)
    make_trainable(again, adapter, seed=0)
    started = dict(again.named_parameters())
    assert all(torch.equal(parameter, started[name]) for name, parameter in trained.items())


def test_none_trains_nothing(tiny_pipe):
    make_trainable(tiny_pipe.unet, read_adapter("none"), seed=0)
    assert not any(parameter.requires_grad for parameter in tiny_pipe.unet.parameters())


def test_full_tuning_trains_everything(tiny_pipe):
    make_trainable(tiny_pipe.unet.to(torch.float16), None, seed=0)
    assert all(
        parameter.requires_grad and parameter.dtype == torch.float32 for parameter in tiny_pipe.unet.parameters()
    )


def test_settings_that_peft_answers_with_other_errors_are_user_errors(tiny_pipe):
    with pytest.raises(UserError, match="does not fit the base: KeyError"):
        make_trainable(tiny_pipe.unet, IA3Config(target_modules=["to_q"]), seed=0)


def test_an_adapter_that_finds_no_layer_is_a_user_error(tiny_pipe):
    with pytest.raises(UserError, match="does not fit the base"):
        make_trainable(tiny_pipe.unet, LoraConfig(target_modules=["nothing"]), seed=0)
