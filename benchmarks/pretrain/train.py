"""Pretrain the toybox within a given number of seconds, on a GPU where there is one.

    python -m benchmarks.pretrain.train --out out/pretrain --seconds 540
    python -m benchmarks.pretrain.train --out out/pretrain --seconds 60 --tiny   # every line of it, in miniature

The world is rendered on the device and stays there. Then the judge learns, the autoencoder, and with the time that is
left text encoder and UNet. The folder receives `weights-<i>.safetensors` (judge, autoencoder, text encoder and UNet in
half precision, 15 MiB at most each), `report.json` and `sheet.png`; weights are written every few minutes, too, so that
a run that is stopped leaves what it has. A file `deadline` in the folder with the Unix time at which all must be over
replaces `--seconds`; it is read when a stage begins.

`--start_from FOLDER` goes on from such weights (those that a changed architecture still has), or from a pipeline folder
with the judge's beside it, such as samples/toybox-sd. `--stages` chooses what is trained: `inner` is the UNet below its
highest resolution, twice as fast on a CPU. `--only` names the weights that the denoiser's stage changes. With
`--checkpoint_seconds` the same command resumes a run that was stopped, for long runs on a CPU; `--steps` ends a stage
after so many steps, whatever they take. `--pipeline FOLDER` trains nothing, but makes a pipeline folder of the weights
in `--out`, and beside it the judge's folder `toybox-judge`.

On a CPU, processes of one thread each may be faster than one with as many threads (trial 14 in README.md): `torchrun
--nproc_per_node 2 -m benchmarks.pretrain.train ...` (with `--steps`) takes `--batch` images in each and averages the
gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from atomdiff.toybox.judge import JUDGE_FOLDER, LABELS, Judge, save_judge
from atomdiff.toybox.world import CLASSES, IMAGE_SIZE, SCENES
from atomdiff.utils.atomic import new_file
from benchmarks.base_quality import psnr, restore
from benchmarks.pretrain.architecture import (
    GUIDANCE_SCALE,
    NUM_INFERENCE_STEPS,
    assemble,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from benchmarks.pretrain.data import World, render_families, render_world, token_ids
from benchmarks.pretrain.fastest import print_profile
from benchmarks.pretrain.stage import Checkpoints, Phase, Stage, run_stage
from benchmarks.pretrain.train_autoencoder import center_latents, encode, sizes, train_autoencoder
from benchmarks.pretrain.train_autoencoder import fastest_phase as fastest_autoencoder
from benchmarks.pretrain.train_denoiser import Denoiser, layout, make_loss, train_denoiser
from benchmarks.pretrain.train_inner import InnerDenoiser
from benchmarks.pretrain.train_judge import fastest_phase as fastest_judge
from benchmarks.pretrain.weights import load_weights, make_pipeline, save_pipeline, save_shards

STAGES = ("judge", "autoencoder", "inner", "denoiser")
USUAL_STAGES = ("judge", "autoencoder", "denoiser")
WARM = {"judge": "judge", "crops": "autoencoder", "images": "autoencoder", "denoiser": "denoiser"}
"""What has a fastest way to be found, and the stage that it is for."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/pretrain"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=540, help="all of it, from start to end")
    parser.add_argument("--steps", type=int, default=0, help="end each stage after so many steps, whatever they take")
    parser.add_argument("--images", type=int, default=400_000, help="most captioned images")
    parser.add_argument("--families", type=int, default=8_000, help="most families of the judge, 12 images each")
    parser.add_argument("--judge_share", type=float, default=0.13, help="share of the seconds for the judge")
    parser.add_argument("--vae_share", type=float, default=0.25, help="share of the seconds for the autoencoder")
    parser.add_argument("--batch", type=int, default=512, help="images in a step of the UNet")
    parser.add_argument("--vae_batch", type=int, default=64, help="images in a step of the autoencoder")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="highest of the UNet")
    parser.add_argument("--start_from", type=Path, help="folder of weights, or of a pipeline, to go on from")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, help="what is trained; default: all, with --start_from the denoiser"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="weights the denoiser's stage changes, by prefix (unet.up_blocks.2)"
    )
    parser.add_argument("--world", type=Path, help="file of rendered images to read, or to write if there is none")
    parser.add_argument(
        "--checkpoint_seconds", type=float, default=0, help="keep the state that often, and resume; 0: never"
    )
    parser.add_argument("--pipeline", type=Path, help="only make pipeline and judge folders of the weights in --out")
    parser.add_argument("--tiny", action="store_true", help="few images and small batches, to try it out")
    parser.add_argument("--warm", choices=WARM, help="only find the fastest way of a part; fills the compiler's cache")
    parser.add_argument("--profile", action="store_true", help="print at the end what a step's time goes to")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.stages = options.stages or (USUAL_STAGES if options.start_from is None else USUAL_STAGES[-1:])
    if "inner" in options.stages and options.start_from is None:
        parser.error("the stage inner needs trained outer blocks: --start_from FOLDER")
    return options


