"""What of a training run's settings does not go together, found before anything is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from atomdiff.data.buckets import parse_buckets
from atomdiff.pipelines.token_names import group_placeholder_tokens, placeholder_tokens
from atomdiff.utils.choices import FLOW_SHIFTS, MOST_REPEATS
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import MAX_TRIGGER_WORDS

if TYPE_CHECKING:
    from atomdiff.training.config import Subject, TrainConfig

_FROM_ONE = (
    "resolution num_class_images sample_batch_size num_inference_steps lr_num_cycles max_train_steps train_batch_size "
    "gradient_accumulation_steps checkpoints_total_limit logging_steps max_timestep num_vectors"
).split()
_FROM_ZERO = (
    "token_learning_rate text_encoder_lr prior_loss_weight guidance_scale learning_rate lr_warmup_steps lr_power "
    "max_grad_norm adam_weight_decay adam_epsilon noise_offset checkpointing_steps "
    "validation_steps logit_std min_timestep keep_tokens"
).split()
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_FROM_ONE, (1, 10**9)),
    **dict.fromkeys(_FROM_ZERO, (0, math.inf)),
    **dict.fromkeys(("caption_dropout", "unmasked_weight", "adam_beta1", "adam_beta2", "ema_decay"), (0, 1)),
    **dict.fromkeys(("snr_gamma", "prodigy_d_coef"), (1e-9, math.inf)),  # with 0, nothing would be learned
    "logit_mean": (-100, 100),
    "flow_shift": FLOW_SHIFTS,
    "repeats": (1, MOST_REPEATS + 1),
    "resolution": (8, 8193),
    "num_inference_steps": (1, 1001),
    "guidance_scale": (0, 1000),
    **dict.fromkeys(("sample_batch_size", "train_batch_size", "num_class_images"), (1, 100_001)),
}
_ATTENTION = ("plain_attention", "enable_xformers_memory_efficient_attention", "enable_attention_slicing")
_QUANTIZED = ("load_in_8bit", "load_in_4bit")


def check_run(config: TrainConfig) -> None:
    """Check all settings of a run.

    Raises:
        UserError: A field has a value that cannot be used; the message names field, value and what is allowed.
    """
    _check_ranges(config)
    _check_choices(config)
    _check_optimizer(config)
    _check_objective(config)
    _check_text(config)
    for names in (_ATTENTION, _QUANTIZED):
        given = [name for name in names if getattr(config, name)]
        if len(given) > 1:
            raise UserError(f"found {' and '.join(given)}: expected one of them at most")
    _check_data(config)
    _check_subjects(config)
    if config.push_to_hub:
        _check_repositories(config)


def _check_ranges(config: TrainConfig) -> None:
    for name, (least, bound) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not least <= value < bound:
            below = "" if bound == math.inf else f" and below {bound}"
            raise UserError(f"{name}={value!r}: expected a number of at least {least}{below}")


def _check_choices(config: TrainConfig) -> None:
    """Check the fields whose type lists what they may be."""
    for name, hint in get_type_hints(type(config)).items():
        parts: tuple[Any, ...] = (hint, *get_args(hint))
        allowed = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        may_be_none = type(None) in parts
        value = getattr(config, name)
        if allowed and value not in allowed and not (may_be_none and value is None):
            none = " or none" if may_be_none else ""
            raise UserError(f"{name}={value!r}: expected one of {', '.join(allowed)}{none}")


def _check_optimizer(config: TrainConfig) -> None:
    kind = f"optimizer={config.optimizer!r}"
    if config.lr_warmup_steps > config.max_train_steps:
        most = config.max_train_steps
        raise UserError(f"lr_warmup_steps={config.lr_warmup_steps}: expected at most max_train_steps={most}")
    if config.use_8bit_adam and config.optimizer != "adamw":
        raise UserError(f"{kind}: has no 8-bit state; expected optimizer='adamw' with use_8bit_adam")
    if config.optimizer == "adamw_schedulefree":
        if config.train_token and config.train_text_encoder_ti_frac not in (0, 1):
            found = f"train_text_encoder_ti_frac={config.train_text_encoder_ti_frac}"
            expected = "1, as what is saved is an average up to the end"
            raise UserError(f"{kind}, {found}: expected {expected}")
        if not config.lr_scheduler.startswith("constant"):
            expected = "constant or constant_with_warmup, as it needs no schedule"
            raise UserError(f"{kind}, lr_scheduler={config.lr_scheduler!r}: expected {expected}")
        if config.use_ema:
            raise UserError(f"{kind}: is an average of its steps already; expected use_ema=False")
        if not config.adam_beta1:
            raise UserError(f"{kind}, adam_beta1={config.adam_beta1}: expected a number above 0")
    if config.optimizer == "prodigy":
        if config.scale_lr:
            raise UserError(f"{kind}: finds the length of its steps by itself; expected scale_lr=False")
        if not config.adam_epsilon:
            raise UserError(f"{kind}, adam_epsilon={config.adam_epsilon}: expected a number above 0")
        rates = {name: rate for name, rate in config.learning_rates.items() if name != "token" or config.train_token}
        moving = {rate for rate in rates.values() if rate}
        if len(moving) > 1 or not all(0.1 <= rate <= 10 for rate in moving):
            found = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
            expected = "1 for all, or about that (the default; 0 for what stays still)"
            raise UserError(f"{kind}: found the learning rates {found}; expected {expected}; see prodigy_d_coef")


def _check_objective(config: TrainConfig) -> None:
    if config.timestep_sampling != "logit_normal" and (config.logit_mean, config.logit_std) != (0, 1):
        found = f"logit_mean={config.logit_mean}, logit_std={config.logit_std}"
        raise UserError(f"{found}: expected timestep_sampling='logit_normal' with them")
    if config.max_timestep is not None and config.max_timestep <= config.min_timestep:
        raise UserError(f"max_timestep={config.max_timestep}: expected more than min_timestep={config.min_timestep}")
    if config.rescale_betas_zero_snr and config.prediction_type in ("epsilon", "flow"):
        expected = "expected prediction_type v_prediction or sample, or none"
        raise UserError(f"rescale_betas_zero_snr=True, prediction_type={config.prediction_type!r}: {expected}")
    if config.flow_shift is not None and config.prediction_type not in (None, "flow"):
        expected = f"expected prediction_type 'flow', found {config.prediction_type!r}"
        raise UserError(f"flow_shift={config.flow_shift}: {expected}")


def _check_text(config: TrainConfig) -> None:
    if not 0 <= config.train_text_encoder_ti_frac <= 1:
        found = f"train_text_encoder_ti_frac={config.train_text_encoder_ti_frac}"
        raise UserError(f"{found}: expected a share of the steps, from 0 to 1")
    defaults = {"num_vectors": 1, "train_text_encoder_ti_frac": 1.0}
    needs = dict.fromkeys(defaults, "train_token")
    needs |= dict.fromkeys(("text_encoder_adapter", "text_encoder_lr"), "train_text_encoder")
    for name, needed in needs.items():
        if getattr(config, name) != defaults.get(name) and not getattr(config, needed):
            raise UserError(f"{name}={getattr(config, name)!r}: expected {needed}=True with it")


def _check_data(config: TrainConfig) -> None:
    if config.aspect_ratio_buckets is not None:
        parse_buckets(config.aspect_ratio_buckets)
    if config.keep_tokens and not config.shuffle_captions:
        raise UserError(f"keep_tokens={config.keep_tokens}: expected shuffle_captions with it")
    if config.unmasked_weight and not config.masked_loss:
        raise UserError(f"unmasked_weight={config.unmasked_weight}: expected masked_loss with it")


def _check_subjects(config: TrainConfig) -> None:
    if (config.instance_data_dir is None) == (config.concepts_list is None):
        found = "neither of them" if config.instance_data_dir is None else "both"
        raise UserError(f"expected instance_data_dir, or concepts_list for several subjects; found {found}")
    if config.one_file and config.concepts_list is None:
        raise UserError("one_file=True: expected several subjects in a concepts_list")
    if config.one_file or config.concepts_list is None:
        _check_together(config, [subject.trigger_word for subject in config.subjects])
    for subject in config.subjects:
        _check_words(config, subject)
    for name, what in (("trigger_word", "a word of its own"), ("name", "a folder of another name")):
        values = [getattr(subject, name) for subject in config.subjects]
        repeated = next((value for value in values if values.count(value) > 1), None)
        if repeated is not None and (config.one_file or name == "name"):
            raise UserError(f"{config.concepts_list}: {name}={repeated!r} stands for two subjects; give each {what}")


def _check_repositories(config: TrainConfig) -> None:
    """Check the names of all repositories, before the first subject is trained and pushed."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    pushed: dict[str, str] = {}
    for run in config.runs():
        try:
            validate_repo_id(run.repository)
        except HFValidationError as error:
            expected = "name another hub_model_id, or rename the folder"
            raise UserError(f"cannot push {run.name!r} to {run.repository!r}: {error} {expected}") from error
        other = pushed.setdefault(run.repository.lower(), run.name)
        if other != run.name:
            found = f"{other!r} and {run.name!r} would both be pushed to {run.repository}"
            raise UserError(f"{config.concepts_list}: {found}; rename one of the folders")


