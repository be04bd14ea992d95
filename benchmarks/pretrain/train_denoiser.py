"""How text encoder and UNet learn, on latents kept on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from atomdiff.utils.precision import autocast
from benchmarks.pretrain.architecture import build_scheduler
from benchmarks.pretrain.fastest import CAPTURED, fastest
from benchmarks.pretrain.stage import Average, Checkpoints, Phase, Stage, run_stage

DECAYS = (0.999, 0.9996)
KEEP_SECONDS = 90


def layout(device: torch.device) -> torch.memory_format:
    """How the UNet's weights and latents lie in memory: on a CPU group norms of channels last are ten times slower."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


class Denoiser(nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet
        self.way: Callable[..., Tensor] = self._predict

    def move_to(self, device: torch.device) -> None:
        """Move it to a device, in the way in which it is fastest there."""
        self.to(device)
        self.unet.to(memory_format=layout(device))
        if device.type == "cpu":  # the backward of the CPU's flash attention takes several times as long
            self.unet.set_attn_processor(AttnProcessor())

    def _predict(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        states = self.text_encoder(input_ids).last_hidden_state
        prediction: Tensor = self.unet(noisy, timesteps, states, return_dict=False)[0]
        return prediction

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """The prediction (n, c, 16, 16) for noisy latents of that shape, timesteps (n,) and token ids (n, tokens)."""
        return self.way(noisy, timesteps, input_ids)

    def choose_way(self, latents: Tensor, ids: Tensor, folder: Path) -> bool:
        """Choose the fastest way for batches like latents (n, c, 16, 16) and token ids (n, tokens).

        Returns:
            Whether steps are to be captured.
        """
        ways: dict[str, Callable[..., Tensor]] = {"plain": self._predict}
        if latents.is_cuda:
            ways["compiled"] = ways["compiled" + CAPTURED] = torch.compile(self._predict, dynamic=False)
        timesteps = torch.arange(len(latents), device=latents.device) * 997 % 1000

        def loss_of(way: Callable[..., Tensor]) -> Tensor:
            with autocast(latents.device):
                return (way(latents, timesteps, ids).float() - latents).square().mean()

        best = fastest("denoiser", folder, self, {name: partial(loss_of, way) for name, way in ways.items()})
        self.way = ways[best]
        return best.endswith(CAPTURED)


def make_loss(
    denoiser: Callable[..., Tensor], latents: Tensor, masks: Tensor, ids: Tensor, batch: int
) -> Callable[[], Tensor]:
    """The loss of a random batch: v-prediction, weighed by noise and by the object's mask.

    The error of the clean latents weighs min(SNR + 1, 10), which for v is min(SNR + 1, 10) / (SNR + 1): min-SNR (Hang
    et al., arXiv 2303.09556) shifted by one, so that the noisiest steps still teach under zero terminal SNR. Timesteps
    are squares of uniform numbers (on 16x16 latents shapes and patterns are decided early in the schedule), one in four
    is uniform. Those of a batch are spread evenly (Kingma et al., "Variational Diffusion Models", arXiv 2107.00630,
    section I.1), so that its loss varies less. The object counts twice as much as what is around it. One caption in ten
    is empty.

    Args:
        denoiser: the network.
        latents: scaled (n, c, 16, 16).
        masks: share of each latent place that the object covers (n, 1, 16, 16).
        ids: token ids (n + 1, tokens), the last row of the empty prompt.
        batch: images a step.
    """
    scheduler, device = build_scheduler(), latents.device
    alphas = scheduler.alphas_cumprod.to(device)
    weights = (1 / (1 - alphas).clamp(min=1e-8)).clamp(max=10) * (1 - alphas)

    def loss_of() -> Tensor:
        index = torch.randint(len(latents), (batch,), device=device)
        empty = torch.rand(batch, device=device) < 0.1
        prompt = torch.where(empty, len(ids) - 1, index)
        clean, mask = latents[index].float(), masks[index].float()
        noise = torch.randn_like(clean)
        uniform = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
        uniform = torch.where(torch.rand(batch, device=device) < 0.75, uniform.square(), uniform)
        timesteps = (uniform * len(alphas)).long()
        signal = alphas[timesteps].sqrt()[:, None, None, None]
        spread = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
        noisy = (signal * clean + spread * noise).contiguous(memory_format=layout(device))
        with autocast(device):
            prediction = denoiser(noisy, timesteps, ids[prompt])
        error = (prediction.float() - (signal * noise - spread * clean)).square()
        weighed = (error * (1 + mask)).mean((1, 2, 3)) / 1.35
        return (weighed * weights[timesteps]).mean()

    return loss_of


def train_denoiser(
    denoiser: nn.Module, phase: Phase, stage: Stage, keep: Callable[[], None], checkpoints: Checkpoints
) -> int:
    """Train, and leave the moving average with the lower loss in the model.

    Args:
        denoiser: the network.
        phase: its loss, see `make_loss`.
        stage: length and speed.
        keep: called every `KEEP_SECONDS` with the model holding the shorter average; the training goes on unharmed.
        checkpoints: where its state is kept.

    Returns:
        The index of the average that was kept.
    """
    average = Average(denoiser, DECAYS)
    last = time.perf_counter()

    def after_step() -> None:
        nonlocal last
        if time.perf_counter() - last < KEEP_SECONDS:
            return
        current = [p.detach().clone() for p in average.parameters]
        average.write_to_model(0)
        keep()
        with torch.no_grad():
            for parameter, value in zip(average.parameters, current, strict=True):
                parameter.copy_(value)
        last = time.perf_counter()

    run_stage(stage, denoiser, [phase], average, after_step, checkpoints)
    denoiser.train()  # and with gradients: what was compiled would be compiled again otherwise
    scores = []
    for index in range(len(DECAYS)):
        average.write_to_model(index)
        torch.manual_seed(12345)
        scores.append(sum(phase.loss_of().item() for _ in range(16)) / 16)
    denoiser.eval()
    best = min(range(len(DECAYS)), key=scores.__getitem__)
    print(f"losses of the averages {dict(zip(DECAYS, scores, strict=True))}", flush=True)
    average.write_to_model(best)
    return best
