"""The Mona adapter, and the layer that adds it to images of features."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from atomdiff.activation_adapters.layer import ActivationLayer
from atomdiff.activation_adapters.mona.config import MonaConfig


class MonaAdapter(nn.Module):
    """What Mona adds to features x (arXiv 2311.15010); zero at first.

        n = norm(x) * norm_scale + x * input_scale
        z = down(n)
        z = mean over k of depthwise_k(z) + z
        z = z + pointwise(z)
        up(dropout(gelu(z)))

    With d channels, h hidden ones and kernels of 3, 5 and 7 it has d (2h + 5) + h^2 + 88h parameters.

    Args:
        channels: d.
        config: the settings.
    """

    def __init__(self, channels: int, config: MonaConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm = nn.LayerNorm(channels)
        self.norm_scale = nn.Parameter(torch.full((channels,), 1e-6))
        self.input_scale = nn.Parameter(torch.ones(channels))
        self.down = nn.Linear(channels, hidden)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(hidden, hidden, size, padding=size // 2, groups=hidden) for size in config.kernel_sizes
        )
        self.pointwise = nn.Conv2d(hidden, hidden, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(hidden, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, d, height, width) -> the same."""
        x = rearrange(x, "b d h w -> b h w d")
        normed = self.norm(x) * self.norm_scale + x * self.input_scale
        z = rearrange(self.down(normed), "b h w c -> b c h w")
        z = torch.stack([convolution(z) for convolution in self.depthwise]).mean(0) + z
        z = z + self.pointwise(z)
        z = rearrange(self.dropout(functional.gelu(z)), "b c h w -> b h w c")
        return rearrange(self.up(z), "b h w d -> b d h w")


class MonaLayer(ActivationLayer):
    """Adds Mona adapters to what a block has computed; it stands in a slot of the block.

    Args:
        base_layer: the `Identity` of the slot.
        layout: how tokens of the block lie in an image, where their number alone does not say it.
    """

    adapter_layer_names = ("mona_adapter",)

    def __init__(self, base_layer: nn.Module, layout: Any = None) -> None:
        super().__init__(base_layer)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, d, height, width) -> the same, changed."""
        x = self.base_layer(x)
        added = self.residual(x)
        return x if added is None else x + added
