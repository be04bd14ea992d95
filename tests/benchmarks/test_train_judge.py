"""What the judge learns from captions and from individuals."""

import torch

from atomdiff.toybox.judge import LABELS, Judge
from benchmarks.pretrain.data import World
from benchmarks.pretrain.train_judge import contrastive_loss, make_loss, smear


def test_the_contrastive_loss_prefers_images_of_one_individual_together():
    near, far = torch.eye(4)[[0, 0, 1, 1]], torch.eye(4)[[0, 1, 0, 1]]
    identities = torch.tensor([0, 0, 1, 1])
    assert contrastive_loss(near, identities) < contrastive_loss(far, identities)


def test_an_individual_without_another_image_is_only_a_negative():
    vectors = torch.eye(4)[[0, 0, 1]]
    with_single = contrastive_loss(vectors, torch.tensor([0, 0, 1]))
    assert torch.isfinite(with_single)
    assert with_single < contrastive_loss(torch.eye(4)[[0, 0, 0]], torch.tensor([0, 0, 1]))


def test_smeared_images_lose_their_details_and_keep_their_colors():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 128, 128) * 2 - 1
    smeared = smear(images)
    assert smeared.shape == images.shape and smeared.std() < 0.3 * images.std()
    torch.testing.assert_close(smeared.mean((2, 3)), images.mean((2, 3)), atol=0.05, rtol=0)


def test_what_a_caption_leaves_open_is_not_learned_from_it():
    torch.manual_seed(0)
    red = LABELS["color"].index("red")
    known = {kind: torch.zeros(8, dtype=torch.long) for kind in LABELS}
    known["color"] = torch.tensor([-1, red] * 4)
    world = World(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, 1, 16, 16), known, [""] * 8)
    families = torch.randint(0, 256, (2, 4, 2, 3, 32, 32), dtype=torch.uint8)
    judge = Judge()
    head = judge.heads["color"]
    torch.nn.init.zeros_(head.weight)  # so that at the start every color is as likely
    torch.nn.init.zeros_(head.bias)
    make_loss(judge, world, families)().backward()
    rising = (head.bias.grad < 0).nonzero().flatten().tolist()
    assert [LABELS["color"][index] for index in rising] == ["red"]
