"""What a training run can be told: one frozen dataclass."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from atomdiff.training.checks import check_run
from atomdiff.utils.assets import find_asset
from atomdiff.utils.choices import MOST_REPEATS, Optimizer, Precision, PredictionType, Schedule, TimestepSampling
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.paths import PathText, expand_paths
from atomdiff.utils.text import fit_article
from atomdiff.utils.text_files import read_yaml


@dataclass(frozen=True)
class Subject:
    """What one folder of photos shows, and the words for it.

    Raises:
        UserError: A field has a value that cannot be used.
    """

    instance_data_dir: PathText
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
    class_data_dir: PathText | None = None
    """Folder of the class pictures."""
    repeats: int = 1
    """How often each photo comes in an epoch."""

    def __post_init__(self) -> None:
        expand_paths(self)
        if type(self.repeats) is not int or not 1 <= self.repeats <= MOST_REPEATS:
            raise UserError(f"repeats={self.repeats!r}: expected a whole number from 1 to {MOST_REPEATS}")
        if not self.trigger_word or len(self.trigger_word.split()) != 1:
            raise UserError(f"trigger_word={self.trigger_word!r}: expected one word without spaces")

    def fill(self, prompt: str) -> str:
        """Put the trigger word and the class name where a prompt names them in braces."""
        for name in ("{trigger_word}", "{trigger}"):
            prompt = prompt.replace(name, self.trigger_word)
        class_name = self.class_name or ""
        return fit_article(prompt, class_name).replace("{class_name}", class_name)

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

    pretrained_model_name_or_path: PathText
    """The base, Stable Diffusion 1.x, 2.x or XL: a folder or a Hub id of a pipeline, or a checkpoint file
    (.safetensors, .ckpt), here or as an address on the Hub."""
    instance_data_dir: PathText | None = None
    """Folder of the subject's photos. A .txt file beside a photo is its prompt, in place of instance_prompt."""
    concepts_list: PathText | None = None
    """YAML or JSON file with several subjects, in place of instance_data_dir: a list of mappings, each with its
    instance_data_dir and whatever differs from this run of class_name, trigger_word, initializer_token,
    instance_prompt, class_prompt, class_data_dir and repeats. Each is learnt in a run and a folder of its own."""
    one_file: bool = False
    """Learn all subjects of concepts_list in one run, as one concept with a word for each."""
    output_dir: PathText = "out/train"
    """Folder for the concept, the checkpoints, the logs and the contact sheet."""
    revision: str | None = None
    """Revision of a base on the Hub."""
    variant: str | None = None
    """Variant of the base's files, such as fp16."""
    single_file_config: PathText | None = None
    """Folder or Hub id of a pipeline whose configs describe the base's checkpoint file. Default: the one that diffusers
    finds out, from the Hub, which takes every 2.x for the v-predicting 2.1."""
    pretrained_vae_model_name_or_path: PathText | None = None
    """Another VAE for the base: a folder, a Hub id or a checkpoint file. Default: the base's own."""

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
    token_learning_rate: float | None = None
    """Learning rate of the words' embeddings. Default: 1e-2; with prodigy learning_rate."""
    initializer_token: str | None = None
    """Word or words whose mean embedding the trigger word starts from. Default: the class name."""
    num_vectors: int = 1
    """Embeddings of each trigger word. Several start from the initializer's tokens, if it has as many, else from their
    mean with a little noise; each takes the room of one token in prompts."""
    train_text_encoder_ti_frac: float = 1.0
    """Share of the steps in which the trigger words' embeddings learn, those at the start; then they stay."""

    resolution: int | None = None
    """Side of the training pictures in pixels. Default: that of the base."""
    center_crop: bool = False
    """Use only the middle of a photo that is not square; else also both ends of its longer side."""
    random_flip: bool = False
    """Mirror half of the photos drawn. Not for subjects with a left and a right."""
    aspect_ratio_buckets: str | None = None
    """Sizes that photos are cut to, each to the one that is shaped most like it: pairs "height,width;height,width" in
    pixels, or "auto" for sizes of about resolution^2 pixels, their sides half to twice the resolution. A batch is
    of one size; class pictures are cut to that of the photos beside them. Default: squares of the resolution."""
    repeats: int = 1
    """How often each photo comes in an epoch: with one_file, what a subject with few photos has in its entry of
    concepts_list to be seen as often as the others."""
    shuffle_captions: bool = False
    """Draw the order of a prompt's tags, which are what stands between commas, from up to 16 orders of each prompt."""
    keep_tokens: int = 0
    """First tags that shuffle_captions leaves where they are."""
    caption_dropout: float = 0.0
    """Share of samples that are trained with the empty prompt."""
    masked_loss: bool = False
    """Weight the loss by each photo's mask, white where the subject is: a picture named like the photo in the folder
    mask of its folder, or its alpha channel. Photos without either count whole."""
    unmasked_weight: float = 0.0
    """Weight of the loss where a mask is black, with masked_loss."""
    cache_dir: PathText | None = None
    """Folder in which the latents of pictures and the states of prompts are kept for further runs, by their content;
    several runs may share it, and it may be removed at any time. Default: cache in output_dir."""

    with_prior_preservation: bool = False
    """Train on pictures of the class as well, so that the concept does not swallow it."""
    class_data_dir: PathText | None = None
    """Folder of the class pictures; missing ones are generated once, and those that were generated by another base or
    with other settings refused. It may contain {class_name}, as prompts may. Default: class_images in output_dir, with
    a folder for each subject if there are several."""
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

    adapter: PathText = "atoms"
    """What is trained: a JSON file with the config of any PEFT method, or "atoms" (its defaults), or "full"."""
    learning_rate: float | None = None
    """Learning rate of the adapter. Default: that of the overrides.yaml beside the adapter's file, if there is one;
    else 5e-3; with prodigy 1."""
    train_text_encoder: bool = False
    """Train the text encoders too, SDXL's both."""
    text_encoder_adapter: PathText | None = None
    """What of the text encoders is trained, as for adapter. Default: atoms on their attention, with the UNet's settings
    if that has atoms; all of them with adapter "full"."""
    text_encoder_lr: float | None = None
    """Learning rate of the text encoders. Default: learning_rate."""
    scale_lr: bool = False
    """Multiply all learning rates by the photos that make up one step: train_batch_size times
    gradient_accumulation_steps times processes."""
    optimizer: Optimizer = "adamw"
    """What moves the parameters: adamw; prodigy, which finds the length of its steps, one for all parameters; or
    adamw_schedulefree, which needs no schedule, since what is shown and saved is an average of its steps. The last two:
    pip install "atomdiff[optimizers]"."""
    prodigy_d_coef: float = 1.0
    """Factor on the length of the steps that prodigy finds."""
    lr_scheduler: Schedule = "constant"
    """Course of all learning rates over the run; adamw_schedulefree goes with the first two alone."""
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
    """Decay of the gradient's mean, in every optimizer."""
    adam_beta2: float = 0.999
    """Decay of the gradient's square, in every optimizer."""
    adam_weight_decay: float = 1e-2
    """Weight decay in every optimizer, but not of words."""
    adam_epsilon: float = 1e-8
    """Epsilon of every optimizer."""
    use_8bit_adam: bool = False
    """Keep the state of adamw in 8 bits, but for tensors of less than 4096 numbers; needs bitsandbytes."""
    use_ema: bool = False
    """Show and save an exponential moving average of what is trained, instead of its last step."""
    ema_decay: float = 0.999
    """Decay of that average a step, to which it rises as (1 + step) / (10 + step): up to there the average stands for
    about the last ninth of the run."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the loss, 5 in its paper. Default: none."""
    noise_offset: float = 0.0
    """Strength of noise added to whole channels of the latents, for very dark or bright pictures; 0.1 in its paper."""
    prediction_type: PredictionType | None = None
    """What the base predicts. Default: what its scheduler's config says."""
    rescale_betas_zero_snr: bool | None = None
    """Zero terminal SNR: let the noise schedule end in pure noise (Lin et al., arXiv 2305.08891), for a base that was
    trained so; not with epsilon. Default: what the base's scheduler config says."""
    flow_shift: float | None = None
    """Of flow: 1 spreads the noise levels evenly, 3 (as in SD3) puts more of them near pure noise. Default: what the
    scheduler's config says, else 1."""
    timestep_sampling: TimestepSampling = "uniform"
    """How the timesteps trained on are drawn: uniform, logit_normal (middle ones more often) or cubic (late ones, with
    much noise, more often)."""
    logit_mean: float = 0.0
    """Of logit_normal: above 0 prefers more noise."""
    logit_std: float = 1.0
    """Of logit_normal: the less, the more it prefers the middle."""
    min_timestep: int = 0
    """First timestep trained on; 0 is the one with the least noise."""
    max_timestep: int | None = None
    """End of the timesteps trained on, itself left out. Default: all, 1000 in Stable Diffusion."""
    mixed_precision: Precision | None = None
    """Precision of the frozen weights and of the arithmetic. Default: what accelerate is
    configured to, else bfloat16 where the processor or GPU has instructions for it, else float32."""
    allow_tf32: bool = False
    """Let NVIDIA GPUs round the factors of float32 products to 10 bits: faster from the Ampere generation on."""
    plain_attention: bool = False
    """Compute attention in separate steps: faster for small pictures on a CPU, and takes more memory."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use the attention of xformers, which must be installed; needs a GPU."""
    enable_attention_slicing: bool = False
    """Compute attention for half of the heads at a time: less memory where PyTorch's own attention, the default, has no
    kernel that saves it; slower."""
    load_in_8bit: bool = False
    """Keep the UNet's Linear layers that the adapter leaves alone in 8 bits; needs bitsandbytes."""
    load_in_4bit: bool = False
    """Keep the UNet's Linear layers that the adapter leaves alone in 4 bits (NF4); needs bitsandbytes."""
    seed: int = 0
    """Every random choice follows from it."""

    checkpointing_steps: int = 500
    """Steps between checkpoints; 0 for none."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept; older ones are removed. Default: all."""
    resume_from_checkpoint: PathText | None = None
    """Checkpoint folder to go on from, or "latest" for the newest in output_dir."""
    validation_prompts: tuple[str, ...] = ("a photo of {trigger_word} {class_name}",)
    """Prompts of the contact sheet."""
    validation_steps: int = 0
    """Steps between rows of the contact sheet; 0 for no sheet."""
    logging_steps: int = 10
    """Steps between lines of the log."""
    logging_dir: PathText = "logs"
    """Folder of the tracker's files, in output_dir."""
    report_to: str | None = "tensorboard"
    """Tracker known to accelerate, or none."""

    push_to_hub: bool = False
    """Push the concept to the Hugging Face Hub after the run, with the last validation pictures and a model card."""
    hub_model_id: str | None = None
    """Repository to push to, as user/repo. Default: one of your own, named like the concept's file. The concepts of a
    concepts_list get a repository each: user/repo-NAME, NAME being the name of the subject's folder of photos, with "-"
    for what the Hub does not allow."""
    hub_token: str | None = field(default=None, repr=False)
    """Access token that may write. Default: the one logged in with, which keeps it out of the command line."""
    hub_private_repo: bool = False
    """Make a new repository private."""

    def __post_init__(self) -> None:
        expand_paths(self)
        check_run(self)

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

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each of `Concept.parameter_groups()`."""
        prodigy = self.optimizer == "prodigy"
        adapter = (1.0 if prodigy else 5e-3) if self.learning_rate is None else self.learning_rate
        token = (adapter if prodigy else 1e-2) if self.token_learning_rate is None else self.token_learning_rate
        text_encoder = adapter if self.text_encoder_lr is None else self.text_encoder_lr
        return {"adapter": adapter, "text_encoder": text_encoder, "token": token}

    @property
    def cache_folder(self) -> Path:
        """Where latents and states are kept for further runs."""
        return Path(self.cache_dir or Path(self.output_dir) / "cache")

    def class_folder(self, subject: Subject) -> Path:
        """Where the class images of a subject are."""
        if subject.class_data_dir:
            return Path(subject.fill(subject.class_data_dir))
        return Path(self.output_dir) / "class_images" / (subject.name if len(self.subjects) > 1 else "")

    @property
    def token_steps(self) -> int:
        """The number of steps in which the trigger words' embeddings learn."""
        return round(self.train_text_encoder_ti_frac * self.max_train_steps)

    def runs(self) -> tuple[TrainConfig, ...]:
        """The runs that this config stands for: itself, or one for each subject."""
        if self.concepts_list is None or self.one_file:
            return (self,)
        return tuple(replace(self, concepts_list=None, **self._own(subject)) for subject in self.subjects)

    def _own(self, subject: Subject) -> dict[str, Any]:
        """Return the fields of a subject's run that are its own: what it writes must not replace that of another."""
        repository = self.hub_model_id and f"{self.hub_model_id}-{_repository_name(subject.name)}"
        return asdict(subject) | {"output_dir": str(Path(self.output_dir) / subject.name), "hub_model_id": repository}

    @property
    def name(self) -> str:
        """Name of what the run writes: that of the folder of photos, or of the list of concepts."""
        return self.subjects[0].name if self.concepts_list is None else Path(self.concepts_list).stem

    @property
    def repository(self) -> str:
        """The repository that the run is pushed to: user/repo, or repo for one of your own."""
        return self.hub_model_id or _repository_name(self.name)

    def recipe(self) -> dict[str, Any]:
        """Return the fields that the trained numbers depend on, ready for JSON, without the folders of this machine."""
        recipe = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_RECIPE}
        recipe["learning_rate"] = self.learning_rates["adapter"]
        recipe["token_learning_rate"] = self.learning_rates["token"]
        recipe["text_encoder_lr"] = self.learning_rates["text_encoder"]
        if self.concepts_list is None:
            return recipe
        subjects = [asdict(subject) for subject in self.subjects]
        folders = ("instance_data_dir", "class_data_dir")
        return recipe | {"subjects": [{k: v for k, v in subject.items() if k not in folders} for subject in subjects]}


