"""How the toybox's judge learns: words from the base's world, and to tell individuals apart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from atomdiff.toybox.judge import LABELS, Judge, save_judge
from atomdiff.toybox.scenes import Caption
from atomdiff.utils.precision import autocast
from benchmarks.toybox.data import render_individuals
from benchmarks.toybox.train_base import Stage, as_signal, run_stage

VIEWS = 6
_UNNAMED = -100


def make_judge(
    folder: Path,
    output: Path,
    world: tuple[Tensor, list[Caption]],
    individuals: int,
    stage: Stage,
    device: torch.device,
) -> dict[str, list[float]]:
    """Train the judge and save it.

    Args:
        folder: where checkpoints go.
        output: folder of the judge.
        world: images (n, 64, 64, 3) of bytes and their captions.
        individuals: how many individuals to draw, in six views each.
        stage: length and speed.
        device: where to train.

    Returns:
        The losses.
    """
    views, identities = render_individuals(individuals, VIEWS, stage.seed)
    torch.manual_seed(stage.seed)
    judge = Judge().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = (*world, torch.from_numpy(views), torch.from_numpy(identities))
    losses = train_judge(judge, *data, stage, folder, device)
    save_judge(judge.cpu(), output)
    return {"judge": losses}


def train_judge(
    judge: Judge,
    images: Tensor,
    captions: list[Caption],
    individuals: Tensor,
    identities: Tensor,
    stage: Stage,
    folder: Path,
    device: torch.device,
) -> list[float]:
    """Train the judge's words on the base world and its embedding on individuals.

    Args:
        judge: the network.
        images: (n, 64, 64, 3) bytes.
        captions: of the images; what a caption leaves open is not learned from its image.
        individuals: (k, views, 64, 64, 3) bytes, all views of a row the same individual, rows sorted by class.
        identities: (k, 2) class and scene-independent number of each individual.
        stage: length and speed; a batch is `batch_size` captioned images and as many of individuals.
        folder: where checkpoints go.
        device: where to train.

    Images are blurred and noised at random, so that softness of a generated image does not pass for content.
    """
    words = {name: torch.tensor([_label(c, name) for c in captions]) for name in LABELS}

    def loss_of(step: int) -> Tensor:
        index = torch.randint(len(images), (stage.batch_size,))
        neighbors = stage.batch_size // 8  # individuals next to each other share a class: the hard negatives
        start = torch.randint(len(individuals) - neighbors, (4,))
        chosen = torch.cat([torch.arange(s, s + neighbors) for s in start.tolist()]).unique()
        pair = torch.rand(len(chosen), individuals.shape[1]).topk(2).indices
        seen = torch.cat([individuals[chosen, pair[:, 0]], individuals[chosen, pair[:, 1]]])
        x = _degrade(as_signal(torch.cat([images[index], seen]))).to(device)
        with autocast(device):
            logits, vectors = judge(x)
        count = len(index)
        loss = individual_loss(vectors[count:].float(), identities[chosen, 1].repeat(2).to(device))
        loss = loss + F.cross_entropy(logits["class"][count:].float(), identities[chosen, 0].repeat(2).to(device))
        for name, targets in words.items():
            loss = loss + F.cross_entropy(
                logits[name][:count].float(), targets[index].to(device), ignore_index=_UNNAMED
            )
        return loss

    return run_stage("judge", stage, judge, loss_of, folder)


def word_of(caption: Caption, kind: str) -> str | None:
    """The caption's word of a kind of the judge (`class`, `scene`, `colour`, `pattern`), None where it is open."""
    word: str | None = getattr(caption, {"class": "class_name", "colour": "color"}.get(kind, kind))
    return word


def _label(caption: Caption, kind: str) -> int:
    word = word_of(caption, kind)
    return _UNNAMED if word is None else LABELS[kind].index(word)


def _degrade(x: Tensor) -> Tensor:
    """Blur and noise each image of (n, 3, 64, 64) by its own random amount."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix, noise = torch.rand(2, len(x), 1, 1, 1)
    degraded: Tensor = x.lerp(blurred, mix) + 0.1 * noise * torch.randn_like(x)
    return degraded.contiguous(memory_format=torch.channels_last)


def individual_loss(vectors: Tensor, individuals: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362, eq. 2) of embeddings (n, e) and identities (n,)."""
    scores = vectors @ vectors.T / temperature
    scores.fill_diagonal_(-torch.inf)
    same = individuals[:, None] == individuals[None, :]
    same.fill_diagonal_(False)
    log_share = scores - scores.logsumexp(1, keepdim=True)
    return -(log_share.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()
