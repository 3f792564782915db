"""How rollouts are sampled: which settings are allowed, and those in force.

A loss is derived for tokens that the student draws from its whole distribution at `temperature`. Settings that reshape
it (top_p, a repetition penalty, suppressed tokens) are refused where the gradient is an estimate from the sampled
tokens, and named in a warning elsewhere. Knows settings and the student; nothing of losses or teachers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opsd.errors import ConfigError, OPSDWarning, did_you_mean
from opsd.losses.objective import Objective
from opsd.models.forward import evaluating
from opsd.models.generation import (
    add_stop_ids,
    complete_batch,
    cut_after_stop,
    generation_config,
    neutral_settings,
    stop_ids_of,
)
from opsd.models.sharding import is_sharded
from opsd.rollouts import Ids

# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reshapes:
    """A setting that samples from another distribution than the student's.

    >>> SETTINGS["top_p"].fits(0.9), SETTINGS["top_p"].is_neutral(1.0)
    (True, True)

    Args:
        neutral: the value that changes nothing; None always changes nothing.
        values: the allowed values, in words.
        fits: tells whether a value is allowed.
    """

    neutral: Any = None
    values: str = "as the engine takes it"
    fits: Callable[[Any], bool] = lambda value: True

    def is_neutral(self, value: Any) -> bool:
        """Tell whether a value leaves the distribution as it is."""
        return value is None or value == self.neutral or value in ([], {}, ())


def _number(low: float, high: float, values: str, neutral: float | None = None, *, low_is_in: bool = True) -> Reshapes:
    def fits(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (low <= value if low_is_in else low < value) and value <= high and value < math.inf

    return Reshapes(neutral, values, fits)


def _count(neutral: int = 0) -> Reshapes:
    return Reshapes(
        neutral,
        "a whole number of at least 0",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    )


_ABOVE_0 = _number(0, math.inf, "a number above 0", 1.0, low_is_in=False)
_SHARE = _number(0, 1, "a number above 0 and up to 1", 1.0, low_is_in=False)
_CUTOFF = _number(0, 1, "a number from 0 to 1", 0.0)
_PENALTY = _number(-2, 2, "a number from -2 to 2", 0.0)

# Settings of the run, by name. `temperature` is not among them: the loss is computed at the same one.
SETTINGS: dict[str, Reshapes] = {
    "top_p": _SHARE,
    "top_k": _count(),
    "min_p": _CUTOFF,
    "repetition_penalty": _ABOVE_0,
    "vllm_structured_outputs_regex": Reshapes(),
}
# Keys of `generation_kwargs`, by engine.
TRANSFORMERS: dict[str, Reshapes] = {
    "typical_p": _SHARE,
    "top_h": _SHARE,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "encoder_repetition_penalty": _ABOVE_0,
    "guidance_scale": _ABOVE_0,
    "no_repeat_ngram_size": _count(),
    "encoder_no_repeat_ngram_size": _count(),
    "min_new_tokens": _count(),
    **dict.fromkeys(
        ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "forced_bos_token_id",
         "forced_eos_token_id", "exponential_decay_length_penalty", "watermarking_config"),
        Reshapes(),
    ),
}  # fmt: skip
VLLM: dict[str, Reshapes] = {
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "min_tokens": _count(),
    **dict.fromkeys(("allowed_token_ids", "bad_words", "logit_bias", "structured_outputs"), Reshapes()),
}
# Keys that change how fast an engine samples, and not what.
SPEED = {False: ("cache_config", "compile_config", "disable_compile", "use_cache"), True: ("detokenize",)}
ENDS = "eos_token_id"
# Keys that have another name here, or a setting of their own: two values of one thing would contradict each other.
ELSEWHERE = {
    **{name: f"the setting {name}" for name in (*SETTINGS, "temperature", "cache_implementation")},
    **dict.fromkeys(("max_new_tokens", "max_length", "max_tokens"), "the setting max_completion_length"),
    **dict.fromkeys(("num_return_sequences", "n"), "the setting num_generations"),
    **dict.fromkeys(("stop_token_ids", "stop", "stop_strings"), f"generation_kwargs: {{{ENDS}: [...]}}, ids of tokens"),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), "the tokenizer"),
}


def check_sampling(args: Any, objective: Objective) -> None:
    """Refuse settings of rollouts that cannot work, before a model loads.

    Args:
        args: an OPSDConfig.
        objective: its loss.

    Raises:
        ConfigError: a value outside its range, an unknown name, or a reshaped distribution under a loss that estimates
            its gradient from the sampled tokens.
    """
    given = args.generation_kwargs
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"generation_kwargs must be a mapping of names to values, and is {given!r}.")
    for name in given or ():
        _check_name(name, args.use_vllm)
    for name, setting, value in _values(args):
        if value is not None and not setting.fits(value):
            raise ConfigError(
                f"{name} must be {setting.values}, and is {value!r}. Leave it out to sample from the whole "
                "distribution."
            )
    ends = (given or {}).get(ENDS, [])
    if not all(isinstance(each, int) and each >= 0 for each in (ends if isinstance(ends, list | tuple) else [ends])):
        raise ConfigError(
            f"generation_kwargs: {ENDS} must be a token id or a list of ids, and is {ends!r}. An id comes from the "
            "tokenizer: tokenizer.convert_tokens_to_ids('<|im_end|>')."
        )
    causes = _estimates(args, objective)
    stale = [*causes, *([f"control {args.control!r}"] if args.control == "constant-advantage" else [])]
    if stale and args.steps_per_rollouts > 1 and args.importance_clip is None:
        raise ConfigError(
            f"steps_per_generation {args.steps_per_generation} cannot go with {' and '.join(stale)}: such a loss "
            f"estimates its gradient from sampled tokens, and {args.steps_per_rollouts - 1} of "
            f"{args.steps_per_rollouts} steps would train on samples of older weights. Weigh them "
            "by their importance ratio: importance_clip: 2; or leave steps_per_generation out."
        )
    if causes and (reshaped := reshaped_by(args)):
        raise ConfigError(
            f"{' and '.join(reshaped)} cannot go with {' and '.join(causes)}: such a loss estimates its gradient from "
            "sampled tokens, and is right for samples of the whole distribution only. With top_p 0.9 it is off by 8 %, "
            "with 0.5 by 48 %. Leave these sampling settings out, or compare distributions: support 'full', "
            "reward_to_go 'none', grpo_coef 0."
        )


def warn_sampling(args: Any, stacklevel: int) -> None:
    """Name the settings of a run that reshape the distribution of its rollouts."""
    if args.on_policy_share.most > 0 and (reshaped := reshaped_by(args)):
        warnings.warn(
            f"{' and '.join(reshaped)}: rollouts do not come from the student's whole distribution, so the loss is "
            "taken after prefixes that the student itself would write less or more often. Evaluation samples without "
            "these settings. Leave them out for on-policy training.",
            OPSDWarning,
            stacklevel=stacklevel + 1,
        )


def reshaped_by(args: Any) -> list[str]:
    """Return the settings that reshape the distribution of rollouts, each with its value."""
    return [f"{name} {value}" for name, setting, value in _values(args) if not setting.is_neutral(value)]


def _values(args: Any) -> list[tuple[str, Reshapes, Any]]:
    kwargs, known = args.generation_kwargs or {}, VLLM if args.use_vllm else TRANSFORMERS
    settings = [(name, setting, getattr(args, name)) for name, setting in SETTINGS.items()]
    return settings + [(name, known[name], value) for name, value in kwargs.items() if name in known]


def _check_name(name: str, use_vllm: bool) -> None:
    engine = "vLLM" if use_vllm else "transformers"
    known = [ENDS, *(VLLM if use_vllm else TRANSFORMERS), *SPEED[use_vllm]]
    if name in ELSEWHERE:
        raise ConfigError(
            f"generation_kwargs has {name!r}, which is set by {ELSEWHERE[name]}. A second value here would hold for "
            "sampling alone, and loss, lengths and checks would go by the first. Set it there."
        )
    if name not in known:
        raise ConfigError(
            f"generation_kwargs has {name!r}, and rollouts sampled by {engine} take no such setting: they are one "
            f"sample per prompt, token by token.{did_you_mean(name, known)} Known: {', '.join(known)}."
        )


def _estimates(args: Any, objective: Objective) -> list[str]:
    """Return the settings by which the gradient is an estimate from sampled tokens."""
    causes = {
        "support 'sampled'": objective.divergence.support == "sampled",
        f"reward_to_go {objective.reward_to_go!r}": objective.reward_to_go != "none",
        f"grpo_coef {args.grpo_coef:g}": args.grpo_coef > 0,
    }
    return [cause for cause, is_set in causes.items() if is_set]


# ---- the settings in force ------------------------------------------------------------------------------------------


def rollout_settings(args: Any) -> dict[str, Any]:
    """Return the user's sampling settings, as the engine of the run takes them; its keys are its own."""
    kwargs = {name: value for name, value in (args.generation_kwargs or {}).items() if name != ENDS}
    if args.use_vllm:
        kwargs["structured_outputs_regex"] = args.vllm_structured_outputs_regex
    names = [name for name in SETTINGS if not name.startswith("vllm_")]
    return {**{name: getattr(args, name) for name in names}, **kwargs}


