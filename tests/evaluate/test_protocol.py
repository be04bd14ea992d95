"""Protocols: those that come with the project, and what is refused in one's own."""

import pytest
from PIL import Image

from atomdiff.evaluate import dreambench_plus
from atomdiff.evaluate.protocol import PROTOCOLS, Prompt, load_protocol
from atomdiff.evaluate.suite import PromptSuite
from atomdiff.toybox.world import (
    CLASSES,
    COLORS,
    FAMILY_NAMES,
    HELD_OUT_FAMILIES,
    PATTERNS,
    SCENES,
    SUBJECTS,
    TUNING_SUBJECTS,
    subject_images,
)
from atomdiff.utils.errors import UserError

SHIPPED = sorted(file.stem for file in PROTOCOLS.glob("*.yaml"))


def write_image(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(file)
    return file


def test_dreambench_has_the_subjects_and_prompts_of_the_paper():
    protocol = load_protocol("dreambench")
    assert len(protocol.subjects) == 30 and {kind: len(each) for kind, each in protocol.prompts.items()} == {
        "object": 25,
        "living": 25,
    }
    assert protocol.images_per_prompt == 4
    living = {name for name, subject in protocol.subjects.items() if subject["prompts"] == "living"}
    assert living == {"cat", "cat2", "dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"}


def test_a_subject_of_dreambench_has_its_class_its_prompts_and_its_images(tmp_path):
    protocol = load_protocol("dreambench")
    image = write_image(tmp_path / "dog6" / "00.jpg")
    subject = protocol.subject("dog6", None, tmp_path, alone=False)
    assert (subject.class_name, subject.references, subject.kind) == ("dog", (image,), "living")
    assert protocol.subject("dog6", "puppy", tmp_path, alone=False).class_name == "puppy"  # the user knows better
    assert Prompt("a {subject} in a chef outfit") in subject.prompts
    assert Prompt("a {subject} floating on top of water") in protocol.prompts["object"]
    with pytest.raises(UserError, match="the concept 'dog4': the protocol dreambench has no such subject; it has"):
        protocol.subject("dog4", None, tmp_path, alone=False)
    with pytest.raises(UserError, match=r"found no folder .*can of images"):
        protocol.subject("can", None, tmp_path, alone=False)


def test_a_subject_of_ones_own_has_its_images_beside_or_unseen_ones(tmp_path):
    protocol = load_protocol("quick")
    write_image(tmp_path / "01.png")
    assert [file.name for file in protocol.subject("mug", "mug", tmp_path, alone=True).references] == ["01.png"]
    unseen = write_image(tmp_path / "unseen" / "09.png")
    assert protocol.subject("mug", "mug", tmp_path, alone=True).references == (unseen,)
    assert protocol.subject("mug", None, tmp_path, alone=True).class_name == ""
    with pytest.raises(UserError, match="found no folder"):
        protocol.subject("mug", "mug", tmp_path, alone=False)
    (tmp_path / "bowl").mkdir()
    with pytest.raises(UserError, match="no image in it"):
        protocol.subject("bowl", "bowl", tmp_path, alone=False)


def test_the_subjects_of_dreambench_plus_bring_their_prompts(tmp_path):
    image = write_image(tmp_path / "images" / "animal" / "03.jpg")
    captions = tmp_path / "captions" / "animal" / "03.txt"
    captions.parent.mkdir(parents=True)
    captions.write_text("Kitten\nA kitten on a sofa, beside another kitten.\n\nAn oil {painting} in blue\n")
    subject = dreambench_plus.read_subject("live_subject_animal_03_kitten", tmp_path)
    texts = [prompt.text for prompt in subject.prompts]
    assert texts == ["A {subject} on a sofa, beside another kitten.", "{subject}, An oil (painting) in blue"]
    assert (subject.class_name, subject.references, subject.kind) == ("kitten", (image,), "animal")
    assert subject.captions == ("A kitten on a sofa, beside another kitten.", "An oil {painting} in blue")
    assert dreambench_plus.read_subject("animal_03", tmp_path).prompts == subject.prompts
    with pytest.raises(UserError, match="expected the name of a subject; found animal_03"):
        dreambench_plus.read_subject("animal_04", tmp_path)
    captions.write_text("kitten\n")
    with pytest.raises(UserError, match=r"03.txt: expected the class in the first line"):
        dreambench_plus.read_subject("animal_03", tmp_path)
    with pytest.raises(UserError, match="found no images/KIND/NUMBER.jpg"):
        dreambench_plus.read_subject("animal_03", tmp_path / "captions")


@pytest.mark.parametrize(
    ("class_name", "caption", "template"),
    [
        ("Pot", "Teapot and pots on the table", "{subject}, Teapot and pots on the table"),
        ("Pot", "A tea-pot beside the pot's handle", "A tea-pot beside the {subject}'s handle"),
        ("Ukiyo-e", "A ukiyo-e of a man", "A {subject} of a man"),
    ],
)
def test_a_caption_is_published_with_the_class(class_name, caption, template, tmp_path):
    write_image(tmp_path / "images" / "object" / "00.jpg")
    captions = tmp_path / "captions" / "object" / "00.txt"
    captions.parent.mkdir(parents=True)
    captions.write_text(f"{class_name}\n{caption}\n")
    subject = dreambench_plus.read_subject("object_00", tmp_path)
    assert [prompt.text for prompt in subject.prompts] == [template] and subject.captions == (caption,)
    suite = PromptSuite(subject.class_name, (template,), (), captions=subject.captions, images_per_prompt=1)
    assert suite.class_prompts == [caption] and suite.requests(None)["subject"][0][0] == caption
    assert f"sks {class_name.lower()}" in suite.requests(f"sks {class_name.lower()}")["subject"][0][0]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_protocol_that_comes_with_the_project_can_be_read(name):
    assert load_protocol(name) == load_protocol(f"configs/protocols/{name}.yaml")


GOOD = "prompts: ['a {subject}']\nunrelated_prompts: [a cat]\n"
SNOW = GOOD.replace("['a {subject}']", "[{prompt: 'a {subject} in the snow', scene: snow}]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected a mapping"),
        ("unrelated_prompts: [a cat]", "prompts of any: expected a list of prompts"),
        ("prompts: {}", "prompts: found no kind of subjects; expected a list of prompts for each, or one list"),
        ("prompts: ['a {subject}']\nunrelated_prompts: a cat", "unrelated_prompts: expected a list"),
        ("prompts: [a mug]\nunrelated_prompts: [a cat]", "'a mug': expected it with {subject}"),
        ("prompts: ['a {subjekt} {subject}']\nunrelated_prompts: [a cat]", "expected it with {subject}"),
        ("prompts: ['a {subject}']\nunrelated_prompts: ['a {subject}']", "expected it without {subject}"),
        (GOOD + "prior_prompts: [a mug]", "prior_prompts: 'a mug': expected it with"),
        (GOOD + "images_per_prompt: 0", "images_per_prompt=0: expected a whole number"),
        (GOOD + "images_per_prompt: true", "images_per_prompt=True"),
        (GOOD + "layout: zip", "layout='zip': expected one of folders, dreambench_plus"),
        (GOOD + "steps: 3", "there is no entry 'steps' in a protocol; known are images_per_prompt, layout"),
        ("prompts: [{text: '{subject}'}]\nunrelated_prompts: [a cat]", "found {'text': '{subject}'}; expected a text"),
        ("prompts: 5", "prompts of any: expected a list of prompts; found 5"),
        ("prompts: a {subject}", "prompts of any: expected a list of prompts; found 'a {subject}'"),
        ("prompts: {any: 5}", "prompts of any: expected a list of prompts; found 5"),
        ("prompts: {any: 'a {subject}'}", "prompts of any: expected a list of prompts; found 'a {subject}'"),
        ("prompts: {any: {prompt: 'a {subject}'}}", "expected a list of prompts; found {'prompt': 'a {subject}'}"),
        ("prompts: {any: }", "prompts of any: expected a list of prompts; found none"),
        ("prompts: [{scene: snow}]", "prompts of any: found {'scene': 'snow'}, without a prompt; expected one"),
        ("prompts: ['a {subject}', ' ']", "prompts of any: expected a list of prompts; found ' ' in it"),
        ("prompts: ['a {subject} {color}']", "expected it with {subject}, and no other placeholder"),
        (GOOD.replace("[a cat]", "[a cat, 3]"), "unrelated_prompts: expected a list of prompts; found 3 in it"),
        (GOOD.replace("[a cat]", "['a {color} cat']"), "expected it without {subject}, or any other placeholder"),
        (GOOD + "subjects: {mug: {class_name: mug, prompts: [any]}}", "which prompts it gets: any"),
        ("prompts: [3]\nunrelated_prompts: [a cat]", "found {'prompt': 3}"),
        (GOOD + "subjects: [mug]", "subjects: expected a mapping"),
        (GOOD + "subjects: {mug: mug}", "the subject 'mug': found 'mug'; expected its class_name"),
        (GOOD + "subjects: {mug: {class_name: mug, prompts: live}}", "which prompts it gets: any"),
        (GOOD + "subjects: {mug: {class_name: mug, seen: [sea]}}", "found seen: ['sea']; expected a list of labels"),
        (SNOW + "subjects: {mug: {class_name: mug, seen: sea}}", "found seen: 'sea'; expected a list of labels of its"),
        (SNOW + "subjects: {mug: {class_name: mug, seen: [snow]}}", "seen leaves no prompt"),
    ],
)
def test_what_is_wrong_in_a_protocol_is_named(text, message, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_protocol(str(file))
    assert message in str(error.value) and "mine.yaml" in str(error.value)


def test_prompts_may_say_what_they_ask_for(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace("['a {subject}']", "[{prompt: 'a {subject} in the snow', scene: snow}, '{subject}']"))
    assert load_protocol(str(file)).prompts["any"] == (
        Prompt("a {subject} in the snow", {"scene": "snow"}),
        Prompt("{subject}"),
    )


def test_what_a_protocol_leaves_out_is_not_measured(tmp_path):
    (tmp_path / "mine.yaml").write_text("prompts: ['a {subject}']")
    protocol = load_protocol(str(tmp_path / "mine.yaml"))
    assert protocol.unrelated_prompts == protocol.prior_prompts == ()
    assert load_protocol("quick").prior_prompts == ("a photo of {subject}",)


def test_a_protocol_that_is_not_there_is_one_clear_line():
    with pytest.raises(UserError, match="protocol='drembench': expected a YAML file, or one of dreambench, "):
        load_protocol("drembench")


def test_prompts_that_show_what_the_training_images_show_are_left_out(tmp_path):
    prompts = ["{prompt: 'a {subject} in the snow', scene: snow}", "{prompt: 'a {subject} in space', scene: space}"]
    subjects = "subjects: {mug: {class_name: mug, seen: [snow]}, cat: {class_name: cat}}"
    (tmp_path / "mine.yaml").write_text(f"prompts: [{', '.join(prompts)}, 'a {{subject}}']\n{subjects}")
    protocol = load_protocol(str(tmp_path / "mine.yaml"))
    for name in ("mug", "cat"):
        write_image(tmp_path / name / "01.png")
    found = {name: protocol.subject(name, None, tmp_path, alone=False).prompts for name in ("mug", "cat")}
    assert [prompt.text for prompt in found["mug"]] == ["a {subject} in space", "a {subject}"]
    assert len(found["cat"]) == 3


@pytest.mark.parametrize(("name", "subjects"), [("toybox", SUBJECTS), ("toybox_tuning", TUNING_SUBJECTS)])
def test_the_protocols_of_the_toybox_know_its_subjects_and_what_their_photos_show(name, subjects):
    protocol = load_protocol(name)
    expected = {}
    for subject, individual in subjects.items():
        scenes = subject_images(subject, size=8)[1].tolist()
        held_out = FAMILY_NAMES[int(individual.family)] in HELD_OUT_FAMILIES
        class_name = CLASSES[int(individual.class_index)]
        expected[class_name] = {
            "class_name": class_name,
            "prompts": "hard" if held_out else "in span",
            "seen": [scene for index, scene in enumerate(SCENES) if index in scenes],
        }
    assert protocol.subjects == expected and protocol.prompts["hard"] == protocol.prompts["in span"]
    assert {prompt.text: prompt.labels["scene"] for prompt in protocol.prompts["hard"]} == {
        f"a photo of {{subject}} {phrase}": scene for scene, phrase in SCENES.items()
    }
    for words in (CLASSES, [*SCENES.values()]):
        named = [word for prompt in protocol.unrelated_prompts for word in words if prompt.count(f" {word}")]
        assert {*named} == {*words} and len(named) == 16


def test_the_protocol_of_edits_asks_for_what_the_judge_knows():
    protocol = load_protocol("toybox_edits")
    assert protocol.subjects.keys() == load_protocol("toybox").subjects.keys() and not protocol.unrelated_prompts
    words = {"scene": SCENES, "color": COLORS, "pattern": PATTERNS}
    for prompt in protocol.prompts["hard"]:
        assert all(label in words[kind] for kind, label in prompt.labels.items()) and prompt.labels
        shown = [SCENES.get(label, label) for label in prompt.labels.values()]
        assert all(word in prompt.text for word in shown)
    kinds = [kind for prompt in protocol.prompts["hard"] for kind in prompt.labels]
    assert {kind: kinds.count(kind) for kind in words} == {"scene": 2, "color": 6, "pattern": 5}