def channels_last(module: Any, device: torch.device) -> Any:
    """The module on the device with its weights channels last."""
    return module.to(device, memory_format=torch.channels_last)


def build_denoiser(device: torch.device) -> tuple[Any, Denoiser]:
    """Tokenizer, and text encoder and UNet on the device."""
    tokenizer = build_tokenizer()
    denoiser = Denoiser(build_text_encoder(tokenizer), build_unet())
    denoiser.move_to(device)
    return tokenizer, denoiser


def kept(path: Path | None, make: Callable[[], Any]) -> Any:
    """Tensors of a file, which is written if there is none; without a path they are made."""
    if path is None:
        return make()
    with PartialState().main_process_first():
        if not path.exists():
            with new_file(path) as file:
                torch.save(make(), file)
    return torch.load(path, mmap=True, weights_only=True)


def warm(options: argparse.Namespace, device: torch.device) -> None:
    """Find the fastest way of a part on random inputs; its choice and the compiler's cache serve the run itself."""
    images = torch.randint(256, (256, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    judge = channels_last(Judge(), device)
    labels = {kind: torch.zeros(256, dtype=torch.long, device=device) for kind in LABELS}
    world = World(images, torch.ones(256, 1, 16, 16, dtype=torch.half, device=device), labels, [])
    if options.warm == "judge":
        fastest_judge(judge, world, images.view(16, 4, 4, *images.shape[1:]), options.out)
    elif options.warm == "denoiser":
        tokenizer, denoiser = build_denoiser(device)
        latents = torch.randn(options.batch, 16, 16, 16).to(device, memory_format=layout(device))
        denoiser.train().choose_way(latents, token_ids(tokenizer, ["a mug"] * (options.batch - 1), device), options.out)
    else:
        vae, judge = channels_last(build_vae(), device), judge.requires_grad_(False).eval()
        side, count = list(sizes(options.vae_batch).items())[options.warm == "images"]
        fastest_autoencoder(vae, judge, world, side, count, 1.0, options.out)


def begin_to_warm(options: argparse.Namespace) -> dict[str, subprocess.Popen[bytes]]:
    """A process for each part of the chosen stages, all at once."""
    command = [sys.executable, "-m", "benchmarks.pretrain.train", "--out", str(options.out)]
    command += ["--batch", str(options.batch), "--vae_batch", str(options.vae_batch), "--warm"]
    return {part: subprocess.Popen([*command, part]) for part, stage in WARM.items() if stage in options.stages}


def load_what_fits(part: str, module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load the weights that a part still has; attention that is new to it starts without an effect."""
    own = module.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    new = own.keys() - fitting.keys()
    if new:
        print(f"{part}: {len(new)} of {len(own)} weights are new", flush=True)
    without_effect = {name: torch.zeros_like(own[name]) for name in new if ".proj_out." in name}
    module.load_state_dict(fitting | without_effect, strict=False)


class Run:
    """One pretraining: the parts, the clock and what is written."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device, self.begin = options, device, time.perf_counter()
        self.checkpoints = Checkpoints(options.out, options.checkpoint_seconds)
        torch.manual_seed(options.seed)
        self.vae = channels_last(build_vae(), device)
        self.judge = channels_last(Judge(), device)
        self.tokenizer, self.denoiser = build_denoiser(device)
        self.inner = InnerDenoiser(self.denoiser) if "inner" in options.stages else None
        self.warming = begin_to_warm(options) if device.type == "cuda" else {}
        self.stages: list[Stage] = []
        self.notes: dict[str, Any] = {}
        if options.start_from is not None:
            states, scaling_factor = load_weights(options.start_from)
            for part, module in self.parts().items():
                load_what_fits(part, module, states.get(part, {}))
            self.vae.register_to_config(scaling_factor=scaling_factor)

    def parts(self) -> dict[str, torch.nn.Module]:
        """What is trained and saved."""
        text_encoder, unet = self.denoiser.text_encoder, self.denoiser.unet
        parts = {"judge": self.judge, "vae": self.vae, "text_encoder": text_encoder, "unet": unet}
        return parts if self.inner is None else parts | {"small_head": self.inner.small}

    def left(self) -> float:
        """Seconds until the end."""
        deadline = self.options.out / "deadline"
        if deadline.exists():
            return float(deadline.read_text()) - time.time()
        return self.options.seconds - (time.perf_counter() - self.begin)

    def wait_for(self, *parts: str) -> None:
        """Wait until the fastest ways of parts are known."""
        for part in parts:
            if part in self.warming:
                try:
                    self.warming[part].wait(timeout=150)
                except subprocess.TimeoutExpired:
                    print(f"{part}: the search for its fastest way was stopped", flush=True)
                    self.warming[part].kill()

    def stage(self, name: str, seconds: float, learning_rate: float, warmup: float = Stage.warmup) -> Stage:
        """A new stage, which the report will list."""
        self.stages.append(Stage(name, seconds, learning_rate, warmup=warmup, total_steps=self.options.steps))
        return self.stages[-1]

    def save(self) -> None:
        """Write weights and report; of several processes the first one does."""
        if not PartialState().is_main_process:
            return
        save_shards(self.parts(), self.options.out)
        card = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        report = {
            "scaling_factor": self.vae.config.scaling_factor,
            "device": card,
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "seconds": round(time.perf_counter() - self.begin),
            "options": {key: value for key, value in vars(self.options).items() if key != "warm"},
            **self.notes,
            "stages": [asdict(stage) for stage in self.stages],
        }
        (self.options.out / "report.json").write_text(json.dumps(report, indent=1, default=str) + "\n")

    def learn(self, world: World, at_once: int) -> None:
        """The chosen stages, the last one in the time that is left; `at_once` images are rendered at once."""
        stages, total = self.options.stages, self.options.seconds
        if "judge" in stages:
            count, seed, path = self.options.families, self.options.seed + 1, self.options.world
            render = partial(render_families, count, 0.03 * total, seed, self.device, batch=at_once)
            families = kept(path and path.with_suffix(".families.pt"), render)
            stage = self.stage("judge", self.options.judge_share * total if stages[1:] else self.left(), 2e-3)
            self.wait_for("judge")
            phase = fastest_judge(self.judge, world, families, self.options.out)
            run_stage(stage, self.judge, [phase], checkpoints=self.checkpoints)
            del families, phase
        self.judge.eval()
        if "autoencoder" in stages:
            self.wait_for("crops", "images")
            seconds = self.options.vae_share * total if "denoiser" in stages else self.left() - 0.03 * total
            stage = self.stage("autoencoder", seconds, 1e-3)
            train_autoencoder(self.vae, self.judge, world, stage, self.options.vae_batch, self.checkpoints)
        self.notes["autoencoder"] = self.measure_autoencoder(world)
        if stages == ["judge"]:
            self.save()
            return
        make = partial(encode, self.vae, world.images, min(at_once, 512))
        if "autoencoder" in stages:
            latents = center_latents(self.vae, make())
        else:
            path = self.options.out / "latents.pt" if self.options.checkpoint_seconds else None
            latents = kept(path, lambda: make() * self.vae.config.scaling_factor)
        self.notes["channel_std"] = [round(v, 3) for v in latents[:4096].float().std((0, 2, 3)).tolist()]
        self.save()
        world.images = world.images[:0].clone()
        ids = token_ids(self.tokenizer, world.texts, self.device)
        batch = self.options.batch
        if self.inner is not None:
            self.train_part("inner", self.inner, Phase(make_loss(self.inner, latents, world.masks, ids, batch)))
        if "denoiser" not in stages:
            return
        some = latents[:batch].float().contiguous(memory_format=layout(self.device))
        self.wait_for("denoiser")
        is_captured = self.denoiser.train().choose_way(some, ids[:batch], self.options.out)
        for name, parameter in self.denoiser.named_parameters():
            parameter.requires_grad_(name.startswith(tuple(self.options.only)))
        self.phase = Phase(make_loss(self.denoiser, latents, world.masks, ids, batch), captured=is_captured)
        self.train_part("denoiser", self.denoiser, self.phase)

    def train_part(self, name: str, part: Denoiser | InnerDenoiser, phase: Phase) -> None:
        """Train the UNet, or its inner part, in the time that is left."""
        seconds = self.left() - 0.03 * self.options.seconds
        stage = self.stage(name, seconds, self.options.learning_rate, warmup=0.03)
        self.notes[f"average_{name}"] = train_denoiser(part, phase, stage, self.save, self.checkpoints)
        self.save()

    @torch.no_grad()
    def measure_autoencoder(self, world: World) -> dict[str, float]:
        """Mean PSNR (dB) of restored images and of real ones the judge's similarity to them."""
        images = world.images[:256].float() / 255
        restored = restore(self.vae, images)
        ratio = psnr(images, restored)
        alike = (self.judge(images * 2 - 1)[1] * self.judge(restored * 2 - 1)[1]).sum(1).mean().item()
        print(f"autoencoder: PSNR {ratio:.2f} dB, similarity {alike:.4f}", flush=True)
        return {"psnr_db": round(ratio, 2), "similarity": round(alike, 4)}

    def draw_sheet(self) -> None:
        """Write an image of some classes in some scenes."""
        pipe = assemble(self.vae, self.tokenizer, self.denoiser.text_encoder.eval(), self.denoiser.unet.eval())
        pipe.set_progress_bar_config(disable=True)
        scenes = list(SCENES.values())
        names, columns, steps = (
            (CLASSES[:2], 2, 4) if self.options.tiny else (CLASSES, len(scenes), NUM_INFERENCE_STEPS)
        )
        looks = ("red striped ", "blue dotted ", "", "green ", "", "yellow checked ", "", "purple ")
        prompts = [
            f"a photo of a {look}{name} {scene}"
            for name in names
            for look, scene in list(zip(looks, scenes, strict=True))[:columns]
        ]
        generator = torch.Generator().manual_seed(0)
        images = pipe(prompts, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, generator=generator).images
        width = len(images) // len(names)
        from PIL import Image

        sheet = Image.new("RGB", (132 * width, 132 * len(names)), "white")
        for index, image in enumerate(images):
            sheet.paste(image, (132 * (index % width) + 2, 132 * (index // width) + 2))
        sheet.save(self.options.out / "sheet.png")


def main() -> None:
    """Parse, train, save."""
    options = parse()
    if options.pipeline is not None:
        states, scaling_factor = load_weights(options.out)
        judge = Judge()
        judge.load_state_dict(states["judge"])
        save_judge(judge, options.pipeline.with_name(JUDGE_FOLDER.name))
        save_pipeline(make_pipeline(states, scaling_factor), options.pipeline)
        return
    if options.tiny:
        options.images, options.families, options.batch, options.vae_batch = 48, 12, 4, 4
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and (device.type == "cuda" or not options.steps):
        raise SystemExit(
            f"Several processes train on a CPU only, and end after --steps, as clocks differ: found {device.type} "
            f"and --steps {options.steps}. Start a single process, or give the number of steps."
        )
    processes = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=1))  # others wait while one renders
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    options.out.mkdir(parents=True, exist_ok=True)
    if options.warm:
        warm(options, device)
        return
    run = Run(options, device)
    torch.manual_seed(options.seed + 1_000_003 * processes.process_index)  # the same weights, other batches
    at_once = 8 if options.tiny else 1024 if device.type == "cuda" else 128
    render = partial(render_world, options.images, 0.10 * options.seconds, options.seed, device, at_once)
    world = World(**kept(options.world, lambda: vars(render())))
    run.learn(world, at_once)
    if "denoiser" not in options.stages:
        return
    if processes.is_main_process:
        run.draw_sheet()
    if options.profile:
        print_profile(run.phase.loss_of, run.denoiser)


if __name__ == "__main__":
    main()
