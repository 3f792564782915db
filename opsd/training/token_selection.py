"""Which tokens of a rollout are trained on, decided from ids and positions before anything is scored.

Knows rollouts and settings; nothing of models, teachers or losses. Tokens that it leaves out are neither scored nor
counted in the number of loss tokens, and their share is logged.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsd.data.needs import Need
from opsd.errors import ConfigError, DataError
from opsd.rollouts import Ids, Rollouts
from opsd.training.averages import Tally

Mask = list[int]  # one entry per token of a completion: 1 where it is scored


@dataclass(kw_only=True)
class TokenSelectionSettings:
    """Settings of an OPSDConfig that choose tokens and weigh rows.

    Example:
        >>> OPSDConfig("runs/first", skip_first_tokens=3, mask_truncated_completions=True)
    """

    skip_first_tokens: int = field(
        default=0,
        metadata={"help": "Tokens at the start of each completion that are left out (SDFT, arXiv 2601.19897: 3)."},
    )
    first_tokens_only: int | None = field(
        default=None,
        metadata={
            "help": "Tokens from the start of each completion to train on; the forward passes end there (prefix "
            "distillation, arXiv 2602.15260). Unset: all."
        },
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave out completions that were cut at max_completion_length."}
    )
    mask_special_tokens: bool = field(
        default=False,
        metadata={
            "help": "Leave out the tokenizer's special tokens (arXiv 2603.25562). The end of a turn is one of them: "
            "the student is then not trained when to stop."
        },
    )
    mask_tokens: list[str] | None = field(
        default=None, metadata={"help": "Tokens to leave out wherever they stand, as text. Unset: none."}
    )
    pass_rate_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with each row's pass rate p, in [0, 1]; the row is weighted by 4·p·(1−p) (SSOPD). Unset: "
            "all rows weigh 1."
        },
    )

    def check_token_selection(self) -> None:
        """Refuse counts of tokens that are out of range.

        Raises:
            ConfigError: names the setting.
        """
        for name, least in {"skip_first_tokens": 0, "first_tokens_only": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(
                    f"{name} must be at least {least}, and is {value}. It is a number of tokens of a completion. "
                    "Leave it out to train on all of them."
                )

    def check_any_token(self, max_completion_length: int) -> None:
        """Refuse a selection that no token of any completion could pass.

        Args:
            max_completion_length: tokens of the longest completion.

        Raises:
            ConfigError: skip_first_tokens reaches the last token that could be trained on.
        """
        ends = {"max_completion_length": max_completion_length, "first_tokens_only": self.first_tokens_only}
        for name, end in ends.items():
            if end is not None and self.skip_first_tokens >= end:
                raise ConfigError(
                    f"skip_first_tokens is {self.skip_first_tokens} and {name} {end}: no token would be left to train "
                    f"on. Lower skip_first_tokens, or raise {name}."
                )


@dataclass(kw_only=True)
class TokenSelection(TokenSelectionSettings):
    """The masks and row weights of a run; the fields are those of `TokenSelectionSettings`, and two lists of ids.

    Args:
        left_out_ids: ids that are left out wherever they stand: those of `mask_tokens` and `mask_special_tokens`.
        end_ids: ids that end a completion.

    Raises:
        ConfigError: a setting outside its range.

    Example:
        >>> TokenSelection(skip_first_tokens=3, first_tokens_only=100).describe()
        'without the first 3, up to token 100'
    """

    left_out_ids: frozenset[int] = frozenset()
    end_ids: frozenset[int] = frozenset()

    @classmethod
    def from_config(
        cls, args: TokenSelectionSettings, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]
    ) -> TokenSelection:
        """Read the settings of an OPSDConfig.

        Args:
            args: the settings.
            tokenizer: the student's.
            end_ids: ids that end a completion.

        Raises:
            ConfigError: a named token that the vocabulary does not have.
        """
        # Not all tokenizers list the ends of turns among their special tokens (Gemma, Phi).
        added = [token for token, content in tokenizer.added_tokens_decoder.items() if content.special]
        special = [*tokenizer.all_special_ids, *added] if args.mask_special_tokens else []
        return cls(
            **{f.name: getattr(args, f.name) for f in fields(TokenSelectionSettings)},
            left_out_ids=frozenset([*special, *(_id_of(text, tokenizer) for text in args.mask_tokens or [])]),
            end_ids=frozenset(end_ids),
        )

    def __post_init__(self) -> None:
        self.check_token_selection()

    @property
    def leaves_out(self) -> bool:
        """Whether any token can be left out, or any row weigh less than 1."""
        return self.describe() != "all"

    def describe(self) -> str:
        """Name the tokens that are trained on, as the log writes them."""
        parts = []
        if self.skip_first_tokens:
            parts.append(f"without the first {self.skip_first_tokens}")
        if self.first_tokens_only is not None:
            parts.append(f"up to token {self.first_tokens_only}")
        if self.mask_truncated_completions:
            parts.append("of completions that ended")
        if self.left_out_ids:
            parts.append(f"without {len(self.left_out_ids)} named or special ids")
        if self.pass_rate_column:
            parts.append(f"rows weighed by 4p(1-p) of column {self.pass_rate_column!r}")
        return ", ".join(parts) or "all"

    def apply(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with the left-out tokens unscored, and with row weights.

        Raises:
            DataError: a row's pass rate is missing or not in [0, 1].
        """
        column = self.pass_rate_column
        row_weights = [
            weight if column is None else weight * row_weight(row.get(column), column, number)
            for number, (row, weight) in enumerate(zip(rollouts.rows, rollouts.row_weights, strict=True))
        ]
        masks = [
            self._mask(mask, ids) if weight else [0] * len(mask)
            for mask, ids, weight in zip(rollouts.loss_mask or (), rollouts.completion_ids, row_weights, strict=True)
        ]
        return replace(rollouts, loss_mask=masks, row_weights=row_weights)

    def metrics(self, sampled: Rollouts, prepared: Rollouts) -> dict[str, Tally]:
        """Return the share of the sampled tokens that was left out."""
        count = sampled.num_scorable
        return {"tokens/left_out": Tally(count - prepared.num_scorable, count)} if self.leaves_out else {}

    def _mask(self, mask: Sequence[int], completion_ids: Ids) -> Mask:
        if self.mask_truncated_completions:
            mask = without_truncated(mask, completion_ids, self.end_ids)
        if self.first_tokens_only is not None:
            mask = first_only(mask, self.first_tokens_only)
        if self.left_out_ids:
            mask = without_ids(mask, completion_ids, self.left_out_ids)
        return skip_first(mask, self.skip_first_tokens)


