"""Checks during training that rollouts are the student's own samples.

It costs nothing: on average −log s(y) of a sampled token equals the student's entropy, and the loss computes both.
Where it scores no fair sample, the run says that nothing is checked. Knows loss records; nothing of steps or teachers.

Shapes: N scored tokens of a micro-batch (packed).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opsd.losses import LossOutput
from opsd.rollouts import Rollouts
from opsd.training.averages import Tally
from opsd.training.metrics import GAP
from opsd.training.sampling import reshaped_by

ERRORS = 4.0  # standard errors: by chance once in 16,000 checks
LEAST, LEAST_SHARE = 0.02, 0.05  # nats per token, and share of the entropy: bfloat16 moves the mean by less
# The spread of a token that is nearly certain comes from rare surprises, which a sample may lack: an entropy of H nats
# then hides a variance of about H times the size of a surprise, 4 nats and more.
SURPRISE, CERTAIN = 4.0, 0.5
# In a record, at each of the student's own tokens: 1, the gap, the entropy, the variance; the fields of Agreement.
PARTS = ("own_tokens", GAP, "own_entropy", "own_variance")

Notify = Callable[[str], None]


@dataclass
class Agreement:
    """Sums over the student's own tokens, by which −log s(y) is compared with the entropy.

    >>> agreement = Agreement.of(gap_N, entropy_N)
    >>> agreement.differs, agreement.describe()

    Args:
        tokens: number of tokens.
        gap: sum of −log s(y) − H, nats; its mean is 0 for samples of the student's own distribution.
        entropy: sum of H, nats.
        variance: sum of the variances of −log s(y) − H, estimated, nats².
    """

    tokens: float = 0
    gap: float = 0.0
    entropy: float = 0.0
    variance: float = 0.0

    def plus(self, other: Agreement) -> Agreement:
        """Return the sums over the tokens of both."""
        return Agreement(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of(cls, gap_N: Tensor, entropy_N: Tensor) -> Agreement:
        """Return the sums over tokens: float32, nats."""
        gap, entropy, variance = torch.stack(
            [gap_N.sum(), entropy_N.sum(), variance_of(gap_N, entropy_N).sum()]
        ).tolist()
        return cls(len(gap_N), gap, entropy, variance)

    @property
    def differs(self) -> bool:
        """Whether the two differ by more than chance and rounding."""
        least = max(LEAST * self.tokens, LEAST_SHARE * self.entropy)
        return abs(self.gap) > least and abs(self.gap) > ERRORS * math.sqrt(self.variance)

    def describe(self) -> str:
        """Give both means."""
        count = max(self.tokens, 1)
        return (
            f"−log p of {self.tokens:,.0f} sampled tokens is {(self.entropy + self.gap) / count:.2f} nats on average, "
            f"and the student's entropy {self.entropy / count:.2f}"
        )


def explain(args: Any) -> tuple[str, str]:
    """Return why rollouts are not the student's own samples, and what to do about it."""
    if reshaped := reshaped_by(args):
        return (
            f"{' and '.join(reshaped)} reshape the distribution that rollouts are drawn from",
            f"Leave {'it' if len(reshaped) == 1 else 'them'} out for on-policy training.",
        )
    if args.use_vllm:
        return (
            "vLLM samples with other probabilities than the trainer computes: other weights, number formats or logits",
            "Check that weights are synchronised and not quantised, or correct for it: importance_clip: 2.",
        )
    return (
        "the model's `generate` and its forward pass give different probabilities: its cache, its attention mask, or a "
        "logits processor of its class",
        "Try generation_kwargs: {use_cache: false}, another attn_implementation, or another transformers release.",
    )


