"""How the inner part of the UNet learns by itself, for CPUs: most of a step's time goes into the outer part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.pretrain.train_denoiser import Denoiser

_PATCH = 2


class InnerDenoiser(nn.Module):
    """The UNet below its highest resolution, with a head that predicts 2x2 patches instead of the last block.

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
        width = unet.config.block_out_channels[1]
        self.patch_head = nn.Sequential(
            nn.GroupNorm(unet.config.norm_num_groups, width),
            nn.SiLU(),
            nn.Conv2d(width, _PATCH**2 * unet.config.out_channels, 3, padding=1),
            nn.PixelShuffle(_PATCH),
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """The prediction (n, c, 16, 16) for noisy latents of that shape, timesteps (n,) and token ids (n, tokens)."""
        text_encoder, time_proj, time_embedding, conv_in, first = self.frozen
        with torch.no_grad():
            states = text_encoder(input_ids).last_hidden_state
            embedding = time_embedding(time_proj(timesteps).to(noisy.dtype))
            hidden = first(conv_in(noisy), embedding, states)[0]
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
        prediction: Tensor = self.patch_head(hidden)
        return prediction
