"""Search spaces: files, what they refuse, and what their values make of a run."""

import json
from pathlib import Path

import optuna
import pytest

from atomdiff.training.config import TrainConfig, load_config
from atomdiff.training.config.tune import TuneConfig
from atomdiff.training.tuning.space import SearchSpace, apply_values, read_space
from atomdiff.tuner.read_config import describe_adapter, read_adapter
from atomdiff.utils.errors import UserError

ROOT = Path(__file__).parents[3]
RUN = TrainConfig(
    pretrained_model_name_or_path="base", instance_data_dir="photos", class_name="mug", learning_rate=1e-3
)


def suggested(space, count=30):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask()) for _ in range(count)]


@pytest.mark.parametrize("name", sorted(file.name for file in (ROOT / "configs" / "search").glob("*.yaml")))
def test_the_spaces_of_the_project_fit_runs(name, tmp_path):
    method = "lora/attention_r16" if name == "any_method.yaml" else "atoms/default"
    adapter = ROOT / "configs" / "experiments" / method / "adapter.json"
    options = ["--instance_data_dir", "photos", "--class_name", "mug", "--adapter", str(adapter)]
    run = load_config(["--config", str(ROOT / "configs" / "demo.yaml"), *options])
    space = read_space(f"configs/search/{name}").with_own_choices(run)
    space.check(run, name)
    own = space.own_values(run)
    assert own["learning_rate"] == run.learning_rate and own["max_train_steps"] == 300
    assert describe_adapter(read_adapter(apply_values(own, run, tmp_path).adapter)) == describe_adapter(
        read_adapter(run.adapter)
    )
    assert TuneConfig.search_space == "configs/search/atoms.yaml"


def test_values_lie_in_their_ranges_and_conditions_hold(space_file, tmp_path):
    space = read_space(
        space_file(
            {
                "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
                "max_train_steps": {"low": 100, "high": 300, "step": 100},
                "preservation": ["none", "class", "blank"],
                "preservation_weight": {"low": 0.5, "high": 2.0, "when": {"preservation": ["class", "blank"]}},
                "adapter.channel_block": [1, 2],
            }
        )
    )
    space.check(RUN, "space.yaml")
    found = suggested(space)
    assert all(1e-4 <= each["learning_rate"] <= 1e-2 for each in found)
    assert {each["max_train_steps"] for each in found} == {100, 200, 300}
    assert {each["preservation"] for each in found} == {"none", "class", "blank"}
    assert all(("preservation_weight" in each) == (each["preservation"] != "none") for each in found)
    values = next(each for each in found if each["preservation"] == "class")
    run = apply_values(values, RUN, tmp_path)
    assert run.preservation_weight == values["preservation_weight"] and run.max_train_steps in (100, 200, 300)
    fields = {"peft_type": "ATOMS", "channel_block": values["adapter.channel_block"]}
    assert json.loads(Path(run.adapter).read_text()) == fields
    assert apply_values({"learning_rate": 0.5}, RUN, tmp_path).adapter == "atoms"


def test_the_own_values_of_a_run(space_file):
    space = {"learning_rate": {"low": 1e-4, "high": 1e-2}, "adapter.target_modules": ["all", "attention"]}
    space |= {"token_learning_rate": {"low": 1e-3, "high": 1e-1}}
    found = read_space(space_file(space))
    assert found.own_values(RUN) is None  # conv is no choice
    own = {"learning_rate": 1e-3, "adapter.target_modules": "conv", "token_learning_rate": 1e-2}
    assert found.with_own_choices(RUN).own_values(RUN) == own
    steps = SearchSpace(read_space(space_file({"max_train_steps": {"low": 150, "high": 450, "step": 100}})).parameters)
    assert steps.own_values(RUN) is None  # 400 is between two of them


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([], "expected a mapping of options to ranges"),
        (
            {"resolution": [64, 128]},
            "found 'resolution'; expected adapter.NAME .* learning_rate, .* could not be compared",
        ),
        ({"learning_rate": 0.1}, "learning_rate: found 0.1; expected a list of choices, or a mapping"),
        ({"learning_rate": [0.1]}, r"found \[0.1\]; expected a list of two or more"),
        ({"learning_rate": [0.1, [0.2]]}, "expected a list of two or more texts, numbers or truth values"),
        ({"learning_rate": {"low": 1}}, "expected numbers for low and high"),
        ({"learning_rate": {"low": 1, "high": "2"}}, "expected numbers for low and high"),
        ({"learning_rate": {"low": 1, "high": 2, "steps": 3}}, "expected numbers for low and high"),
        ({"learning_rate": {"low": 2, "high": 1}}, "expected low below high"),
        ({"learning_rate": {"low": 0, "high": 1, "log": True}}, "with log: true, above 0 and without step"),
        ({"preservation": {"choices": ["none", "class"], "low": 1}}, "expected a list of two or more"),
        (
            {"learning_rate": {"low": 1, "high": 2, "when": {"preservation": "class"}}},
            "when: found preservation: 'class'; expected a parameter above, and values of it",
        ),
        ({"learning_rate": {"low": 1, "high": 2, "when": "class"}}, "expected a mapping such as"),
    ],
)
def test_files_that_are_no_search_space_are_refused(space, message, space_file):
    with pytest.raises(UserError, match=message):
        read_space(space_file(space))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"preservation": ["none", "klass"]}, "space.yaml: preservation='klass': .*expected one of"),
        ({"max_train_steps": {"low": 0, "high": 10}}, "max_train_steps=0: .*at least 1"),
        ({"adapter.chanel_block": [1, 2]}, "adapter.chanel_block=1: .*AtomConfig has no field chanel_block"),
        ({"adapter.basis": ["svd", "wavelet"]}, "adapter.basis='wavelet': .*basis"),
    ],
)
def test_values_that_a_run_refuses_are_told_before_it_begins(space, message, space_file):
    with pytest.raises(UserError, match=message):
        read_space(space_file(space)).check(RUN, "space.yaml")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation_loss_steps": 0}, "validation_loss_steps=0: expected more than 0"),
        ({"resume_from_checkpoint": "latest"}, "the same command resumes a search"),
    ],
)
def test_searches_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        TuneConfig(pretrained_model_name_or_path="base", instance_data_dir="photos", class_name="mug", **fields)


def test_images_are_held_out_unless_others_are_named():
    options = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "class_name": "mug"}
    assert TuneConfig(**options).base_run.validation_split == 0.2
    assert TuneConfig(**options, validation_split=0.4).base_run.validation_split == 0.4
    assert TuneConfig(**options, validation_data_dir="more").base_run.validation_split == 0
