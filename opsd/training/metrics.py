"""THE table of logged metrics, and how the loss records of a step become some of them over all processes.

A metric that is logged stands in `METRICS`: name, unit, meaning, where it is made. The gate's check and docs/metrics.md
read the table. Knows records and rollouts; nothing of teachers. A function that takes an accelerator is a collective:
all processes call it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from opsd.errors import NonFiniteLossError
from opsd.losses import LossOutput
from opsd.rollouts import Rollouts
from opsd.training.averages import KINDS, Tally

NOT_LOGGED = frozenset({"logprob", "teacher_logprob"})  # for estimators and traces
GAP = "sampling_gap"
REWARDS = "reward functions"  # when a metric is logged: in runs that have these
BY_FUNCTION = "rewards/{function}"
COMPLETIONS = "completions/"
TRL, TRANSFORMERS = "trl", "transformers"

WAY_OUT = (
    "Nothing was updated by it, and the checkpoints are as they were. Usual causes: a learning rate that is too high, "
    "float16 without loss scaling, weights that were already broken. Lower the learning rate and resume from the last "
    "checkpoint."
)


@dataclass(frozen=True)
class Metric:
    """One metric of `trainer.state.log_history`.

    >>> find_metric("eval_rewards/last_number").unit
    'reward'

    Args:
        name: as it is logged; `{…}` stands for any text. In an evaluation `eval_`, or `eval_{set}_`, stands before it.
        unit: of its values.
        meaning: what it is, in a sentence.
        made_in: the file below `opsd/` that makes it, or the library.
        when: which runs log it; "" for all.
        gate: whether a teacher's gate may read it: it is in every log entry, and the same in a resumed run.
    """

    name: str
    unit: str
    meaning: str
    made_in: str
    when: str = ""
    gate: bool = False

    def matches(self, key: str) -> bool:
        """Tell whether a logged key is this metric."""
        pattern = "(.+)".join(re.escape(part) for part in re.split(r"\{\w+\}", self.name))
        return re.fullmatch(pattern, key) is not None


_LOSS, _GROUPS, _HERE, _CONTEXT = "losses/rule.py", "training/groups.py", "training/metrics.py", "contexts/base.py"
_DIVERGENCE, _TOP_K = "losses/divergence.py", "a top-k support"
_SCHEDULE, _CORRECTED = "a schedule of contexts", "importance_clip, and vLLM or steps_per_generation"
_SELECTION, _SERVED = "training/token_selection.py", "teachers/served.py"
_SAMPLED = "support sampled, or reward_to_go"
_CLOCK, _LOOKS, _BOUND = "training/step_clock.py", "training/looks.py", "health/bound.py"
_TRACED, _TRACES = "health/statistics.py", "trace_rollouts"

METRICS: tuple[Metric, ...] = (
    # The loss
    # `loss` is no metric for gates: transformers forgets its running mean in a resume, and `divergence` says the same.
    Metric("loss", "nats per token", "the training loss, mean over the steps since the last entry", TRANSFORMERS),
    Metric("divergence", "nats per token", "divergence from the teacher, mean over scored tokens", _HERE, gate=True),
    Metric("divergence/max", "nats", "the divergence of the worst token since the last entry", _HERE, gate=True),
    Metric("entropy", "nats per token", "the student's entropy, mean over scored tokens", _HERE, gate=True),
    Metric(GAP, "nats per token", "−log p of the student's own tokens minus its entropy, mean over these: 0 but for "
           "chance where rollouts come from its whole distribution", "training/sampling_check.py",
           "rollouts of which nothing is left out by what was sampled"),
    Metric("scored_tokens", "tokens per step", "tokens that were trained on, over all processes", "training/trainer.py",
           gate=True),
    Metric("k1", "nats per token", "log p_student - log p_teacher of the sampled token: estimates the reverse KL",
           "losses/estimators.py", _SAMPLED),
    Metric("k2", "nats² per token", "half the square of k1: its gradient is that of the reverse KL",
           "losses/estimators.py", _SAMPLED),
    Metric("k3", "nats per token", "estimates the reverse KL as k1 does, is never negative and varies less",
           "losses/estimators.py", _SAMPLED),
    Metric("ref_kl", "nats per token", "KL(student ‖ student at step 0, plain prompt)", _LOSS, "ref_kl_coef"),
    Metric("clipped/entries", "share of tokens", "tokens with an entry above entry_clip", _DIVERGENCE, "entry_clip"),
    Metric("clipped/tokens", "share of tokens", "tokens above token_clip, which have no gradient", _DIVERGENCE,
           "token_clip"),
    Metric("gated", "share of tokens", "tokens at which the teacher's entropy is above entropy_gate", _DIVERGENCE,
           "entropy_gate"),
    Metric("support/student", "probability", "the student's mass on the support", _DIVERGENCE, _TOP_K),
    Metric("support/teacher", "probability", "the teacher's mass on the support", _DIVERGENCE, _TOP_K),
    Metric("importance/ratio", "ratio", "p of the sampled token in the student, over p where it was sampled, after the "
           "clip", _LOSS, _CORRECTED),
    Metric("importance/truncated", "share of tokens", "tokens whose ratio was above importance_clip", _LOSS,
           _CORRECTED),
    Metric("statistics_seconds", "seconds", "the pass without gradient that ranks tokens, per micro-batch", _HERE,
           "keep_fraction, prefix_weight, reward_to_go"),
    # Rollouts
    Metric("completions/mean_length", "tokens", "mean length of rollouts", _HERE, gate=True),
    Metric("completions/min_length", "tokens", "the shortest rollout", _HERE, gate=True),
    Metric("completions/max_length", "tokens", "the longest rollout", _HERE, gate=True),
    Metric("completions/clipped_ratio", "share of rollouts", "rollouts cut at max_completion_length", _HERE, gate=True),
    Metric("completions/mean_terminated_length", "tokens", "mean length of rollouts that were not cut, or 0", _HERE,
           gate=True),
    Metric("completions/min_terminated_length", "tokens", "the shortest of them", _HERE, gate=True),
    Metric("completions/max_terminated_length", "tokens", "the longest of them", _HERE, gate=True),
    Metric("num_tokens", "tokens", "prompt and completion tokens sampled so far", TRL),
    Metric("tools/call_frequency", "calls per rollout", "tool calls", TRL, "tools"),
    Metric("tools/failure_frequency", "share of calls", "tool calls that failed", TRL, "tools"),
    Metric("unscored", "share of rollouts", "rollouts that no server could score, and that left the loss", _HERE,
           "teacher: served"),
    Metric("served/waited", "seconds per step", "training waited for scores, in the first process", _SERVED,
           "teacher: served"),
    Metric("served/hidden", "share of scoring", "scoring that ran while something else did, in the first process",
           _SERVED, "teacher: served"),
    Metric("served/tries", "requests per rollout", "requests that a rollout's scores took, in the first process",
           _SERVED, "teacher: served"),
    Metric("tokens/left_out", "share of tokens", "tokens that the token selection leaves out", _SELECTION,
           "skip_first_tokens, mask_…"),
    Metric("staleness", "optimizer steps", "steps since the rollouts were sampled", "training/samples_ahead.py",
           "steps_per_generation"),
    Metric("completions/limit", "tokens", "the length at which rollouts are cut", _HERE, "completion_length_schedule"),
    Metric("lmbda", "share of rows", "rows on the student's own rollouts", _HERE, "lmbda_schedule"),
    Metric("off_policy/shortened", "share of rows", "off-policy completions cut at max_completion_length, or behind "
           "an end", "training/trainer.py", "lmbda below 1"),
    # Rewards and groups
    Metric("reward", "reward", "the weighted sum of all reward functions, mean over rollouts", _GROUPS, REWARDS, True),
    Metric(BY_FUNCTION, "reward", "of one reward function, mean over rollouts", "training/rewards.py", REWARDS,
           True),
    Metric("group/right", "share of rollouts", "rollouts at or above success_reward", _GROUPS, REWARDS, True),
    Metric("group/distilled", "share of rollouts", "rollouts that are distilled", _GROUPS, REWARDS, True),
    Metric("group/without_context", "share of rollouts", "rollouts to distil for which the teacher's context has no "
           "field, so that they are not", _GROUPS, REWARDS, True),
    Metric("group/unused", "share of rollouts", "rollouts that are neither distilled nor reinforced", _GROUPS, REWARDS,
           True),
    Metric("group/flat", "share of groups", "groups whose rewards are all equal: GRPO has no advantage there", _GROUPS,
           REWARDS, True),
    Metric("lead/teacher", "reward", "of the teacher's own answers, one per prompt, mean over rollouts", _GROUPS,
           "teacher_lead"),
    Metric("lead/withheld", "share of rollouts", "rollouts of prompts on which the teacher leads by too little",
           _GROUPS, "teacher_lead"),
    # Context and teacher
    Metric("context/shortened", "share of prompts", "teacher prompts with a shortened field", _CONTEXT, "a context"),
    Metric("context/tokens_cut", "tokens per prompt", "tokens cut from the field named in truncate", _CONTEXT,
           "a context"),
    Metric("context/fell_back", "share of prompts", "prompts rendered at another level than the one drawn", _CONTEXT,
           _SCHEDULE),
    Metric("context/level/{level}", "share of prompts", "prompts rendered at that level", _CONTEXT, _SCHEDULE),
    Metric("teacher/snapshot_of_step", "step", "the step whose weights the snapshot holds", "teachers/snapshot.py",
           "snapshot"),
    Metric("teacher/{metric}/{part}", "as without the part", "the same of one part of a mixture or a route",
           "teachers/composite.py", "mixture, routed"),
    # Evaluation
    Metric("eval_accuracy", "share of questions", "right greedy answers on the selection split",
           _LOOKS, "evaluation: every"),
    Metric("eval_length", "tokens", "mean length of these answers", _LOOKS, "evaluation: every"),
    Metric("eval_questions", "questions", "of the selection split", _LOOKS, "evaluation: every"),
    Metric("eval_p_value", "probability", "of no change since the best look before, over the same questions (McNemar)",
           _LOOKS, "evaluation: every"),
    # Health
    Metric("health", "level", "the worst level of all monitors: 0 fine, 1 watch, 2 act (docs/health.md)",
           "health/watch.py"),
    Metric("traced_tokens", "tokens", "of the traced rollouts that the student sampled", _TRACED, _TRACES),
    Metric("teacher_entropy", "nats per token", "the teacher's entropy, mean over traced tokens", _TRACED, _TRACES),
    Metric("kl/mean", "nats per token", "size of the divergence, mean over traced tokens", _TRACED, _TRACES),
    Metric("kl/off_policy", "nats per token", "the same of traced texts that the student did not write", _TRACED,
           "lmbda below 1"),
    Metric("kl/quarter_{number}", "nats per token", "the same by position: in each quarter of a rollout", _TRACED,
           _TRACES),
    Metric("kl/opening", "share of the divergence", "at the first three tokens, of rollouts of nine and more", _TRACED,
           _TRACES),
    Metric("kl/opening_ratio", "ratio", "mean divergence of the first three tokens over the median of the rest",
           _TRACED, _TRACES),
    Metric("kl/large", "share of words", "words that diverge by more than 2 nats", _TRACED, _TRACES),
    Metric("kl/style", "share of the divergence", "at hedges, punctuation and space", _TRACED, _TRACES),
    Metric("kl/{class}", "share of the divergence", "by class of token: digits, words, hedges, punctuation, space, "
           "special", _TRACED, _TRACES),
    Metric("repetition", "share", "stretches of four tokens that a rollout had before", _TRACED, _TRACES),
    Metric("agreement_in_loops", "ratio", "mean divergence outside such stretches over that inside", _TRACED, _TRACES),
    Metric("distinct_2", "share", "pairs of neighbouring tokens that are different ones", _TRACED, _TRACES),
    Metric("similarity", "share", "pairs of tokens that two rollouts of different prompts have in common", _TRACED,
           _TRACES),
    Metric("sibling_similarity", "share", "the same of two rollouts of one prompt", _TRACED, "num_generations above 1"),
    Metric("thinking", "per 1,000 tokens", "words of thinking aloud", _TRACED, _TRACES),
    Metric("leak/phrases", "share of rollouts", "that name a solution which their prompt does not name", _TRACED,
           _TRACES),
    Metric("leak/copied", "share of rollouts", "that copy six words of the teacher's prompt alone", _TRACED, _TRACES),
    # The optimizer and the clock
    Metric("grad_norm", "norm", "the gradient's norm before clipping, last step", TRANSFORMERS),
    Metric("learning_rate", "1", "of the last step", TRANSFORMERS),
    Metric("epoch", "epochs", "passes over the rows so far", TRANSFORMERS),
    Metric("step", "step", "optimizer steps done", TRANSFORMERS),
    Metric("step_time", "seconds", "one optimizer step, rollouts included", TRL),
    Metric("seconds/rollouts", "seconds", "of a step for sampling, in the first process", _BOUND),
    Metric("seconds/teacher", "seconds", "of a step for scoring; on a GPU what the host waits for", _BOUND),
    Metric("memory_gib", "GiB", "the most that the device had in use; without a GPU, what the process holds", _CLOCK),
    Metric("num_input_tokens_seen", "tokens", "as num_tokens", TRANSFORMERS, "include_num_input_tokens_seen"),
    Metric("{phase}_runtime", "seconds", "training (train_) or one evaluation (eval_)", TRANSFORMERS, "at its end"),
    Metric("{phase}_samples_per_second", "rows per second", "over all of it", TRANSFORMERS, "at its end"),
    Metric("{phase}_steps_per_second", "steps per second", "over all of it", TRANSFORMERS, "at its end"),
    Metric("{phase}_tokens_per_second", "tokens per second", "over all of it", TRANSFORMERS,
           "include_num_input_tokens_seen"),
    Metric("train_loss", "nats per token", "mean of loss over the run", TRANSFORMERS, "at its end"),
    Metric("total_flos", "FLOP", "transformers' estimate for the student's training passes", TRANSFORMERS,
           "at its end"),
    Metric("{phase}_mem_{kind}", "bytes", "memory taken and given back", TRANSFORMERS, "skip_memory_metrics: false"),
)  # fmt: skip


def find_metric(key: str, eval_sets: Collection[str] = ()) -> Metric | None:
    """Return the metric that a logged key is, or None.

    Args:
        key: of an entry in `trainer.state.log_history`.
        eval_sets: names of evaluation datasets, where there are several.
    """
    starts = ["", "eval_", *(f"eval_{name}_" for name in eval_sets)]
    rests = [key.removeprefix(start) for start in starts if key.startswith(start)]
    return next((metric for metric in METRICS for rest in rests if metric.matches(rest)), None)


def gate_metrics(reward_functions: Sequence[str]) -> list[str]:
    """Return the names of the metrics that a gate may read in a run with these reward functions."""
    runs = ("", REWARDS) if reward_functions else ("",)
    names = [metric.name for metric in METRICS if metric.gate and metric.when in runs and metric.name != BY_FUNCTION]
    return names + [BY_FUNCTION.format(function=name) for name in reward_functions]


def as_markdown() -> str:
    """Return the table as docs/metrics.md has it."""
    rows = [
        f"| `{metric.name}` | {metric.unit} | {metric.meaning} | {metric.when or 'always'} | "
        f"{'yes' if metric.gate else ''} | {metric.made_in} |"
        for metric in METRICS
    ]
    return "\n".join(["| metric | unit | meaning | logged with | for gates | made in |", "|---" * 6 + "|", *rows])


class LossRecords:
    """The loss records of a step's micro-batches; together they become metrics, in one exchange between processes.

    >>> records.add(record, rollouts)  # no host waits for its device
    >>> tallies = records.tallies(accelerator, step)  # after the last micro-batch; a collective
    """

    def __init__(self) -> None:
        self.kept: list[tuple[LossOutput, Rollouts]] = []  # since the last exchange

    def add(self, record: LossOutput, rollouts: Rollouts) -> None:
        """Keep the loss of a micro-batch of this process, and the rollouts it was computed from."""
        self.kept.append((replace(record, loss=record.loss.detach()), rollouts))

    def tallies(self, accelerator: Accelerator, step: int, *, with_loss: bool = False) -> dict[str, Tally]:
        """Return divergence, entropy and all other records of the scored tokens of all processes, and begin anew.

        Args:
            accelerator: of the run.
            step: the step under way, for the message.
            with_loss: whether the loss is among them, as the mean over tokens: in evaluations.

        Raises:
            NonFiniteLossError: NaN or infinity in any process; raised in all of them.
        """
        kept, self.kept = self.kept, []
        records = [record for record, _ in kept]
        values_N = torch.cat([record.divergence_N for record in records])
        losses = torch.stack([record.loss for record in records]).to(values_N)
        is_bad = ~(torch.isfinite(values_N).all() & torch.isfinite(losses).all())
        worst = values_N.max() if len(values_N) else values_N.new_tensor(-math.inf)
        sums = {"divergence": values_N.sum(), "entropy": torch.cat([r.entropy_N for r in records]).sum()}
        for name in sorted(set().union(*(record.metrics for record in records)) - NOT_LOGGED):
            sums[name] = torch.cat([record.metrics[name] for record in records if name in record.metrics]).sum()
        if with_loss:
            sums["loss"] = losses @ values_N.new_tensor([len(record.divergence_N) for record in records])
        flags = [flag for _, rollouts in kept for flag in rollouts.unscored or ()]
        sums["unscored"], rows = values_N.new_tensor(sum(flags)), values_N.new_tensor(len(flags))
        local = [values_N.new_tensor(len(values_N)), worst, is_bad.to(values_N), rows, *sums.values()]
        count, worst_of, bad_in, rows_of, *totals = accelerator.gather(torch.stack(local)[None]).T.tolist()
        if any(bad_in):
            _stop_at_rows(kept, step)
        tokens = sum(count)
        tallies = {name: Tally(sum(total), tokens) for name, total in zip(sums, totals, strict=True)}
        lost = tallies.pop("unscored").value
        if sum(rows_of):  # of teachers that may fail
            tallies["unscored"] = Tally(lost, sum(rows_of))
        tallies["divergence/max"] = Tally(max(worst_of) if tokens else 0.0, tokens, "max")
        if any(seconds := [record.statistics_seconds for record in records]):
            tallies["statistics_seconds"] = Tally(sum(seconds), len(seconds))
        return tallies


def rollout_metrics(
    rollouts: Rollouts, values: Mapping[str, Sequence[float]], is_repeated: Sequence[bool], end_ids: Collection[int]
) -> dict[str, Tally]:
    """Return what is logged of this process's rollouts: their rewards, and the lengths of those that were sampled.

    Args:
        rollouts: as they were sampled.
        values: per rollout by name, NaN where unknown.
        is_repeated: rows that are in the batch only to fill it; they count nowhere.
        end_ids: ids that end a completion.
    """
    counted = [number for number, repeated in enumerate(is_repeated) if not repeated]
    of_values = {name: Tally.of(of_rows[number] for number in counted) for name, of_rows in values.items()}
    tallies = {name: tally for name, tally in of_values.items() if tally.size}  # an unknown reward is not 0
    sampled = [number for number in counted if rollouts.on_policy[number]]
    if not sampled:
        return tallies
    assert rollouts.loss_mask is not None
    lengths = {number: sum(rollouts.loss_mask[number]) for number in sampled}  # without the output of tools
    ended = [number for number in sampled if rollouts.completion_ids[number][-1] in end_ids]
    for which, rows in {"": sampled, "terminated_": ended}.items():
        for kind in KINDS:
            tallies[f"{COMPLETIONS}{kind}_{which}length"] = Tally.of((lengths[row] for row in rows), kind)
    tallies[f"{COMPLETIONS}clipped_ratio"] = Tally(len(sampled) - len(ended), len(sampled))
    return tallies


def forget_completions(metrics: dict[str, list[float]]) -> None:
    """Remove TRL's lengths of completions, one value per batch, where `rollout_metrics` measures them."""
    for name in [name for name in metrics if name.startswith(COMPLETIONS)]:
        del metrics[name]


