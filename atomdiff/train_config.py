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

from atomdiff.buckets import parse_buckets
from atomdiff.command_line import parse_config
from atomdiff.errors import UserError
from atomdiff.trigger_words import group_words, words_of

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
_MOST_WORDS = 64  # in a concept file, see delta_file.py
Precision = Literal["no", "fp16", "bf16"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
TimestepSampling = Literal["uniform", "logit_normal", "cubic"]
Optimizer = Literal["adamw", "prodigy", "adamw_schedulefree"]


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
    repeats: int = 1
    """How often each photo comes in an epoch."""

    def __post_init__(self) -> None:
        if type(self.repeats) is not int or self.repeats < 1:
            raise UserError(f"repeats={self.repeats!r}: expected a whole number of at least 1")
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
    """The base, Stable Diffusion 1.x, 2.x or XL: a folder or a Hub id of a pipeline, or a checkpoint file
    (.safetensors, .ckpt), here or as an address on the Hub."""
    instance_data_dir: str | None = None
    """Folder of the subject's photos. A .txt file beside a photo is its prompt, in place of instance_prompt."""
    concepts_list: str | None = None
    """YAML or JSON file with several subjects, in place of instance_data_dir: a list of mappings, each with its
    instance_data_dir and whatever differs from this run of class_name, trigger_word, initializer_token,
    instance_prompt, class_prompt, class_data_dir and repeats. Each is learnt in a run and a folder of its own."""
    one_file: bool = False
    """Learn all subjects of concepts_list in one run, as one concept with a word for each."""
    output_dir: str = "out/train"
    """Folder for the concept, the checkpoints, the logs and the contact sheet."""
    revision: str | None = None
    """Revision of a base on the Hub."""
    variant: str | None = None
    """Variant of the base's files, such as fp16."""
    single_file_config: str | None = None
    """Folder or Hub id of a pipeline whose configs describe the base's checkpoint file. Default: the one that diffusers
    finds out, from the Hub, which takes every 2.x for the v-predicting 2.1."""
    pretrained_vae_model_name_or_path: str | None = None
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
    cache_dir: str | None = None
    """Folder in which the latents of pictures and the states of prompts are kept for further runs, by their content;
    several runs may share it, and it may be removed at any time. Default: cache in output_dir."""

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
    learning_rate: float | None = None
    """Learning rate of the adapter. Default: that of the overrides.yaml beside the adapter's file, if there is one;
    else 5e-3; with prodigy 1."""
    train_text_encoder: bool = False
    """Train the text encoders too, SDXL's both."""
    text_encoder_adapter: str | None = None
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
    """Precision of the frozen weights and of the arithmetic. Default: what accelerate is configured to."""
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
        if self.optimizer not in get_args(Optimizer):
            raise UserError(f"optimizer={self.optimizer!r}: expected one of {', '.join(get_args(Optimizer))}")
        self._check_optimizer()
        self._check_objective()
        self._check_text()
        if self.lr_warmup_steps > self.max_train_steps:
            most = self.max_train_steps
            raise UserError(f"lr_warmup_steps={self.lr_warmup_steps}: expected at most max_train_steps={most}")
        for names in (_ATTENTION, _QUANTIZED):
            given = [name for name in names if getattr(self, name)]
            if len(given) > 1:
                raise UserError(f"found {' and '.join(given)}: expected one of them at most")
        if (self.instance_data_dir is None) == (self.concepts_list is None):
            found = "neither of them" if self.instance_data_dir is None else "both"
            raise UserError(f"expected instance_data_dir, or concepts_list for several subjects; found {found}")
        if self.one_file and self.concepts_list is None:
            raise UserError("one_file=True: expected several subjects in a concepts_list")
        self._check_data()
        for subject in self.subjects:
            self._check_words(subject)
        for name, what in (("trigger_word", "a word of its own"), ("name", "a folder of another name")):
            values = [getattr(subject, name) for subject in self.subjects]
            repeated = next((value for value in values if values.count(value) > 1), None)
            if repeated is not None and (self.one_file or name == "name"):
                raise UserError(f"{self.concepts_list}: {name}={repeated!r} stands for two subjects; give each {what}")

    def _check_data(self) -> None:
        if self.aspect_ratio_buckets is not None:
            parse_buckets(self.aspect_ratio_buckets)
        if self.keep_tokens and not self.shuffle_captions:
            raise UserError(f"keep_tokens={self.keep_tokens}: expected shuffle_captions with it")
        if self.unmasked_weight and not self.masked_loss:
            raise UserError(f"unmasked_weight={self.unmasked_weight}: expected masked_loss with it")

    def _check_objective(self) -> None:
        if self.prediction_type not in (None, *get_args(PredictionType)):
            allowed = ", ".join(get_args(PredictionType))
            raise UserError(f"prediction_type={self.prediction_type!r}: expected one of {allowed} or none")
        if self.timestep_sampling not in get_args(TimestepSampling):
            allowed = ", ".join(get_args(TimestepSampling))
            raise UserError(f"timestep_sampling={self.timestep_sampling!r}: expected one of {allowed}")
        if self.timestep_sampling != "logit_normal" and (self.logit_mean, self.logit_std) != (0, 1):
            found = f"logit_mean={self.logit_mean}, logit_std={self.logit_std}"
            raise UserError(f"{found}: expected timestep_sampling='logit_normal' with them")
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise UserError(f"max_timestep={self.max_timestep}: expected more than min_timestep={self.min_timestep}")
        if self.rescale_betas_zero_snr and self.prediction_type in ("epsilon", "flow"):
            expected = "expected prediction_type v_prediction or sample, or none"
            raise UserError(f"rescale_betas_zero_snr=True, prediction_type={self.prediction_type!r}: {expected}")
        if self.flow_shift is not None and self.prediction_type not in (None, "flow"):
            expected = f"expected prediction_type 'flow', found {self.prediction_type!r}"
            raise UserError(f"flow_shift={self.flow_shift}: {expected}")

    def _check_optimizer(self) -> None:
        kind = f"optimizer={self.optimizer!r}"
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise UserError(f"{kind}: has no 8-bit state; expected optimizer='adamw' with use_8bit_adam")
        if self.optimizer == "adamw_schedulefree":
            if self.train_token and self.train_text_encoder_ti_frac not in (0, 1):
                found = f"train_text_encoder_ti_frac={self.train_text_encoder_ti_frac}"
                expected = "1, as what is saved is an average up to the end"
                raise UserError(f"{kind}, {found}: expected {expected}")
            if not self.lr_scheduler.startswith("constant"):
                expected = "constant or constant_with_warmup, as it needs no schedule"
                raise UserError(f"{kind}, lr_scheduler={self.lr_scheduler!r}: expected {expected}")
            if self.use_ema:
                raise UserError(f"{kind}: is an average of its steps already; expected use_ema=False")
            if not self.adam_beta1:
                raise UserError(f"{kind}, adam_beta1={self.adam_beta1}: expected a number above 0")
        if self.optimizer == "prodigy":
            if self.scale_lr:
                raise UserError(f"{kind}: finds the length of its steps by itself; expected scale_lr=False")
            if not self.adam_epsilon:
                raise UserError(f"{kind}, adam_epsilon={self.adam_epsilon}: expected a number above 0")
            rates = {name: rate for name, rate in self.learning_rates.items() if name != "token" or self.train_token}
            moving = {rate for rate in rates.values() if rate}
            if len(moving) > 1 or not all(0.1 <= rate <= 10 for rate in moving):
                found = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
                expected = "1 for all, or about that (the default; 0 for what stays still)"
                raise UserError(f"{kind}: found the learning rates {found}; expected {expected}; see prodigy_d_coef")

    def _check_text(self) -> None:
        if not 0 <= self.train_text_encoder_ti_frac <= 1:
            found = f"train_text_encoder_ti_frac={self.train_text_encoder_ti_frac}"
            raise UserError(f"{found}: expected a share of the steps, from 0 to 1")
        defaults = {"num_vectors": 1, "train_text_encoder_ti_frac": 1.0}
        needs = dict.fromkeys(defaults, "train_token")
        needs |= dict.fromkeys(("text_encoder_adapter", "text_encoder_lr"), "train_text_encoder")
        for name, needed in needs.items():
            if getattr(self, name) != defaults.get(name) and not getattr(self, needed):
                raise UserError(f"{name}={getattr(self, name)!r}: expected {needed}=True with it")
        words = [subject.trigger_word for subject in self.subjects] if self.one_file or not self.concepts_list else []
        if len(words) * self.num_vectors > _MOST_WORDS:
            expected = f"at most {_MOST_WORDS} vectors in a concept, found {len(words)} words"
            raise UserError(f"num_vectors={self.num_vectors}: expected {expected}")
        single = [each for word in words for each in words_of(word, self.num_vectors)]
        if self.train_token and len(group_words(single)) < len(set(words)):
            found = f"the trigger words {', '.join(words)}"
            raise UserError(f"found {found}: sks and sks_1 stand for one word of several vectors; choose others")
        within = [(a, b) for a in words for b in words if a != b and a in b]
        if self.num_vectors > 1 and within:
            (short, long), *_ = within
            found = f"trigger_word={short!r} is part of trigger_word={long!r}"
            raise UserError(f"{found}; with num_vectors, pipelines would take it for the whole word: choose another")

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

    @property
    def token_steps(self) -> int:
        """The number of steps in which the trigger words' embeddings learn."""
        return round(self.train_text_encoder_ti_frac * self.max_train_steps)

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
        recipe["learning_rate"] = self.learning_rates["adapter"]
        recipe["token_learning_rate"] = self.learning_rates["token"]
        recipe["text_encoder_lr"] = self.learning_rates["text_encoder"]
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
        if wrong := [name for name, value in entry.items() if name != "repeats" and not isinstance(value, str)]:
            raise UserError(f"{file}: {wrong[0]}={entry[wrong[0]]!r}: expected a text")
    return entries


_FROM_ONE = (
    "resolution num_class_images sample_batch_size num_inference_steps lr_num_cycles max_train_steps train_batch_size "
    "gradient_accumulation_steps checkpoints_total_limit logging_steps max_timestep num_vectors repeats"
).split()
_FROM_ZERO = (
    "token_learning_rate text_encoder_lr prior_loss_weight guidance_scale learning_rate lr_warmup_steps lr_power "
    "max_grad_norm "
    "adam_weight_decay adam_epsilon prodigy_d_coef snr_gamma noise_offset checkpointing_steps validation_steps "
    "logit_std min_timestep keep_tokens"
).split()
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_FROM_ONE, (1, math.inf)),
    **dict.fromkeys(_FROM_ZERO, (0, math.inf)),
    **dict.fromkeys(("caption_dropout", "unmasked_weight", "adam_beta1", "adam_beta2", "ema_decay"), (0, 1)),
    "logit_mean": (-100, 100),
    "flow_shift": (0.01, math.inf),
}
_ATTENTION = ("plain_attention", "enable_xformers_memory_efficient_attention", "enable_attention_slicing")
_QUANTIZED = ("load_in_8bit", "load_in_4bit")
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
    adapter = Path(config.adapter)
    overrides = adapter.with_name("overrides.yaml")
    if adapter.is_file() and overrides.is_file():
        config = parse_config(config_class, ["--config", str(overrides), *arguments], prog=prog)
    return config
