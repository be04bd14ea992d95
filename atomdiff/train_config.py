"""What a training run can be told: one frozen dataclass."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from atomdiff.command_line import parse_config
from atomdiff.errors import UserError

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Precision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True)
class Subject:
    """What one folder of photos shows, and the words for it.

    Raises:
        UserError: A field has a value that cannot be used.
    """

    instance_data_dir: str
    """Folder of the subject's photos."""
    class_name: str | None = None
    """What the subject is, in the base's own words: mug."""
    trigger_word: str = "sks"
    """The word that will stand for the subject in prompts."""
    initializer_token: str | None = None
    """Word or words whose mean embedding the trigger word starts from. Default: the class name."""
    instance_prompt: str = "a photo of {trigger_word} {class_name}"
    """Prompt of the photos that have none of their own."""
    class_prompt: str = "a photo of a {class_name}"
    """Prompt of the class pictures."""
    class_data_dir: str | None = None
    """Folder of the class pictures."""

    def __post_init__(self) -> None:
        if not self.trigger_word or len(self.trigger_word.split()) != 1:
            raise UserError(f"trigger_word={self.trigger_word!r}: expected one word without spaces")

    def fill(self, prompt: str) -> str:
        """Put the trigger word and the class name where a prompt names them in braces."""
        for name in ("{trigger_word}", "{trigger}"):
            prompt = prompt.replace(name, self.trigger_word)
        return prompt.replace("{class_name}", self.class_name or "")

    @property
    def name(self) -> str:
        """Name of the folder of photos."""
        return Path(self.instance_data_dir).resolve().name

    @property
    def phrase(self) -> str:
        """What to write in prompts: trigger word and class."""
        return self.fill("{trigger_word} {class_name}").strip()


