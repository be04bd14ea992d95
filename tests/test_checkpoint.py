import json

import pytest
import torch

from atomdiff.checkpoint import Checkpoint, choose_checkpoint, find_checkpoints, save_checkpoint
from atomdiff.errors import UserError

RECIPE = {"seed": 0, "learning_rate": 1e-3, "adapter": {"peft_type": "LORA", "r": 4}}


def save(folder, step, recipe=RECIPE, limit=None):
    save_checkpoint(folder, step, {"step": step, "trained": {"a": torch.arange(3.0)}}, recipe, limit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path, 7)
    state = find_checkpoints(tmp_path)[0].load(RECIPE)
    assert state["step"] == 7
    torch.testing.assert_close(state["trained"]["a"], torch.arange(3.0))


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


def test_another_recipe_is_refused_but_rates_and_steps_may_change(tmp_path):
    save(tmp_path, 5)
    checkpoint = choose_checkpoint("latest", tmp_path)
    assert checkpoint.load({**RECIPE, "learning_rate": 1e-4, "max_train_steps": 9})["step"] == 5
    with pytest.raises(UserError, match="written with seed=0, now 1"):
        checkpoint.load({**RECIPE, "seed": 1})
    with pytest.raises(UserError, match="adapter="):
        checkpoint.load({**RECIPE, "adapter": {"peft_type": "LORA", "r": 8}})


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ((1, 2), (1, 2), None),
        ((1, 2), (2, 1), None),
        ((3, 4), (6, 2), None),
        ((4, None), (4, 1), None),  # it was not noted
        ((4, None), (2, 2), None),
        ((4, None), (4, 2), r"=4 on 1 process\(es\), now .*=4 on 2 .*were \(4\): take .*_steps=2, or start"),
        (
            (1, 2),
            (1, 1),
            r"=1 on 2 process\(es\), now .*=1 on 1 .*were \(2\): take .*_steps=2, or start",
        ),
        ((2, 1), (2, 2), r"=2 on 1 process\(es\), now .*=2 on 2 .*\(2\): take gradient_accumulation_steps=1, or start"),
        ((1, 1), (1, 2), r"=1 on 1 process\(es\), now .*=1 on 2 .*were \(1\): use its values, or start"),
    ],
)
def test_a_step_has_as_many_batches_as_it_had(tmp_path, then, now, message):
    names = ("gradient_accumulation_steps", "num_processes")
    old, new = (RECIPE | dict(zip(names, values, strict=True)) for values in (then, now))
    save(tmp_path, 5, {name: value for name, value in old.items() if value is not None})
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
        choose_checkpoint("latest", tmp_path).load(RECIPE)


def test_loading_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    save(tmp_path, 5)
    torch.save({"trained": Trap()}, tmp_path / "checkpoint-5/state.pt")
    with pytest.raises(UserError):
        choose_checkpoint("latest", tmp_path).load(RECIPE)
    assert not (tmp_path / "sprung").exists()


def test_the_run_can_be_read_without_torch(tmp_path):
    save(tmp_path, 5)
    run = json.loads((tmp_path / "checkpoint-5/run.json").read_text())
    assert (run["step"], run["recipe"]) == (5, RECIPE)
