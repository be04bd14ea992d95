"""Fixtures of the tests of training runs."""

import json

import pytest

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
METHODS = {
    "atoms": {"peft_type": "ATOMS", "channel_block": 2},
    "shared": {"peft_type": "ATOMS", "channel_block": 2, "basis": "dct", "share": "kind", "share_count": 2},
    "lora": {"peft_type": "LORA", "r": 2, "lora_dropout": 0.2, "target_modules": ATTENTION},
    "oft": {"peft_type": "OFT", "oft_block_size": 8, "target_modules": ATTENTION},
    "full": {"peft_type": "FULL"},
}


@pytest.fixture
def config(train_config):
    """A run of four steps."""
    return train_config(max_train_steps=4)


@pytest.fixture
def adapter_file(tmp_path):
    """Writes the JSON file of a method and returns its path."""

    def write(method):
        file = tmp_path / f"{method}.json"
        file.write_text(json.dumps(METHODS[method]))
        return str(file)

    return write


@pytest.fixture
def recorded(monkeypatch):
    """Records what every call of a method of a class gives, with the object it is called on."""

    def record(kind, name="sample"):
        method, calls = getattr(kind, name), []

        def call(self, *arguments):
            calls.append((self, method(self, *arguments)))
            return calls[-1][1]

        monkeypatch.setattr(kind, name, call)
        return calls

    return record


@pytest.fixture
def broken_base(tiny_pipe, tmp_path):
    """Fields of a run on a base whose VAE decodes to values that are not finite."""
    tiny_pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    tiny_pipe.save_pretrained(tmp_path / "broken")
    return {"pretrained_model_name_or_path": str(tmp_path / "broken")}
