"""What many tests do: write images, add adapters to a pipeline, predict noise, compare every bit."""

import copy
import dataclasses
import json
import re
import signal
import threading
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from atomdiff.pipelines.models import pipeline_models

# Attributes of models that diffusers or PyTorch leave behind.
ACCIDENTAL = {"lora_scale", "_safe_fusing", "_compiled_call_impl", "_output_capturing_hooks_installed"}


def write_images(folder, widths=(32, 32, 32), seed=0):
    """Write random images `0.png` and so on, of these widths and 32 pixels high, into a new folder; return it."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number, width in enumerate(widths):
        pixels = random.integers(0, 255, (32, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def add_adapter(pipe, name, config, parts=("unet",), seed=0, scale=0.1):
    """Add an adapter to models of a pipeline, with random numbers added to all that it trains."""
    generator = torch.Generator().manual_seed(seed)
    for part in parts:
        model = pipe.components[part]
        model.add_adapter(copy.deepcopy(config), name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(f".{name}") or f".{name}." in key:
                    parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        model.requires_grad_(False)


def snapshot(pipe):
    """Copies of all tensors of a pipeline's models, and all else that can be seen of it."""
    models = pipeline_models(pipe)
    tensors = {
        f"{part}.{key}": value.detach().clone()
        for part, model in models.items()
        for key, value in [*model.state_dict().items(), *model.named_buffers()]
    }
    return tensors, {
        "modules": {part: [(path, type(module)) for path, module in m.named_modules()] for part, m in models.items()},
        "attributes": {part: set(vars(model)) - ACCIDENTAL for part, model in models.items()},
        "config": pipe.text_encoder.config.to_dict(),
        "vocabulary": pipe.tokenizer.get_vocab(),
        "tokens": pipe.tokenizer.tokenize("a photo of ohwx zwx mug"),
    }


def assert_unchanged(pipe, before):
    """Check that a pipeline is as in a snapshot, to the bit."""
    tensors, structure = snapshot(pipe)
    assert_same_tensors(tensors, before[0])
    assert structure == before[1]


def assert_same_tensors(now, before):
    """Check that two dicts have the same tensors, to the bit."""
    assert now.keys() == before.keys()
    assert [key for key, value in before.items() if not torch.equal(now[key], value)] == []


def embed(pipe, prompt):
    """The prompt embeddings of a prompt."""
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def predict(pipe, prompt="a photo of ohwx mug"):
    """The UNet's prediction of always the same noise for a prompt."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(noise, 5, embed(pipe, prompt)).sample


def predict_batch(pipe, count, seed=0):
    """The UNet's predictions of `count` noises for random prompt embeddings."""
    generator = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(count, 4, 8, 8, generator=generator), torch.randn(count, 7, 32, generator=generator)
    with torch.no_grad():
        return pipe.unet(latents, 500, encoder_hidden_states=text).sample


def sharing_pipeline(pipe, *own):
    """Another pipeline of the same components, but for copies of those named."""
    parts = {name: copy.deepcopy(part) if name in own else part for name, part in pipe.components.items()}
    other = type(pipe)(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def generate_image(pipe, prompt):
    """An image (32, 32, 3) of always the same noise, from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    return pipe(prompt, generator=generator, **options).images[0]


def assert_links_lead_somewhere(markdown):
    """Check that the files that a page of Markdown shows as images are there; return their paths from its folder."""
    links = re.findall(r"!\[.*\]\((.*)\)", markdown.read_text())
    assert links and [link for link in links if not (markdown.parent / unquote(link)).is_file()] == []
    return links


def read_log(config):
    """The lines of a training run's log."""
    return [json.loads(line) for line in (Path(config.output_dir) / "training_log.jsonl").read_text().splitlines()]


def read_measurements(config):
    """The lines of a run's validation log, without the seconds that they took."""
    lines = [json.loads(line) for line in (Path(config.output_dir) / "validation_log.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def concept_bytes(path):
    """The bytes of the files of a concept, be it a file or a folder, but for its date."""
    files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return {file.name: re.sub(rb'"modelspec.date":"[^"]*"', b"", file.read_bytes()) for file in files}


def models(pipe):
    """The models of a pipeline by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def assert_same_models(pipe, expected):
    """Check that two pipelines have the same models with the same weights, to the bit."""
    assert models(pipe).keys() == models(expected).keys()
    for name, part in models(expected).items():
        assert_same_tensors(models(pipe)[name].state_dict(), part.state_dict())


def based_on(config, folder, **changes):
    """A training config with another base and other changes."""
    return dataclasses.replace(config, pretrained_model_name_or_path=str(folder), **changes)


def together(*calls, rounds=1):
    """What each function gives, called so many times, all at the same time; raises the first error of any."""
    results, errors = [[] for _ in calls], []
    start = threading.Barrier(len(calls))

    def run(call, results):
        try:
            start.wait()
            for _ in range(rounds):
                results.append(call())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(calls, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def change_tensors(file, change):
    """Replace the tensors of a safetensors file by what a function makes of them."""
    save_file(change(load_file(file)), file)


def stop_at(monkeypatch, step):
    """Ask a training run to stop in this step."""
    from atomdiff.training.run_log import RunLog

    def stop(self, number, *rest):
        if number == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunLog, "step", stop)