@dataclass(frozen=True)
class TrainConfig:
    """One personalisation run.

    Prompts may contain `{trigger_word}` (or `{trigger}`) and `{class_name}`. Fields known from diffusers' DreamBooth
    scripts mean the same here.

    Raises:
        UserError: A field has a value that cannot be used; the message names field, value and what is allowed.
    """

    pretrained_model_name_or_path: str
    """The base: a folder or a Hub id of a Stable Diffusion 1.x or 2.x pipeline."""
    instance_data_dir: str | None = None
    """Folder of the subject's photos. A .txt file beside a photo is its prompt, in place of instance_prompt."""
    concepts_list: str | None = None
    """YAML or JSON file with several subjects, in place of instance_data_dir: a list of mappings, each with its
    instance_data_dir and whatever differs from this run of class_name, trigger_word, initializer_token,
    instance_prompt, class_prompt and class_data_dir. Each is learnt in a run of its own, in a folder of its own."""
    one_file: bool = False
    """Learn all subjects of concepts_list in one run, as one concept with a word for each."""
    output_dir: str = "out/train"
    """Folder for the concept, the checkpoints, the logs and the contact sheet."""
    revision: str | None = None
    """Revision of a base on the Hub."""
    variant: str | None = None
    """Variant of the base's files, such as fp16."""

    class_name: str | None = None
    """What the subject is, in the base's own words: mug."""
    trigger_word: str = "sks"
    """The word that will stand for the subject in prompts."""
    instance_prompt: str = "a photo of {trigger_word} {class_name}"
    """Prompt of the subject's photos."""
    class_prompt: str = "a photo of a {class_name}"
    """Prompt of the class pictures."""
    train_token: bool = True
    """Train the trigger word's embedding too; it is stored with the concept."""
    token_learning_rate: float = 1e-2
    """Learning rate of the trigger word's embedding."""
    initializer_token: str | None = None
    """Word or words whose mean embedding the trigger word starts from. Default: the class name."""

    resolution: int | None = None
    """Side of the training pictures in pixels. Default: that of the base."""
    center_crop: bool = False
    """Use only the middle of a photo that is not square; else also both ends of its longer side."""
    random_flip: bool = False
    """Mirror half of the photos drawn. Not for subjects with a left and a right."""

    with_prior_preservation: bool = False
    """Train on pictures of the class as well, so that the concept does not swallow it."""
    class_data_dir: str | None = None
    """Folder of the class pictures; missing ones are generated once. It may contain {class_name}, as prompts may.
    Default: class_images in output_dir, with a folder for each subject if there are several."""
    num_class_images: int = 100
    """Class pictures used."""
    prior_loss_weight: float = 1.0
    """Weight of the loss on class pictures."""
    sample_batch_size: int = 4
    """Pictures generated or encoded together."""
    num_inference_steps: int = 30
    """Denoising steps of class and validation pictures."""
    guidance_scale: float = 7.5
    """Classifier-free guidance of class and validation pictures; 1 is none."""

    adapter: str = "atoms"
    """What is trained: a JSON file with the config of any PEFT method, or "atoms" (its defaults), or "full"."""
    learning_rate: float = 5e-3
    """Learning rate of the adapter. Where overrides.yaml stands beside the adapter's file, its value is the default."""
    lr_scheduler: Schedule = "constant"
    """Course of all learning rates over the run."""
    lr_warmup_steps: int = 0
    """Steps in which the learning rates rise from zero."""
    lr_num_cycles: int = 1
    """Restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Power of polynomial."""
    max_train_steps: int = 400
    """Optimizer steps."""
    train_batch_size: int = 4
    """Photos a step, on each process; as many class pictures come on top."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients make up one step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 for never."""
    adam_beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    adam_beta2: float = 0.999
    """AdamW's decay of the gradient's square."""
    adam_weight_decay: float = 1e-2
    """AdamW's weight decay, for the adapter only."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    use_8bit_adam: bool = False
    """Keep the optimizer's state in 8 bits; needs bitsandbytes and a GPU."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the loss, 5 in its paper. Default: none."""
    mixed_precision: Precision | None = None
    """Precision of the frozen weights and of the arithmetic. Default: what accelerate is configured to."""
    plain_attention: bool = False
    """Compute attention in separate steps: faster for small pictures on a CPU, and takes more memory."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use the attention of xformers, which must be installed."""
    seed: int = 0
    """Every random choice follows from it."""

    checkpointing_steps: int = 500
    """Steps between checkpoints; 0 for none."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept; older ones are removed. Default: all."""
    resume_from_checkpoint: str | None = None
    """Checkpoint folder to go on from, or "latest" for the newest in output_dir."""
    validation_prompts: tuple[str, ...] = ("a photo of {trigger_word} {class_name}",)
    """Prompts of the contact sheet."""
    validation_steps: int = 0
    """Steps between rows of the contact sheet; 0 for no sheet."""
    logging_steps: int = 10
    """Steps between lines of the log."""
    logging_dir: str = "logs"
    """Folder of the tracker's files, in output_dir."""
    report_to: str | None = "tensorboard"
    """Tracker known to accelerate, or none."""

    push_to_hub: bool = False
    """Push the concept to the Hugging Face Hub after the run, with the last validation pictures and a model card."""
    hub_model_id: str | None = None
    """Repository to push to, as user/repo. Default: one of your own, named like the concept's file."""
    hub_token: str | None = field(default=None, repr=False)
    """Access token that may write. Default: the one logged in with, which keeps it out of the command line."""
    hub_private_repo: bool = False
    """Make a new repository private."""

    def __post_init__(self) -> None:
        for name, (least, bound) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value < bound:
                below = "" if bound == math.inf else f" and below {bound}"
                raise UserError(f"{name}={value!r}: expected a number of at least {least}{below}")
        if self.lr_scheduler not in get_args(Schedule):
            raise UserError(f"lr_scheduler={self.lr_scheduler!r}: expected one of {', '.join(get_args(Schedule))}")
        if self.mixed_precision not in (None, *get_args(Precision)):
            allowed = ", ".join(get_args(Precision))
            raise UserError(f"mixed_precision={self.mixed_precision!r}: expected one of {allowed} or none")
        if self.lr_warmup_steps > self.max_train_steps:
            most = self.max_train_steps
            raise UserError(f"lr_warmup_steps={self.lr_warmup_steps}: expected at most max_train_steps={most}")
        if (self.instance_data_dir is None) == (self.concepts_list is None):
            found = "neither of them" if self.instance_data_dir is None else "both"
            raise UserError(f"expected instance_data_dir, or concepts_list for several subjects; found {found}")
        if self.one_file and self.concepts_list is None:
            raise UserError("one_file=True: expected several subjects in a concepts_list")
        for subject in self.subjects:
            self._check_words(subject)
        for name, what in (("trigger_word", "a word of its own"), ("name", "a folder of another name")):
            values = [getattr(subject, name) for subject in self.subjects]
            repeated = next((value for value in values if values.count(value) > 1), None)
            if repeated is not None and (self.one_file or name == "name"):
                raise UserError(f"{self.concepts_list}: {name}={repeated!r} stands for two subjects; give each {what}")

    def _check_words(self, subject: Subject) -> None:
        if self.train_token and not (subject.initializer_token or subject.class_name):
            expected = "what the photos show, in one word such as mug, or an initializer_token (or train_token false)"
            raise UserError(f"class_name={subject.class_name!r}: expected {expected}")
        prompts = {"instance_prompt": subject.instance_prompt}
        if self.with_prior_preservation:
            prompts["class_prompt"] = subject.class_prompt
        if self.validation_steps:
            prompts["validation_prompts"] = " ".join(self.validation_prompts)
        for name, text in prompts.items():
            if "{class_name}" in text and not subject.class_name:
                raise UserError(f"{name}={text!r}: expected a class_name for it, or a prompt that does without")

    @cached_property
    def subjects(self) -> tuple[Subject, ...]:
        """What is learnt.

        Raises:
            UserError: `concepts_list` is not what it should be.
        """
        usual = {field.name: getattr(self, field.name) for field in fields(Subject)}
        if self.concepts_list is None:
            return (Subject(**usual),)
        return tuple(Subject(**{**usual, **entry}) for entry in _read_subjects(Path(self.concepts_list)))

    def runs(self) -> tuple[TrainConfig, ...]:
        """The runs that this config stands for: itself, or one for each subject."""
        if self.concepts_list is None or self.one_file:
            return (self,)
        folder = Path(self.output_dir)
        own = [asdict(subject) | {"output_dir": str(folder / subject.name)} for subject in self.subjects]
        return tuple(replace(self, concepts_list=None, **fields_of_one) for fields_of_one in own)

    @property
    def name(self) -> str:
        """Name of what the run writes: that of the folder of photos, or of the list of concepts."""
        return self.subjects[0].name if self.concepts_list is None else Path(self.concepts_list).stem

    def recipe(self) -> dict[str, Any]:
        """Return the fields that the trained numbers depend on, ready for JSON, without the folders of this machine."""
        recipe = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_RECIPE}
        if self.concepts_list is None:
            return recipe
        subjects = [asdict(subject) for subject in self.subjects]
        folders = ("instance_data_dir", "class_data_dir")
        return recipe | {"subjects": [{k: v for k, v in subject.items() if k not in folders} for subject in subjects]}