def repeated_rows(accelerator: Accelerator, count: int, *, trains: bool) -> list[bool]:
    """Tell which of this process's rows an evaluation has seen before: accelerate fills its last batch with the first.

    Args:
        accelerator: of the run.
        count: rows of this process.
        trains: whether these are training rows, which are never repeated.
    """
    state = accelerator.gradient_state
    if trains or not state.end_of_dataloader or state.remainder <= 0:
        return [False] * count
    first = accelerator.process_index * count
    return [first + number >= state.remainder for number in range(count)]


def _stop_at_rows(kept: Sequence[tuple[LossOutput, Rollouts]], step: int) -> None:
    prompts = []
    for record, rollouts in kept:
        bad = (~torch.isfinite(record.divergence_N)).nonzero().flatten().tolist()
        rows = sorted({rollouts.row_of_token(n) for n in bad})
        prompts += [f"  {str(rollouts.rows[row]['prompt'])[:200]}" for row in rows]
    prompts = gather_object(prompts)
    first = "\n".join(prompts[:5])
    raise NonFiniteLossError(f"step {step}: the loss is NaN or infinite in {len(prompts)} row(s):\n{first}\n{WAY_OUT}")


def check_gradient(norm: Any, step: int) -> None:
    """Refuse a gradient that would break every weight, and the next checkpoint with them.

    Raises:
        NonFiniteLossError: the norm is NaN or infinite.
    """
    if not math.isfinite(float(norm)):
        raise NonFiniteLossError(f"step {step}: the gradient is not finite. {WAY_OUT}")
