"""Tables of subjects: what becomes of their cells, and what is refused by row and column."""

import pytest

from atomdiff.training.fleet.table import read_subjects
from atomdiff.utils.errors import UserError


def test_cells_are_options_and_empty_ones_the_run_s_own(table, fleet_config, run_values, tmp_path):
    columns = ",class_name,max_train_steps,learning_rate,train_token,validation_prompts,seed"
    file = table("mug,cup,300,1e-3,no,a mug,-1", "Cat_2,,,,,,", columns=columns)
    mug, cat = read_subjects(fleet_config(file), run_values(seed=5))
    assert (mug.name, mug.run.class_name, mug.run.max_train_steps, mug.run.learning_rate) == ("mug", "cup", 300, 1e-3)
    assert (mug.run.train_token, mug.run.validation_prompts, mug.run.seed) == (False, ("a mug",), -1)
    assert (cat.run.class_name, cat.run.max_train_steps, cat.run.train_token, cat.run.seed) == ("teapot", 3, True, 5)
    assert cat.run.output_dir == str(tmp_path / "fleet" / "subjects" / "Cat_2")
    assert mug.run.cache_dir == cat.run.cache_dir == str(tmp_path / "fleet" / "cache")


def test_yaml_is_read_like_csv(table, fleet_config, run_values, tmp_path):
    table("mug", "cat")
    file = tmp_path / "subjects.yaml"
    file.write_text(f"""
- {{name: mug, instance_data_dir: {tmp_path}/images/mug, max_train_steps: 5, learning_rate: 1e-3, class_name: null}}
- {{name: cat, instance_data_dir: {tmp_path}/images/cat, validation_prompts: [one, two], train_token: false}}
""")
    mug, cat = read_subjects(fleet_config(file), run_values())
    assert (mug.run.max_train_steps, mug.run.learning_rate, mug.run.class_name) == (5, 1e-3, "teapot")
    assert cat.run.validation_prompts == ("one", "two") and cat.run.train_token is False
    file.write_text("mug: images")
    with pytest.raises(UserError, match=r"subjects\.yaml: expected a list of mappings"):
        read_subjects(fleet_config(file), run_values())


def test_subjects_share_class_images_that_are_generated_alike(table, fleet_config, run_values):
    file = table("a,mug,4", "b,mug,4", "c,cat,4", "d,mug,6", columns=",class_name,num_inference_steps")
    run = run_values(with_prior_preservation=True)
    folders = [subject.run.class_data_dir for subject in read_subjects(fleet_config(file), run)]
    assert folders[0] == folders[1] and len(set(folders)) == 3
    named = read_subjects(fleet_config(file), {**run, "class_data_dir": "classes/{class_name}"})
    assert {subject.run.class_data_dir for subject in named} == {"classes/{class_name}"}


@pytest.mark.parametrize(
    ("columns", "lines", "message"),
    [
        (",lr", ["a,1"], r"row 1: found an unknown column 'lr'; expected name or an option of atomdiff train"),
        (",adapter", ["a,x"], r"row 1, column adapter: all subjects share it; give it as an option"),
        (",seed,seed", ["a,1,1"], r"found the column 'seed' twice"),
        ("", ["a", "b", "A"], r"row 3, column name: found 'A', as row 1 has it"),
        ("", [".a"], r"row 1, column name: found '\.a'; expected a text of letters"),
        ("", ["a", "a/b"], r"row 2, column name: found 'a/b'"),
        ("", ["a" * 65], r"row 1, column name: found 'a+'; expected .* at most 64"),
        (",seed", ["a,1", "b,x"], r"row 2 \(b\), column seed: seed='x': expected a whole number"),
        (",max_train_steps", ["a,0"], r"row 1 \(a\), column max_train_steps: max_train_steps=0: expected a number of"),
        (",class_name", ["a,none"], r"row 1 \(a\), column class_name: class_name=None: expected what the images show"),
        (",seed", ["a,1,2"], r"row 1: found 4 cells for 3 columns \(name, instance_data_dir, seed\)"),
        (
            ",validation_data_dir",
            ["a,/no/where"],
            r"row 1 \(a\), column validation_data_dir: found no folder /no/where",
        ),
        (",class_name", ['a,"x'], r"cannot be read as CSV"),
        ("", [], r"found no subjects; expected a row for each"),
    ],
)
def test_bad_tables_are_refused(columns, lines, message, table, fleet_config, run_values):
    with pytest.raises(UserError, match=message) as refused:
        read_subjects(fleet_config(table(*lines, columns=columns)), run_values(validation_loss_steps=1))
    assert str(refused.value).startswith(fleet_config(table("a")).subjects)


def test_missing_folders_and_cells_are_refused(fleet_config, run_values, tmp_path):
    file = tmp_path / "subjects.csv"
    (tmp_path / "empty").mkdir()
    for row, message in {
        f"a,{tmp_path}/x": r"row 1 \(a\), column instance_data_dir: found no folder .*/x; check the path",
        f"a,{tmp_path}/empty": r"row 1 \(a\), column instance_data_dir: found no images in ",
        "a,": r"row 1, column instance_data_dir: found nothing; expected a value",
        ",x": r"row 1, column name: found nothing; expected a value",
    }.items():
        file.write_text(f"name,instance_data_dir\n{row}\n")
        with pytest.raises(UserError, match=message):
            read_subjects(fleet_config(file), run_values())


@pytest.mark.parametrize("option", ["concepts_list", "one_file", "resume_from_checkpoint", "push_to_hub"])
def test_options_that_a_fleet_cannot_have_are_refused(option, table, fleet_config, run_values):
    with pytest.raises(UserError, match=f"{option}='x': expected none"):
        read_subjects(fleet_config(table("a")), {**run_values(), option: "x"})