def _read_subjects(file: Path) -> list[dict[str, Any]]:
    """Read the entries of a `concepts_list`.

    Raises:
        UserError: It cannot be read, or an entry is not what it should be.
    """
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"concepts_list={str(file)!r}: cannot be read ({error})") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file}: expected a list of mappings, one a subject, each with an instance_data_dir")
    known = {field.name for field in fields(Subject)}
    for entry in entries:
        if unknown := sorted(map(str, entry.keys() - known)):
            raise UserError(f"{file}: unknown {', '.join(unknown)}; a subject has {', '.join(sorted(known))}")
        if "instance_data_dir" not in entry:
            raise UserError(f"{file}: found a subject without instance_data_dir: {entry}")
        if wrong := [name for name, value in entry.items() if not isinstance(value, str)]:
            raise UserError(f"{file}: {wrong[0]}={entry[wrong[0]]!r}: expected a text")
    return entries


_FROM_ONE = (
    "resolution num_class_images sample_batch_size num_inference_steps lr_num_cycles max_train_steps train_batch_size "
    "gradient_accumulation_steps checkpoints_total_limit logging_steps"
).split()
_FROM_ZERO = (
    "token_learning_rate prior_loss_weight guidance_scale learning_rate lr_warmup_steps lr_power max_grad_norm "
    "adam_weight_decay adam_epsilon snr_gamma checkpointing_steps validation_steps"
).split()
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_FROM_ONE, (1, math.inf)),
    **dict.fromkeys(_FROM_ZERO, (0, math.inf)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1)),
}
_NOT_IN_RECIPE = (
    "pretrained_model_name_or_path instance_data_dir concepts_list class_data_dir output_dir adapter "
    "resume_from_checkpoint checkpointing_steps checkpoints_total_limit validation_prompts validation_steps "
    "logging_steps logging_dir report_to push_to_hub hub_model_id hub_token hub_private_repo"
).split()


def load_config(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> TrainConfig:
    """Read a run's config from a command line: `--config FILE`, as often as wanted, and a flag for every field.

    Values come, the later ones winning, from the defaults, from the overrides.yaml beside the adapter's JSON file (what
    a method needs its own value for, such as its learning rate), and from the command line in its order.

    Args:
        arguments: The command line without the program's name, by default this process's.
        prog: The program's name in messages.

    Raises:
        UserError: A field has a value that cannot be used.
    """
    config: TrainConfig = parse_with_overrides(TrainConfig, arguments, prog)
    return config


def parse_with_overrides(config_class: Any, arguments: Sequence[str] | None, prog: str | None) -> Any:
    """Parse a config with a field `adapter`; the overrides.yaml beside that file, if it is one, changes defaults."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    config = parse_config(config_class, arguments, prog=prog)
    adapter = Path(config.adapter)
    overrides = adapter.with_name("overrides.yaml")
    if adapter.is_file() and overrides.is_file():
        config = parse_config(config_class, ["--config", str(overrides), *arguments], prog=prog)
    return config
