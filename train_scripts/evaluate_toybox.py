"""Measure the toybox's base: reconstruction, and whether pictures show what unseen captions ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    pretrained_model_name_or_path: str = "samples/toybox-sd"
    """The base."""
    judge: str = "samples/toybox-judge"
    """Folder of the judge."""
    count: int = 256
    """Number of captions, of combinations that pretraining never saw."""
    num_inference_steps: int = 30
    """Denoising steps."""
    guidance_scale: float = 4.0
    """Classifier-free guidance."""
    output: str = "benchmarks/results/toybox.json"
    """The result file; a sheet of the first pictures is written to the folder out."""


def main(config: EvaluateConfig) -> None:
    """Measure, print, store."""
    quiet_libraries()
    from atomdiff.toybox.base import load_toybox
    from atomdiff.toybox.judge import load_judge
    from atomdiff.toybox.report import evaluate_base
    from atomdiff.utils.image_grid import make_image_grid
    from atomdiff.utils.versions import versions

    pipe = load_toybox(config.pretrained_model_name_or_path)
    figures, images, captions = evaluate_base(
        pipe,
        load_judge(config.judge),
        count=config.count,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )
    flat = {"psnr_db": figures.pop("psnr_db")}
    flat |= {f"{source}_{kind}": share for source, kinds in figures.items() for kind, share in kinds.items()}
    command = f"python train_scripts/evaluate_toybox.py --count {config.count}"
    result = {"machine": versions()["machine"], "versions": versions(), "date": date.today().isoformat()}
    result |= {"command": f"{command} --guidance_scale {config.guidance_scale:g}", "figures": flat}
    Path(config.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(flat, indent=1))
    Path("out").mkdir(exist_ok=True)
    rows = [images[i : i + 8] for i in range(0, min(len(images), 48), 8)]
    make_image_grid(rows, [str(caption) for caption in captions[: len(rows) * 8 : 8]]).save("out/toybox.png")


if __name__ == "__main__":
    main(parse_config(EvaluateConfig))