@dataclass
class SamplingCheck:
    """Checks in a run that rollouts come from the student's own distribution, and says so once where they do not.

    >>> check = SamplingCheck(args, unchecked=why_unchecked(args, rollout_columns=False), notify=print)
    >>> record = check(record, rollouts)  # of a micro-batch: with what the comparison is made of
    >>> tallies = check.compare(tallies)  # of a step, over all processes: with the metric sampling_gap

    Args:
        args: an OPSDConfig.
        unchecked: why this run cannot be checked (`why_unchecked`), which is then said once; "" where it can.
        notify: called with the line.
    """

    args: Any
    unchecked: str
    notify: Notify
    agreement: Agreement = field(default_factory=Agreement)
    has_spoken: bool = False

    def __call__(self, record: LossOutput, rollouts: Rollouts) -> LossOutput:
        """Return the record of a micro-batch with what the comparison is made of, 0 at the tokens of others."""
        if self.unchecked:
            if not self.has_spoken:
                self.notify(f"sampling    not checked: {self.unchecked}")
            self.has_spoken = True
            return record
        scored = torch.tensor([sum(mask) for mask in rollouts.loss_mask or ()])
        own_N = torch.tensor(rollouts.on_policy).repeat_interleave(scored).to(record.entropy_N, non_blocking=True)
        gap_N, entropy_N = sampling_gap(record), record.entropy_N
        columns = (torch.ones_like(gap_N), gap_N, entropy_N, variance_of(gap_N, entropy_N))
        of_own = {name: column * own_N for name, column in zip(PARTS, columns, strict=True)}
        return replace(record, metrics={**record.metrics, **of_own})

    def compare(self, tallies: dict[str, Tally]) -> dict[str, Tally]:
        """Return the tallies of a step with the gap per own token, and compare all own tokens seen so far."""
        if PARTS[0] not in tallies:
            return tallies
        of_step = Agreement(*(tallies[name].value for name in PARTS))
        self.agreement = self.agreement.plus(of_step)
        if not self.has_spoken:
            self._speak()
        rest = {name: tally for name, tally in tallies.items() if name not in PARTS}
        return rest | ({GAP: Tally(of_step.gap, of_step.tokens)} if of_step.tokens else {})

    def _speak(self) -> None:
        if self.agreement.differs:
            self.has_spoken = True
            cause, way_out = explain(self.args)
            line = f"{self.agreement.describe()}. {cause}. {way_out}"
            self.notify(f"rollouts    not the student's own distribution: {line}")


def variance_of(gap_N: Tensor, entropy_N: Tensor) -> Tensor:
    """Return the estimated variance of −log s(y) − H at every token, float32 (N,), nats²."""
    return gap_N.square() + SURPRISE * entropy_N.clamp(0.0, CERTAIN)


def sampling_gap(record: LossOutput) -> Tensor:
    """Return −log s(y) − H at every token, float32 (N,), nats; 0 where a token has no weight."""
    return -record.metrics["logprob"] - record.entropy_N


def why_unchecked(args: Any, rollout_columns: bool) -> str:
    """Return why a run's rollouts cannot be compared with the student's entropy, in words; "" where they can.

    The loss computes entropies of the tokens that it scores. Those that are left out by what was sampled (their id, how
    the rollout ended, its reward) were drawn with other probabilities than the rest, whose means then differ in a
    healthy run too.

    Args:
        args: an OPSDConfig.
        rollout_columns: whether a context reads what rollouts provide: rows without it are left out.
    """
    if args.on_policy_share.most == 0:
        return "lmbda is 0, so the student samples no rollout."
    # Where the loss makes a pass over all tokens first, it knows those that a contrast leaves out too.
    knows_all = args.objective.needs_statistics
    causes = {
        "mask_tokens": bool(args.mask_tokens),
        "mask_special_tokens": args.mask_special_tokens,
        "mask_truncated_completions": args.mask_truncated_completions,
        "contrast_context": args.contrast_context is not None and not knows_all,
        f"distill_on {args.distill_on!r}": args.distill_on != "all",
        "a context that reads rollouts": rollout_columns,
    }
    named = [cause for cause, is_set in causes.items() if is_set]
    if not named:
        return ""
    return (
        f"{' and '.join(named)} leave{'s' * (len(named) == 1)} tokens out by what was sampled, and the rest is no fair "
        "sample of the student's distribution. `opsd doctor` checks rollouts of which nothing is left out."
    )
