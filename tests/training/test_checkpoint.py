import json
import shutil
import time

import pytest
import torch

from atomdiff.training.checkpoint import Checkpoint, choose_checkpoint, find_checkpoints, save_checkpoint
from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError

CONFIG = {
    "seed": 0,
    "learning_rate": 1e-3,
    "adapter": {"peft_type": "LORA", "r": 4},
    "gradient_accumulation_steps": 1,
    "num_processes": 1,
}


def save(folder, step, config=CONFIG, limit=None):
    save_checkpoint(folder, step, {"step": step, "parameters": {"a": torch.arange(3.0)}}, config, limit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path, 7)
    state = find_checkpoints(tmp_path)[0].load(CONFIG)
    assert state["step"] == 7
    torch.testing.assert_close(state["parameters"]["a"], torch.arange(3.0))


def test_only_the_newest_are_kept(tmp_path):
    for step in (100, 200, 1000):
        save(tmp_path, step, limit=2)
    assert names(tmp_path) == ["checkpoint-1000", "checkpoint-200"]


def test_latest_is_the_one_written_last_not_the_one_with_most_steps(tmp_path):
    for step in (1000, 50):  # a second run in the same folder
        save(tmp_path, step)
    assert choose_checkpoint("latest", tmp_path).folder.name == "checkpoint-50"
    save(tmp_path, 1000)
    assert choose_checkpoint("latest", tmp_path).folder.name == "checkpoint-1000"


def test_a_clock_that_was_set_back_costs_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 2)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    save(tmp_path, 4, limit=1)
    assert names(tmp_path) == ["checkpoint-4"]
    save(tmp_path, 6)
    assert choose_checkpoint("latest", tmp_path).folder.name == "checkpoint-6"


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, limit=1)
    assert choose_checkpoint("latest", tmp_path).folder.name == "checkpoint-1"
    monkeypatch.undo()
    save(tmp_path, 2, limit=1)
    assert names(tmp_path) == ["checkpoint-2"]


def test_choosing(tmp_path):
    assert choose_checkpoint(None, tmp_path) is None
    assert choose_checkpoint("latest", tmp_path / "nowhere") is None
    save(tmp_path, 5)
    expected = Checkpoint(tmp_path / "checkpoint-5")
    assert choose_checkpoint("checkpoint-5", tmp_path) == choose_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path)
    assert choose_checkpoint("checkpoint-5", tmp_path) == expected
    with pytest.raises(UserError, match="'checkpoint-6': no such checkpoint; .* holds checkpoint-5"):
        choose_checkpoint("checkpoint-6", tmp_path)


def test_another_config_is_refused_but_rates_and_steps_may_change(tmp_path):
    save(tmp_path, 5)
    checkpoint = choose_checkpoint("latest", tmp_path)
    assert checkpoint.load({**CONFIG, "learning_rate": 1e-4, "max_train_steps": 9})["step"] == 5
    with pytest.raises(UserError, match="written with seed=0, now 1"):
        checkpoint.load({**CONFIG, "seed": 1})
    with pytest.raises(UserError, match="adapter="):
        checkpoint.load({**CONFIG, "adapter": {"peft_type": "LORA", "r": 8}})


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ((1, 2), (1, 2), None),
        ((1, 2), (2, 1), None),
        ((3, 4), (6, 2), None),
        ((4, 1), (2, 2), None),
        ((4, 1), (4, 2), r"=4 on 1 process\(es\), now .*=4 on 2 .*before \(4\): use .*_steps=2, or start"),
        ((1, 2), (1, 1), r"=1 on 2 process\(es\), now .*=1 on 1 .*before \(2\): use .*_steps=2, or start"),
        ((2, 1), (2, 2), r"=2 on 1 process\(es\), now .*=2 on 2 .*\(2\): use gradient_accumulation_steps=1, or start"),
        ((1, 1), (1, 2), r"=1 on 1 process\(es\), now .*=1 on 2 .*before \(1\): use its values, or start"),
    ],
)
def test_a_step_has_as_many_batches_as_it_had(tmp_path, then, now, message):
    names = ("gradient_accumulation_steps", "num_processes")
    old, new = (CONFIG | dict(zip(names, values, strict=True)) for values in (then, now))
    save(tmp_path, 5, old)
    checkpoint = choose_checkpoint("latest", tmp_path)
    if message is None:
        assert checkpoint.load(new)["step"] == 5
    else:
        with pytest.raises(UserError, match=message):
            checkpoint.load(new)