def _check_together(config: TrainConfig, words: list[str]) -> None:
    """Check the trigger words of one concept."""
    if len(words) * config.num_vectors > MAX_TRIGGER_WORDS:
        expected = f"at most {MAX_TRIGGER_WORDS} vectors in a concept, found {len(words)} words"
        raise UserError(f"num_vectors={config.num_vectors}: expected {expected}")
    if len({word.lower() for word in words}) < len(set(words)):
        raise UserError(f"found the trigger words {', '.join(words)}: CLIP does not see their case; choose others")
    single = [each for word in words for each in placeholder_tokens(word, config.num_vectors)]
    if config.train_token and len(group_placeholder_tokens(single)) < len(set(words)):
        found = f"the trigger words {', '.join(words)}"
        raise UserError(f"found {found}: sks and sks_1 stand for one word of several vectors; choose others")
    within = [(a, b) for a in words for b in words if a != b and a.lower() in b.lower()]
    if config.num_vectors > 1 and within:
        (short, long), *_ = within
        found = f"trigger_word={short!r} is part of trigger_word={long!r}"
        raise UserError(f"{found}; with num_vectors, pipelines would take it for the whole word: choose another")


def _check_words(config: TrainConfig, subject: Subject) -> None:
    if config.train_token and not (subject.initializer_token or subject.class_name):
        expected = "what the photos show, in one word such as mug, or an initializer_token (or train_token false)"
        raise UserError(f"class_name={subject.class_name!r}: expected {expected}")
    prompts = {"instance_prompt": subject.instance_prompt}
    if config.with_prior_preservation:
        prompts["class_prompt"] = subject.class_prompt
    if config.validation_steps:
        if not config.validation_prompts:
            raise UserError("validation_prompts=(): expected a prompt at least, or validation_steps 0")
        prompts["validation_prompts"] = " ".join(config.validation_prompts)
    for name, text in prompts.items():
        if "{class_name}" in text and not subject.class_name:
            raise UserError(f"{name}={text!r}: expected a class_name for it, or a prompt that does without")
