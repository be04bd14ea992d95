"""How the judge learns: words from captioned images, and to tell individuals from their nearest relatives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from atomdiff.toybox.judge import Judge
from atomdiff.utils.precision import autocast
from benchmarks.pretrain.data import World, as_signal
from benchmarks.pretrain.fastest import CAPTURED, fastest
from benchmarks.pretrain.stage import Phase

_CAPTIONED, _FAMILIES, _DEGRADED = 96, 24, 32


def contrastive_loss(vectors: Tensor, identities: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss (Khosla et al., arXiv 2004.11362, eq. 2) of embeddings (n, e) and identities (n,)."""
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    log_share = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf)
    log_share = log_share - log_share.logsumexp(1, keepdim=True)
    same = (identities[:, None] == identities[None, :]) & ~itself
    return -(log_share.masked_fill(~same, 0).sum(1) / same.sum(1).clamp(min=1)).mean()


def smear(x: Tensor) -> Tensor:
    """Blur images (n, 3, h, w) strongly and push their pixels about, as a network that has seen too little does."""
    n, _, height, width = x.shape
    coarse = torch.randn(n, 2, 12, 12, device=x.device) * 0.05
    flow = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    straight = F.affine_grid(torch.eye(2, 3, device=x.device).expand(n, 2, 3), [n, 3, height, width], False)
    grid = straight + rearrange(flow, "n c h w -> n h w c")
    warped = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    small = F.interpolate(warped, scale_factor=0.25, mode="area")
    return F.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(-1, 1)


def soften(x: Tensor) -> Tensor:
    """Blur and noise each image a little, by its own random amount, so that softness does not pass for content."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix, noise = torch.rand(2, len(x), 1, 1, 1, device=x.device)
    return x.lerp(blurred, 0.7 * mix) + 0.06 * noise * torch.randn_like(x)


def make_loss(judge: Judge, world: World, families: Tensor) -> Callable[[], Tensor]:
    """The loss of a random batch: words of captioned images, and individuals among their nearest relatives.

    Args:
        judge: the network, on the device of the images.
        world: captioned images; what a caption leaves open is not learned from its image.
        families: (k, 4, views, 3, 128, 128) bytes, see `render_families`.

    Smeared images of an individual count as another one, so that similarity falls when the details are gone.
    """
    device = world.images.device

    def loss_of() -> Tensor:
        index = torch.randint(len(world.images), (_CAPTIONED,), device=device)
        rows = torch.randint(len(families), (_FAMILIES,), device=device)
        pair = torch.rand(families.shape[2], device=device).topk(2).indices
        kin = rearrange(families[rows][:, :, pair], "f r v c h w -> (f r v) c h w")
        ids = torch.arange(4 * _FAMILIES, device=device).repeat_interleave(2)
        some = torch.rand(len(kin), device=device).topk(_DEGRADED).indices
        sharp = as_signal(torch.cat([world.images[index], kin]))
        x = torch.cat([soften(sharp), smear(sharp[_CAPTIONED:][some])])
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(device):
            logits, vectors = judge(x)
        loss = contrastive_loss(vectors[_CAPTIONED:], torch.cat([ids, len(ids) + ids[some]]))
        for kind, known in world.labels.items():
            loss = loss + F.cross_entropy(logits[kind][:_CAPTIONED].float(), known[index], ignore_index=-1)
        return loss

    return loss_of


def fastest_phase(judge: Judge, world: World, families: Tensor, folder: Path) -> Phase:
    """The loss, its steps captured where that is faster (see `fastest`)."""
    loss_of = make_loss(judge, world, families)
    ways = {"plain": loss_of} | ({"plain" + CAPTURED: loss_of} if world.images.is_cuda else {})
    return Phase(loss_of, captured=fastest("judge", folder, judge.train(), ways).endswith(CAPTURED))
