"""What a training run starts with, in a few lines; and a warning of prompts that are longer than the base reads."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from atomdiff.pipelines.prompt_syntax import replace_words
from atomdiff.training.config import TrainConfig
from atomdiff.training.config.optimizer import ParameterGroup
from atomdiff.training.config.prompt import PromptConfig
from atomdiff.training.training_images import TrainingImage
from atomdiff.utils.untrusted import list_some

_MODELS: dict[ParameterGroup, str] = {"adapter": "UNet", "text_encoder": "text encoders"}


def describe_images(
    config: TrainConfig,
    by_subject: Sequence[tuple[Sequence[TrainingImage], Sequence[TrainingImage]]],
    num_class_images: int,
) -> str:
    """Return the lines about the images of each subject, those trained on and those held out, and the class images."""
    lines = []
    for subject, (images, held_out) in zip(config.subjects, by_subject, strict=True):
        captions, masks = sum(image.captioned for image in images), sum(image.masked for image in images)
        line = f"{subject.name}: {_several(len(images), 'image')} in {subject.instance_data_dir}"
        line += f", {_several(captions, 'caption')}"
        line += f" (else {subject.fill(subject.instance_prompt)!r})" if captions < len(images) else ""
        line += f", {_several(masks, 'mask')}" if config.masked_loss else ""
        if held_out:
            line += f"; held out: {list_some([image.fingerprint[0] for image in held_out])}"
            line += f" in {subject.validation_data_dir}" if subject.validation_data_dir else ""
        lines.append(line)
    if config.with_prior_preservation:
        folders = dict.fromkeys(str(config.class_folder(subject)) for subject in config.subjects)
        lines.append(f"class: {_several(num_class_images, 'image')} in {', '.join(folders)}")
    sizes = Counter(image.bucket for images, _ in by_subject for image in images if image.bucket)
    lines.append("sizes: " + ", ".join(f"{width}x{height} ({count})" for (height, width), count in sizes.items()))
    return "\n".join(lines)


def describe_training(
    config: TrainConfig, groups: Mapping[ParameterGroup, Sequence[Tensor]], processes: int, done: int
) -> str:
    """Return the lines about what is trained, and in how many steps, some of which are done already."""
    count = sum(parameter.numel() for parameters in groups.values() for parameter in parameters)
    models = " and ".join(name for group, name in _MODELS.items() if group in groups)
    words = [subject.trigger_word for subject in config.subjects] if config.train_token else []
    named = f", trigger word{'s' * (len(words) > 1)} {', '.join(words)}" if words else ""
    images = _several(config.instance_images_per_step(processes), "image")
    images += " and as many class images" if config.with_prior_preservation else ""
    kept = {"none": "", "class": ", keeping the class", "blank": ", keeping the empty prompt"}[config.preservation]
    finished = f" ({done} of them done)" if done else ""
    return (
        f"adapter: {config.adapter}{models and f' on {models}'}{named}; {count:,} parameters\n"
        f"steps: {config.max_train_steps}{finished}, each of {images}{kept}; "
        f"{config.optimizer} at {config.learning_rates[next(iter(groups))]:g}"
    )


def warn_of_cut_prompts(pipe: Any, config: PromptConfig, prompts: Mapping[str, Sequence[str]]) -> None:
    """Warn of prompts, given by their kind, of which the base reads the beginning alone.

    A trigger word counts as its vectors.
    """
    longest = pipe.tokenizer.model_max_length
    vectors = " ".join(["a"] * config.num_vectors)
    words = {subject.trigger_word: vectors for subject in config.subjects} if config.train_token else {}
    for kind, texts in prompts.items():
        counts = [len(pipe.tokenizer(replace_words(text, words), verbose=False).input_ids) for text in texts]
        if long := [number for number, count in enumerate(counts) if count > longest]:
            most = max(long, key=lambda number: counts[number])
            example = f"{texts[most][:40]!r}... has {counts[most]}"
            counted = f"{kind}: {len(long)} of {len(texts)} have more than the {longest} tokens that the base reads"
            warnings.warn(f"{counted} ({example}): the rest is cut off; shorten them", stacklevel=2)


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count or 'no'} {what}s"
