"""The images of the page: made by one engine for all, stopped, and saved with how they were made."""

import json

import numpy as np
import pytest
from PIL import Image

from atomdiff.serving.image_request import ImageRequest
from atomdiff.ui import library as ui_library
from atomdiff.ui.workspace import open_workspace
from atomdiff.utils.errors import UserError
from tests.sampling.helpers import QUICK


@pytest.fixture
def workspace(ui_config):
    """What is behind a page, without jobs."""
    workspace = open_workspace(ui_config)
    yield workspace
    workspace.images.close()


@pytest.fixture
def mug(workspace, concept_file):
    """The concept "mug" in the library."""
    ui_library.add(workspace.library, concept_file, None)


def ask(prompt, seed=3, steps=2):
    return ImageRequest(prompt, seed=seed, num_inference_steps=steps, guidance_scale=QUICK["guidance_scale"])


def finish(run):
    """The files of a run, in the order of its requests."""
    for _ in run.watch():
        assert 0 <= run.progress <= 1
    return [run.saved[number] for number in sorted(run.saved)]


def test_images_say_how_they_were_made_and_the_base_is_opened_once(workspace, mug):
    assert not workspace.images.is_open
    prompts = ["a photo of sks mug", "a photo of sks mug <atoms:mug:0.8>"]
    before, after = finish(workspace.images.start([ask(prompt) for prompt in prompts]))
    images = [np.asarray(Image.open(file)).astype(int) for file in (before, after)]
    assert np.abs(images[0] - images[1]).max() > 2
    with Image.open(after) as image:
        assert image.info["prompt"] == prompts[1] and image.info["seed"] == "3"
        assert json.loads(image.info["concepts"])[0]["weight"] == 0.8
        assert image.info["num_inference_steps"] == "2"
    engine = workspace.images._engine
    (again,) = finish(workspace.images.start([ask(prompts[1])]))
    assert workspace.images._engine is engine and again.parent != after.parent
    assert np.abs(np.asarray(Image.open(again)).astype(int) - images[1]).max() <= 1  # alone: but for rounding


def test_visitors_share_the_calls_of_the_denoiser(workspace, mug):
    runs = [workspace.images.start([ask(f"a {word} <atoms:mug:0.5>", steps=30)]) for word in ("mug", "cat")]
    assert all(len(finish(run)) == 1 for run in runs)
    stats = workspace.images._engine.stats
    assert stats.steps == 60 and stats.calls < 60


def test_what_is_stopped_is_withdrawn_and_keeps_what_was_done(workspace):
    run = workspace.images.start([ask("a mug"), ask("a cat", steps=500)])
    for _ in run.watch():
        if run.saved:
            run.cancel()
    assert list(run.saved) == [0]


def test_images_of_a_visitor_who_leaves_are_withdrawn(workspace):
    run = workspace.images.start([ask("a mug", steps=500)])
    looking = run.watch()
    next(looking)
    looking.close()
    assert finish(workspace.images.start([ask("a cat")]))
    assert workspace.images._engine.stats.cancelled == 1 and not run.saved


def test_an_image_that_cannot_be_made_leaves_the_others(workspace, mug):
    run = workspace.images.start([ask("a mug <atoms:mug:1e30>"), ask("a mug")])
    with pytest.raises(UserError, match="black or has values that are not finite"):
        finish(run)
    assert list(run.saved) == [1]
    with pytest.raises(UserError, match="no concept 'cat'"):
        workspace.images.start([ask("a <atoms:cat>")])


def test_steps_of_a_training_are_named_by_their_files(workspace, mug, concept_file):
    def check(file):
        steps = file.parent / "run" / "steps"
        steps.mkdir(parents=True)
        (steps / "sks-mug-step-000002.atoms.safetensors").write_bytes(concept_file.read_bytes())

    job = workspace.jobs.add("sks-mug", [], {}, check)
    assert list(job.saved_steps) == [2]
    weights = ("mug:0.8", "sks-mug-step-000002:0.8")
    requests = [ask(f"a photo of sks mug <atoms:{weight}>") for weight in weights]
    one, other = finish(workspace.images.start(requests))
    assert np.abs(np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(other))).max() <= 1