def prepare_sampling(
    args: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: Any = None
) -> tuple[list[int], GenerationConfig]:
    """Return the ids that end rollouts and the settings that sample them, and give the ends to a vLLM engine.

    Args:
        args: an OPSDConfig; the ends in its generation_kwargs are added to the model's generation settings, where
            evaluation and whoever loads the saved model find them.
        model: the student.
        tokenizer: its tokenizer.
        engine: TRL's `VLLMGeneration`, or None where the student's `generate` samples.

    Raises:
        ConfigError: an end that is no token of the model.
    """
    add_stop_ids(model, (args.generation_kwargs or {}).get(ENDS))
    ends = sorted(stop_ids_of(model, tokenizer))
    if engine is not None:
        kwargs = {name: value for name, value in (args.generation_kwargs or {}).items() if name != ENDS}
        engine.generation_kwargs = {**kwargs, "stop_token_ids": ends}
    own = {} if args.use_vllm else rollout_settings(args)  # the engine has them already
    settings: dict[str, Any] = {
        "max_new_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "cache_implementation": args.cache_implementation,
        "disable_compile": True,
    }
    return ends, generation_config(ends, tokenizer.pad_token_id, do_sample=True, **(settings | own))


def sampled(trainer: Any, prompt_ids: Sequence[Ids], by_trl: Callable[[], list[Ids]]) -> list[Ids]:
    """Return a completion of the student per prompt, cut behind its end, in the precision that trains.

    Args:
        trainer: an OPSDTrainer.
        prompt_ids: of a generation batch.
        by_trl: samples the same with vLLM, or in shards.
    """
    student, completions = trainer.student.model, list[Ids]()
    # vLLM computes in its own precision, and autocast would reach into an engine that lives in this process. Elsewhere
    # autocast also caches the cast weights for all tokens.
    with nullcontext() if trainer.use_vllm else trainer.accelerator.autocast(), neutral_settings(student):
        if trainer.use_vllm or is_sharded(student):
            completions = by_trl()
        else:
            with evaluating(student):
                completions = complete_batch(student, prompt_ids, trainer.generation_config)
    return [cut_after_stop(ids, trainer.eos_token_ids) for ids in completions]
