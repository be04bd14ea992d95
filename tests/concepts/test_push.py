"""Concepts are pushed to the Hub with their model cards."""

import pytest
import torch
from huggingface_hub import constants

import atomdiff
from atomdiff.concepts.push import write_repository
from atomdiff.utils.errors import UserError
from tests.fake_hub import card_of, point_client_at
from tests.helpers import predict


@pytest.mark.slow
def test_what_is_pushed_is_loaded(hub_server, logged_in, concept, tiny_pipe, tmp_path):
    file, prediction = concept
    base = predict(tiny_pipe, "a photo of sks mug")
    assert atomdiff.push_to_hub(file, "ada/mug") == f"{hub_server.url}/ada/mug"
    assert hub_server.files("ada/mug").keys() == {"README.md", "my mug.v2.atoms.safetensors"}
    assert [summary for _, summary, _ in hub_server.repositories["ada/mug"]["commits"]][1:] == [
        "Upload a concept of atomdiff"
    ]
    assert atomdiff.load_atoms(tiny_pipe, "ada/mug") == "my_mug"
    assert torch.equal(predict(tiny_pipe, "a photo of sks mug"), prediction) and not torch.equal(prediction, base)
    atomdiff.unload_atoms(tiny_pipe)
    assert atomdiff.load_atoms(tiny_pipe, "ada/mug", "again", weight_name=file.name) == "again"
    assert torch.equal(predict(tiny_pipe, "a photo of sks mug"), prediction)


@pytest.mark.slow
def test_a_peft_adapter_is_pushed_and_loaded_with_its_word_and_all_components(hub_server, logged_in, lora, tiny_pipe):
    folder, prediction = lora
    (folder / "optimizer.bin").write_bytes(b"not for others")
    atomdiff.push_to_hub(folder, "ada/mug.lora", base_model="someone/stable-diffusion", trigger_phrase="sks cup")
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    words = {"README.md", "learned_embeds.safetensors"}
    assert hub_server.files("ada/mug.lora").keys() == adapter | words | {f"text_encoder/{name}" for name in adapter}
    data, text = card_of(hub_server.files("ada/mug.lora")["README.md"].decode())
    assert data["base_model"] == "someone/stable-diffusion" and data["instance_prompt"] == "sks cup"
    assert 'load_atoms(pipe, "ada/mug.lora")' in text and "LORA" in text
    assert atomdiff.load_atoms(tiny_pipe, "ada/mug.lora") == "mug"
    torch.testing.assert_close(predict(tiny_pipe, "a photo of sks mug"), prediction, atol=1e-6, rtol=0)
    assert set(atomdiff.list_atoms(tiny_pipe)[0].layers) == {"unet", "text_encoder"}


def test_a_folder_with_other_things_in_it_is_not_written_to(concept, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear diary")
    for folder, message in {
        tmp_path / "full": "full' exists already: give a new or empty folder",
        tmp_path / "full" / "diary.txt": "diary.txt' exists already",
        "x" * 300: "folder='x+: cannot be a path .File name too long.",
    }.items():
        with pytest.raises(UserError, match=message):
            write_repository(folder, concept[0], "ada/mug")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["diary.txt"]


def test_a_run_is_pushed_by_its_folder_and_a_wrong_path_asks_nobody(hub_server, logged_in, concept, tmp_path):
    assert atomdiff.push_to_hub(concept[0].parent, "mug", private=True) == f"{hub_server.url}/ada/mug"
    assert hub_server.repositories["ada/mug"]["private"] and concept[0].name in hub_server.files("ada/mug")
    asked = len(hub_server.asked)
    for path, message in {"ada/mug": "no file or directory 'ada/mug': check", tmp_path: "holds no concept"}.items():
        with pytest.raises(UserError, match=message):
            atomdiff.push_to_hub(path, "ada/mug")
    assert len(hub_server.asked) == asked


@pytest.mark.slow
def test_pushing_again_updates_or_opens_a_pull_request_and_can_leave_the_card(hub_server, logged_in, concept):
    atomdiff.push_to_hub(concept[0], "ada/mug")
    hub_server.files("ada/mug")["README.md"] = b"by hand"
    other = concept[0].with_name("other.atoms.safetensors")
    other.write_bytes(concept[0].read_bytes())
    atomdiff.push_to_hub(other, "ada/mug", model_card=False, commit_message="another")
    assert hub_server.files("ada/mug")["README.md"] == b"by hand" and other.name in hub_server.files("ada/mug")
    assert [summary for _, summary, _ in hub_server.repositories["ada/mug"]["commits"]][-1] == "another"
    url = atomdiff.push_to_hub(other, "ada/mug", create_pr=True)
    assert url.endswith("/ada/mug/discussions/1")
    assert hub_server.repositories["ada/mug"]["pulls"][0].keys() == {"README.md", other.name}
    assert hub_server.files("ada/mug")["README.md"] == b"by hand"


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        (
            "ada/mug",
            {},
            "cannot push to ada/mug: nobody is logged in; log in with `hf auth login`, set HF_TOKEN or pass",
        ),
        ("mug", {}, "cannot push to mug: nobody is logged in"),
        ("ada/mug", {"token": False}, "nobody is logged in"),
        ("ada/mug", {"token": "hf_wrong"}, "cannot push to ada/mug: the Hub does not accept the token"),
        ("mug", {"token": "hf_wrong"}, "cannot push to mug: the Hub does not accept the token"),
        ("mug", {"token": "hf_reader"}, "cannot push to mug: the token may only read; make one that may write"),
        (
            "ada/mug",
            {"token": "hf_reader"},
            r"the token may not do that \(no write access.*\); expected one that may write",
        ),
        ("bob/mug", {"token": "hf_writer"}, "cannot push to bob/mug: the token may not do that"),
        ("ada/a/b", {"token": "hf_writer"}, "cannot push to ada/a/b: Repo id must be in the form"),
        ("ada/mug", {"token": "hf_writer", "license": "nonsense"}, "Invalid metadata in README.md. - no such license"),
    ],
)
def test_what_cannot_be_pushed_is_said(hub_server, concept, repo_id, options, message):
    with pytest.raises(UserError, match=message):
        atomdiff.push_to_hub(concept[0], repo_id, **options)


def test_a_hub_that_is_not_there_is_said(hub_server, logged_in, concept, monkeypatch):
    with monkeypatch.context() as patch:
        point_client_at(patch, "http://127.0.0.1:1")
        with pytest.raises(UserError, match="http://127.0.0.1:1 cannot be reached .*; check the connection"):
            atomdiff.push_to_hub(concept[0], "ada/mug")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids access to the Hub; unset it"):
            atomdiff.push_to_hub(concept[0], "ada/mug")


def test_an_option_that_the_card_does_not_have_is_refused(hub_server, logged_in, concept):
    with pytest.raises(TypeError, match="there is no option licence: expected images, metrics, license, "):
        atomdiff.push_to_hub(concept[0], "ada/mug", licence="mit")
    assert not hub_server.asked