def pass_rate_need(column: str) -> Need:
    """Return the need of a pass rate in every row."""
    return Need(
        (column,),
        f"pass_rate_column: {column}",
        "Rows are weighed by 4·p·(1-p) of it, so it must be a number from 0 to 1 in every row.",
        "leave pass_rate_column out",
        find_problem=lambda row: _find_problem(row.get(column)),
    )


def row_weight(rate: Any, column: str, number: int) -> float:
    """Return the weight 4·p·(1-p) of a row with pass rate p: 1 where half of the attempts pass, 0 where all or none do.

    Raises:
        DataError: the rate is missing or not in [0, 1].
    """
    if problem := _find_problem(rate):
        raise DataError(
            f"row {number}: column {column!r} {problem}. Rows are weighed by 4·p·(1-p) of it, so it must be a number "
            "from 0 to 1 in every row. Fill it, or leave pass_rate_column out."
        )
    passed = float(rate)
    return 4.0 * passed * (1.0 - passed)


def _find_problem(rate: Any) -> str | None:
    """Return what is wrong with a pass rate, in words, or None."""
    try:
        is_rate = 0.0 <= float(rate) <= 1.0
    except (TypeError, ValueError):
        is_rate = False
    return None if is_rate else f"holds no pass rate ({rate!r})"


# ---- masks of one completion ----------------------------------------------------------------------------------------


def skip_first(mask: Sequence[int], count: int) -> Mask:
    """Leave out the first `count` tokens, which the wording of a context changes most."""
    return [0 if position < count else is_scored for position, is_scored in enumerate(mask)]


def first_only(mask: Sequence[int], count: int) -> Mask:
    """Keep the first `count` tokens only."""
    return [is_scored if position < count else 0 for position, is_scored in enumerate(mask)]


def without_ids(mask: Sequence[int], completion_ids: Sequence[int], left_out: Collection[int]) -> Mask:
    """Leave out tokens by their id."""
    pairs = zip(mask, completion_ids, strict=True)
    return [0 if token in left_out else is_scored for is_scored, token in pairs]


def without_truncated(mask: Sequence[int], completion_ids: Sequence[int], end_ids: Collection[int]) -> Mask:
    """Leave out the whole completion where it does not end with one of `end_ids`: it was cut at the length limit."""
    has_end = bool(completion_ids) and completion_ids[-1] in end_ids
    return list(mask) if has_end else [0] * len(mask)


def _id_of(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a token given as the vocabulary writes it, or as text that is one token."""
    vocabulary = tokenizer.get_vocab()
    if text in vocabulary:
        return int(vocabulary[text])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return int(ids[0])
    raise ConfigError(
        f"mask_tokens names {text!r}, which is {len(ids)} tokens in this vocabulary. Only single tokens can be left "
        "out. Name each of its tokens, or drop it."
    )
