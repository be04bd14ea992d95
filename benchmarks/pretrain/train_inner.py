"""How the inner part of the UNet learns by itself, for CPUs: most of a step's time goes into the outer part."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from benchmarks.pretrain.train_denoiser import Denoiser

_WIDTH = 32


class SmallHead(nn.Module):
    """What takes the place of the UNet's last block: one narrow residual block of inner and of first features.

    The first features bring the noise, so that the inner ones need not carry it through their lower resolution.
    """

    def __init__(self, inner: int, first: int, embedding: int, out: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(inner, 4 * _WIDTH, 3, padding=1)
        self.block = ResnetBlock2D(
            in_channels=_WIDTH + first, out_channels=2 * _WIDTH, temb_channels=embedding, groups=8, groups_out=8
        )
        self.norm = nn.GroupNorm(8, 2 * _WIDTH)
        self.conv_out = nn.Conv2d(2 * _WIDTH, out, 3, padding=1)

    def forward(self, inner: Tensor, first: Tensor, embedding: Tensor) -> Tensor:
        """The prediction (n, out, 2h, 2w) from features (n, inner, h, w) and (n, first, 2h, 2w)."""
        wide = nn.functional.pixel_shuffle(self.widen(inner), 2)
        hidden = self.block(torch.cat([wide, first], dim=1), embedding)
        prediction: Tensor = self.conv_out(nn.functional.silu(self.norm(hidden)))
        return prediction


class InnerDenoiser(nn.Module):
    """The UNet below its highest resolution, with a `SmallHead` instead of the last block.

    Its input are the features of the first block, which is not trained here, nor are the embedding of timesteps and the
    text encoder: all three must be those of a trained UNet.

    Args:
        denoiser: text encoder and UNet; the UNet's inner blocks are trained in place.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        unet = denoiser.unet
        self.frozen = nn.ModuleList(
            [denoiser.text_encoder, unet.time_proj, unet.time_embedding, unet.conv_in, unet.down_blocks[0]]
        ).requires_grad_(False)
        self.down_blocks = unet.down_blocks[1:]
        self.mid_block = unet.mid_block
        self.up_blocks = unet.up_blocks[:-1]
        first, inner = unet.config.block_out_channels[:2]
        self.small = SmallHead(inner, first, unet.time_embedding.linear_2.out_features, unet.config.out_channels)

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """The prediction (n, c, 16, 16) for noisy latents of that shape, timesteps (n,) and token ids (n, tokens)."""
        text_encoder, time_proj, time_embedding, conv_in, first_block = self.frozen
        with torch.no_grad():
            states = text_encoder(input_ids).last_hidden_state
            embedding = time_embedding(time_proj(timesteps).to(noisy.dtype))
            hidden, (first, _) = first_block(conv_in(noisy), embedding, states)
        skips = [hidden]
        for block in self.down_blocks:
            hidden, outputs = block(hidden, embedding, states)
            skips += outputs
        hidden = self.mid_block(hidden, embedding, states)
        for block in self.up_blocks:
            count, last = len(block.resnets), block is self.up_blocks[-1]
            upsamplers, block.upsamplers = block.upsamplers, None if last else block.upsamplers
            hidden = block(hidden, tuple(skips[-count:]), embedding, states)
            block.upsamplers = upsamplers
            del skips[-count:]
        prediction: Tensor = self.small(hidden, first, embedding)
        return prediction