def test_damaged_checkpoints_are_user_errors(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "checkpoint-5/state.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="checkpoint-5: not a readable checkpoint"):
        choose_checkpoint("latest", tmp_path).load(CONFIG)


def empty_run(folder):
    (folder / "run.json").write_text("")


def torn_run(folder):
    (folder / "run.json").write_bytes((folder / "run.json").read_bytes()[:30])


def zeroed_run(folder):
    (folder / "run.json").write_bytes(bytes(100))


def run_of_another_program(folder):
    (folder / "run.json").write_text('{"step": "4"}')


def no_run(folder):
    (folder / "run.json").unlink()


def no_state(folder):
    (folder / "state.pt").unlink()


def torn_state(folder):
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:-20])


def flipped_bit(folder):
    content = (folder / "state.pt").read_bytes()
    start = content.index(torch.arange(3.0).numpy().tobytes())
    (folder / "state.pt").write_bytes(content[:start] + b"\x01" + content[start + 1 :])


def another_state(folder):
    torch.save([1, 2], folder / "state.pt")


DAMAGES = [empty_run, torn_run, zeroed_run, run_of_another_program, no_run, no_state, torn_state]


@pytest.mark.parametrize("damage", [*DAMAGES, flipped_bit, another_state])
def test_a_damaged_checkpoint_blocks_no_whole_one(tmp_path, damage, user_warnings):
    for step in (2, 3, 4):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-4")
    assert choose_checkpoint("checkpoint-2", tmp_path).load(CONFIG)["step"] == 2
    with pytest.warns(
        UserWarning, match=r"skipped .*checkpoint-4: not a readable.*resuming from .*checkpoint-3"
    ) as warned:
        assert choose_checkpoint("latest", tmp_path).folder.name == "checkpoint-3"
    assert len(user_warnings(warned)) == 1
    with pytest.raises(UserError, match="checkpoint-4: not a readable checkpoint"):
        choose_checkpoint("checkpoint-4", tmp_path).load(CONFIG)
    save(tmp_path, 4)  # by a run that came there again
    assert choose_checkpoint("latest", tmp_path).folder.name == "checkpoint-4"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_do_not_count_where_the_oldest_go(tmp_path, damage):
    for step in (2, 4):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-4")
    with pytest.warns(UserWarning, match="skipped .*checkpoint-4: not a readable"):
        save(tmp_path, 6, limit=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_with_only_damaged_checkpoints_nothing_starts_anew_unasked(tmp_path):
    save(tmp_path, 5)
    empty_run(tmp_path / "checkpoint-5")
    with pytest.raises(UserError, match="checkpoint-5: not a readable .*start without resume_from_checkpoint"):
        choose_checkpoint("latest", tmp_path)


def test_what_somebody_else_put_there_is_left_alone(tmp_path):
    save(tmp_path, 5)
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "checkpoint-5-mine")
    (tmp_path / "checkpoint-3").write_text("a file")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "weights.bin").write_text("another program's")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.warns(UserWarning, match="checkpoint-7: not a readable"):
        save(tmp_path, 6, limit=2)
    with pytest.raises(
        WriteError, match="checkpoint-7: cannot be written .something else of this name is there.; move it"
    ):
        save(tmp_path, 7)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_checkpoints_of_another_version_are_refused(tmp_path):
    save(tmp_path, 5)
    record = tmp_path / "checkpoint-5" / "run.json"
    record.write_text(json.dumps({"step": 5, "saved": 1.0, "recipe": CONFIG}))
    with pytest.raises(UserError, match="checkpoint-5: .*by another version of atomdiff: start without a checkpoint"):
        choose_checkpoint("checkpoint-5", tmp_path).load(CONFIG)


@pytest.mark.parametrize("size", [0, 100, 900, 1300])  # of the state, of the record
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, size, small_files):
    save(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    state = {"step": 4, "parameters": {"a": torch.zeros(100000 if size else 1)}}
    with small_files(size):
        for step in (2, 4):
            with pytest.raises(WriteError, match=rf"checkpoint-{step}: cannot be written \(File too large\); allow"):
                save_checkpoint(tmp_path, step, state, CONFIG, 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ["checkpoint-2"]


def test_loading_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    save(tmp_path, 5)
    torch.save({"parameters": Trap()}, tmp_path / "checkpoint-5/state.pt")
    with pytest.raises(UserError):
        choose_checkpoint("latest", tmp_path).load(CONFIG)
    assert not (tmp_path / "sprung").exists()


def test_the_run_can_be_read_without_torch(tmp_path):
    save(tmp_path, 5)
    run = json.loads((tmp_path / "checkpoint-5/run.json").read_text())
    assert (run["format"], run["step"], run["config"]) == (2, 5, CONFIG)
