"""Which tokens of a rollout are trained on, decided from ids and positions before anything is scored.

Knows rollouts and settings; nothing of models, teachers or losses. What it leaves out is neither scored nor counted by
the normaliser, and how much it leaves out is logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from opsd.errors import ConfigError, DataError
from opsd.losses import token_weights
from opsd.rollouts import Ids, Rollouts


@dataclass(frozen=True)
class TokenSelection:
    """The masks and row weights of a run, in the order in which they are applied.

    Args:
        skip_first_tokens: tokens at the start of a completion that are left out.
        first_tokens_only: tokens from the start of a completion that are used, or None for all.
        mask_truncated_completions: leave out completions that were cut at the length limit.
        left_out_ids: ids that are left out wherever they stand.
        end_ids: ids that end a completion.
        pass_rate_column: column of rows with the share of attempts that pass; rows weigh 4·p·(1-p). None weighs alike.
    """

    skip_first_tokens: int = 0
    first_tokens_only: int | None = None
    mask_truncated_completions: bool = False
    left_out_ids: frozenset[int] = frozenset()
    end_ids: frozenset[int] = frozenset()
    pass_rate_column: str | None = None

    @classmethod
    def from_config(cls, args: Any, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> TokenSelection:
        """Read the settings of an OPSDConfig.

        Args:
            args: the settings.
            tokenizer: the student's.
            end_ids: ids that end a completion.

        Raises:
            ConfigError: a named token that the vocabulary does not have.
        """
        special = tokenizer.all_special_ids if args.mask_special_tokens else []
        return cls(
            args.skip_first_tokens,
            args.first_tokens_only,
            args.mask_truncated_completions,
            frozenset([*special, *(_id_of(text, tokenizer) for text in args.mask_tokens or [])]),
            frozenset(end_ids),
            args.pass_rate_column,
        )

    @property
    def selects(self) -> bool:
        """Whether anything can be left out."""
        return self.describe() != "all"

    def describe(self) -> str:
        """Which tokens are trained on, in words."""
        said = []
        if self.skip_first_tokens:
            said.append(f"without the first {self.skip_first_tokens}")
        if self.first_tokens_only is not None:
            said.append(f"up to token {self.first_tokens_only}")
        if self.mask_truncated_completions:
            said.append("of completions that ended")
        if self.left_out_ids:
            said.append(f"without {len(self.left_out_ids)} named or special ids")
        if self.pass_rate_column:
            said.append(f"rows weighed by 4p(1-p) of column {self.pass_rate_column!r}")
        return ", ".join(said) or "all"

    def apply(self, rollouts: Rollouts) -> Rollouts:
        """Return the rollouts with the tokens that are left out unscored, and rows weighed.

        Raises:
            DataError: a row's pass rate is missing or no share.
        """
        column = self.pass_rate_column
        row_weights = [
            own if column is None else own * row_weight(row.get(column), column, number)
            for number, (row, own) in enumerate(zip(rollouts.rows, rollouts.row_weights, strict=True))
        ]
        masks = [
            self._mask(mask, ids) if weight else [0] * len(mask)
            for mask, ids, weight in zip(rollouts.loss_mask or (), rollouts.completion_ids, row_weights, strict=True)
        ]
        return replace(rollouts, loss_mask=masks, row_weights=row_weights)

    def _mask(self, mask: Sequence[int], completion_ids: Ids) -> Ids:
        if self.mask_truncated_completions:
            mask = token_weights.without_truncated(mask, completion_ids, self.end_ids)
        if self.first_tokens_only is not None:
            mask = token_weights.first_only(mask, self.first_tokens_only)
        if self.left_out_ids:
            mask = token_weights.without_ids(mask, completion_ids, self.left_out_ids)
        return token_weights.skip_first(mask, self.skip_first_tokens)


def row_weight(rate: Any, column: str, number: int) -> float:
    """Return what a row counts by its pass rate.

    Raises:
        DataError: the rate is missing or no share.
    """
    try:
        return token_weights.by_pass_rate(float(rate))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"row {number}: column {column!r} holds no pass rate ({rate!r}). Rows are weighed by 4·p·(1-p) of it, so "
            "it must be a number between 0 and 1 in every row. Fill it, or leave pass_rate_column out."
        ) from error


def _id_of(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a token given as the vocabulary writes it, or as text that is one token."""
    known = tokenizer.get_vocab()
    if text in known:
        return int(known[text])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return int(ids[0])
    raise ConfigError(
        f"mask_tokens names {text!r}, which is {len(ids)} tokens in this vocabulary. Only single tokens can be left "
        "out. Name each of its tokens, or drop it."
    )
