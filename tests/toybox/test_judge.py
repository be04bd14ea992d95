import json

import pytest
import torch
from PIL import Image

from atomdiff.toybox.judge import JUDGE_FOLDER, LABELS, Judge, load_judge, save_judge
from atomdiff.toybox.scenes import Caption
from atomdiff.toybox.subjects import SUBJECTS, views
from benchmarks.base_quality import accuracies
from benchmarks.toybox.data import render_world
from benchmarks.toybox.evaluate import words_of
from benchmarks.toybox.train_base import Stage
from benchmarks.toybox.train_judge import individual_loss, train_judge


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.mark.slow
def test_the_committed_judge_names_what_fresh_images_show(judge):
    images, captions = render_world(64, seed=99, held_out=True)
    shares = accuracies(judge, [Image.fromarray(image) for image in images], words_of(captions))
    assert min(shares.values()) > 0.9, shares


def test_views_of_one_subject_are_nearer_than_views_of_two(judge):
    first, second = (judge.embed(views(SUBJECTS[name], 6, seed=3)) for name in ("mug", "cat"))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(6))
    assert (first @ first.T).min() > (first @ second.T).max()


def test_a_judge_survives_saving_and_loading(tmp_path):
    torch.manual_seed(0)
    before = Judge().eval()
    save_judge(before, tmp_path)
    after = load_judge(tmp_path)
    images = views(SUBJECTS["robot"], 2, seed=1)
    torch.testing.assert_close(before.embed(images), after.embed(images), atol=5e-3, rtol=0)


def test_a_judge_of_another_world_is_refused(tmp_path):
    save_judge(Judge(), tmp_path)
    labels = json.loads((tmp_path / "labels.json").read_text())
    (tmp_path / "labels.json").write_text(json.dumps(labels | {"class": ["mug"]}))
    with pytest.raises(ValueError, match="other words"):
        load_judge(tmp_path)


def test_what_a_caption_leaves_open_is_not_learned_from_it(tmp_path):
    torch.manual_seed(0)
    captions = [Caption("mug", "beach", color, "dotted") for color in (None, "red")] * 4
    images = torch.zeros(8, 64, 64, 3, dtype=torch.uint8)
    views_of_eight = images[:, None].expand(-1, 2, -1, -1, -1)
    identities = torch.stack([torch.zeros(8, dtype=torch.int64), torch.arange(8)], dim=1)
    judge = Judge()
    torch.nn.init.zeros_(judge.heads["colour"].weight)  # so that at the start every color is as likely
    before = torch.nn.init.zeros_(judge.heads["colour"].bias).detach().clone()
    train_judge(judge, images, captions, views_of_eight, identities, Stage(1, 16, 1e-2), tmp_path, torch.device("cpu"))
    rising = (judge.heads["colour"].bias > before).nonzero().flatten().tolist()
    assert [LABELS["colour"][index] for index in rising] == ["red"]


def test_contrastive_loss_prefers_views_of_one_individual_together():
    near = torch.eye(4)[[0, 0, 1, 1]]
    far = torch.eye(4)[[0, 1, 0, 1]]
    individuals = torch.tensor([0, 0, 1, 1])
    assert individual_loss(near, individuals) < individual_loss(far, individuals)


def test_the_judges_folder_is_small():
    assert sum(file.stat().st_size for file in JUDGE_FOLDER.iterdir()) < 5e6