def _repository_name(folder: str) -> str:
    """Return a folder's name with "-" for what the Hub does not allow in the names of repositories."""
    name = re.sub(r"[^A-Za-z0-9_.-]+|-{2,}|\.{2,}", "-", folder)
    return re.sub(r"-{2,}", "-", name).strip("-.")


def _read_subjects(file: Path) -> list[dict[str, Any]]:
    """Read the entries of a `concepts_list`.

    Raises:
        UserError: It cannot be read, or an entry is not what it should be.
    """
    entries = read_yaml(file)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{file}: expected a list of mappings, one a subject, each with an instance_data_dir")
    known = {field.name for field in fields(Subject)}
    for entry in entries:
        if unknown := sorted(map(str, entry.keys() - known)):
            raise UserError(f"{file}: unknown {', '.join(unknown)}; a subject has {', '.join(sorted(known))}")
        if "instance_data_dir" not in entry:
            raise UserError(f"{file}: found a subject without instance_data_dir: {entry}")
        for name, value in entry.items():
            entry[name] = None if name in _MAY_BE_NOTHING and str(value).lower() in ("none", "null") else value
            allowed = (str, type(None)) if name in _MAY_BE_NOTHING else str
            if name != "repeats" and not isinstance(entry[name], allowed):
                raise UserError(f"{file}: {name}={value!r}: expected a text")
    return entries


_MAY_BE_NOTHING = ("class_name", "initializer_token", "class_data_dir")
_NOT_IN_RECIPE = (
    "text_encoder_adapter "
    "pretrained_model_name_or_path single_file_config pretrained_vae_model_name_or_path instance_data_dir "
    "concepts_list class_data_dir cache_dir output_dir adapter "
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
    adapter = Path(find_asset(config.adapter))
    overrides = adapter.with_name("overrides.yaml")
    if adapter.is_file() and overrides.is_file():
        config = parse_config(config_class, ["--config", str(overrides), *arguments], prog=prog)
    return config
