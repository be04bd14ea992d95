"""What a training run found and is about to do, in one short block; and prompts that are longer than the base reads."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from atomdiff.pipelines.prompt_syntax import replace_words
from atomdiff.training.config import TrainConfig
from atomdiff.training.config.prompt import PromptConfig
from atomdiff.training.training_images import TrainingImage


def describe_images(
    config: TrainConfig, instance_images: Sequence[Sequence[TrainingImage]], num_class_images: int
) -> str:
    """Return the lines about images.

    Args:
        config: The run.
        instance_images: Of each subject.
        num_class_images: Of all subjects.
    """
    lines = []
    for subject, images in zip(config.subjects, instance_images, strict=True):
        captions, masks = sum(image.captioned for image in images), sum(image.masked for image in images)
        line = f"{subject.name}: {_several(len(images), 'image')} in {subject.instance_data_dir}"
        line += f", {_several(captions, 'caption')}"
        line += f" (else {subject.fill(subject.instance_prompt)!r})" if captions < len(images) else ""
        lines.append(line + (f", {_several(masks, 'mask')}" if config.masked_loss else ""))
    if config.with_prior_preservation:
        folders = dict.fromkeys(str(config.class_folder(subject)) for subject in config.subjects)
        lines.append(f"class: {_several(num_class_images, 'image')} in {', '.join(folders)}")
    sizes = Counter(image.bucket for images in instance_images for image in images if image.bucket)
    lines.append("sizes: " + ", ".join(f"{width}x{height} ({count})" for (height, width), count in sizes.items()))
    return "\n".join(lines)


def describe_training(config: TrainConfig, num_trainable_parameters: int, processes: int, done: int) -> str:
    """Return the lines about what is trained, and how long.

    Args:
        config: The run.
        num_trainable_parameters: Their number.
        processes: That share the work.
        done: Steps that are done already.
    """
    parts = ["UNet", *(["text encoders"] if config.train_text_encoder else [])]
    words = [subject.trigger_word for subject in config.subjects] if config.train_token else []
    trained = f"{config.adapter} on {' and '.join(parts)}" + (f", the word {', '.join(words)}" if words else "")
    batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    steps = f"{config.max_train_steps}" + (f", of which {done} are done" if done else "")
    return (
        f"trained: {trained}; {num_trainable_parameters:,} parameters\n"
        f"steps: {steps}, of {_several(batch, 'image')}"
        + (f" and {batch} of the class" if config.with_prior_preservation else "")
        + f"; {config.optimizer} at {config.learning_rates['adapter']:g}"
    )


def warn_of_cut_prompts(pipe: Any, config: PromptConfig, prompts: Mapping[str, Sequence[str]]) -> None:
    """Warn of prompts of which the base reads the beginning alone.

    Args:
        pipe: The base.
        config: The run; a trigger word counts as its vectors.
        prompts: What they are, such as captions -> the prompts, each once an image.
    """
    longest = pipe.tokenizer.model_max_length
    vectors = " ".join("a" for _ in range(config.num_vectors))
    words = {subject.trigger_word: vectors for subject in config.subjects} if config.train_token else {}
    for what, texts in prompts.items():
        counts = [len(pipe.tokenizer(replace_words(text, words), verbose=False).input_ids) for text in texts]
        if long := [number for number, count in enumerate(counts) if count > longest]:
            most = max(long, key=lambda number: counts[number])
            shown = f"{texts[most][:40]!r}... has {counts[most]}"
            found = f"{what}: {len(long)} of {len(texts)} have more than the {longest} tokens that the base reads"
            warnings.warn(f"{found} ({shown}): the rest is cut off; shorten them", stacklevel=2)


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count or 'no'} {what}s"
