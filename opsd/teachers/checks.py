"""Checks what a strategy returns, once per micro-batch, so that a mistake is named before it reaches a loss.

Every check is cheap beside a forward pass: types, shapes, dtypes, and for a top-k signal three numbers read from the
device. Knows rollouts and signals; nothing of strategies.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opsd.errors import AlignmentError, CheckpointError, TeacherError
from opsd.models.forward import embedded_tokens
from opsd.models.sharding import gathered_on_cpu
from opsd.rollouts import Ids, Rollouts
from opsd.serving.answers import ABOVE_ZERO
from opsd.signals import DenseSignal, TeacherSignal, TopKSignal
from opsd.teachers.student import StudentHandle

SIGNALS = (
    "Return HiddenSignal(hidden_ND, head) or TopKSignal(ids_NK, logprobs_NK, sampled_logprobs_N) from opsd.signals"
)


def check_signal(signal: Any, rollouts: Rollouts, student: StudentHandle, name: str) -> None:
    """Refuse what a loss cannot read.

    Args:
        signal: what `score` returned.
        rollouts: the micro-batch it was given.
        student: the student, whose vocabulary and device the signal must fit.
        name: the teacher's strategy, for the message.

    Raises:
        TeacherError: a type, shape, dtype or device that no signal has; a gradient; a vocabulary that is too small.
        AlignmentError: another number of tokens than the rollouts score.
    """
    start = f"teacher {name!r}: score returned "
    if not isinstance(signal, TeacherSignal):
        kind = "None" if signal is None else f"a {type(signal).__name__}"
        raise TeacherError(f"{start}{kind}. A loss reads a signal, one distribution per scored token. {SIGNALS}.")
    count = rollouts.num_scorable
    if len(signal) != count:
        raise AlignmentError(
            f"{start}a signal of {len(signal)} tokens for {count} scored tokens. Each scored token is compared with "
            "the distribution at its own place, so all places would shift. Score the tokens "
            "that `rollouts.pad(device, self.prompts)` names by row_N and position_N, in order."
        )
    for index, part in signal.groups():
        if isinstance(part, DenseSignal):
            for hidden in part.parts:
                _check_hidden(hidden.hidden_ND, hidden.head.weight_VD, student, start)
            _check_vocabulary(part.vocab_size, rollouts.scored_ids if isinstance(index, slice) else [], student, start)
        elif isinstance(part, TopKSignal):
            _check_top_k(part, student, start)
        else:
            raise TeacherError(f"{start}a signal made of a {type(part).__name__}, which no loss reads. {SIGNALS}.")


def _check_hidden(hidden_ND: Tensor, weight_VD: Tensor, student: StudentHandle, start: str) -> None:
    _check_tensors({"hidden_ND": (hidden_ND, 2), "head.weight_VD": (weight_VD, 2)}, student, start)
    if hidden_ND.shape[1] != weight_VD.shape[1]:
        raise TeacherError(
            f"{start}states of width {hidden_ND.shape[1]} and a head of width {weight_VD.shape[1]}. The head "
            "multiplies the last hidden states, after the model's final norm. Take both from one model: "
            "last_hidden(model, …) and Head.from_model(model)."
        )


def _check_top_k(signal: TopKSignal, student: StudentHandle, start: str) -> None:
    ids_NK, logprobs_NK, sampled_N = signal.ids_NK, signal.logprobs_NK, signal.sampled_logprobs_N
    _check_tensors({"logprobs_NK": (logprobs_NK, 2), "sampled_logprobs_N": (sampled_N, 1)}, student, start)
    if ids_NK.dtype != torch.int64 or ids_NK.shape != logprobs_NK.shape or len(sampled_N) != len(ids_NK):
        shapes = [tuple(tensor.shape) for tensor in (ids_NK, logprobs_NK, sampled_N)]
        raise TeacherError(
            f"{start}a TopKSignal of the shapes {shapes} with ids in {ids_NK.dtype}. It lists K ids of int64 and their "
            "K log-probabilities for each of N tokens, and one log-probability of the token itself: (N, K), (N, K), "
            "(N,)."
        )
    if ids_NK.numel() == 0:
        return
    lowest, highest, largest = torch.stack([ids_NK.min(), ids_NK.max(), logprobs_NK.max()]).tolist()
    if lowest < 0 or highest >= embedded_tokens(student.model):
        raise TeacherError(
            f"{start}a TopKSignal with ids from {lowest:.0f} to {highest:.0f}, and the student's vocabulary has "
            f"{embedded_tokens(student.model):,} ids, from 0. Other ids belong to another tokenizer. Fill a list that "
            "is shorter than K with any valid id and a log-probability of -inf."
        )
    if not largest <= ABOVE_ZERO:
        raise TeacherError(
            f"{start}a TopKSignal with a log-probability of {largest:.3g}. Log-probabilities are 0 at most, and these "
            "look like probabilities or logits. Apply log_softmax over the whole vocabulary before you pick K ids."
        )


def _check_tensors(tensors: Mapping[str, tuple[Any, int]], student: StudentHandle, start: str) -> None:
    """Check type, number of dimensions, dtype, gradient and device of named tensors."""
    for name, (tensor, dimensions) in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != dimensions or not tensor.is_floating_point():
            shape = f" {tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else ""
            raise TeacherError(
                f"{start}a signal whose {name} is a {type(tensor).__name__}{shape}. It must be a floating-point tensor "
                f"of {dimensions} dimension(s), N scored tokens packed without padding. {SIGNALS}."
            )
        if tensor.requires_grad:
            raise TeacherError(
                f"{start}a signal whose {name} carries a gradient. Only the student trains; the backward pass would "
                "run through the teacher too. Score in `with evaluating(model):` of opsd.models.forward (or "
                "torch.no_grad()), and detach the head: Head.from_model(model).detach()."
            )
        if tensor.device != student.device:
            raise TeacherError(
                f"{start}a signal whose {name} is on {tensor.device}, and the student is on {student.device}. A loss "
                "compares the two on one device. Move it: .to(self.student.device)."
            )


def _check_vocabulary(size: int, scored_ids: Ids, student: StudentHandle, start: str) -> None:
    needed = min(len(student.tokenizer), embedded_tokens(student.model))
    largest = max(scored_ids, default=-1)
    if size < needed or largest >= size:
        what = f"the student's has {needed:,}" if size < needed else f"token id {largest} is to be scored"
        raise TeacherError(
            f"{start}a signal over {size:,} ids, and {what}. Distributions are compared id by id, and the missing ids "
            "would have no probability. Use a teacher with the student's vocabulary."
        )


def check_completions(completions: Any, count: int, name: str) -> None:
    """Refuse samples that are no list of token ids per row.

    Raises:
        TeacherError: says what came back instead.
    """
    is_list = isinstance(completions, Sequence) and len(completions) == count
    if not is_list or not all(isinstance(ids, list) and all(isinstance(i, int) for i in ids) for ids in completions):
        raise TeacherError(
            f"teacher {name!r}: sample returned {completions!r:.80} for {count} rows. Completions are trained on as "
            "token ids, one list of int per row, in the order of the rows. Leave out prompt and padding; "
            "Tensor.tolist() makes lists of a tensor."
        )


def check_settings(settings: Any, name: str) -> None:
    """Refuse settings that a checkpoint cannot hold.

    Raises:
        TeacherError: they are no mapping of plain values.
    """
    try:
        json.dumps(settings)
        is_plain = isinstance(settings, Mapping)
    except (TypeError, ValueError):
        is_plain = False
    if not is_plain:
        raise TeacherError(
            f"teacher {name!r}: settings are {settings!r:.200}. A checkpoint stores them as JSON, and a resumed run "
            "compares them. Return a dict of numbers, texts, lists and dicts; tensors belong into state_dict()."
        )


def saved_state(teacher: Any, keep: bool = True) -> Mapping[str, Tensor]:
    """Return a teacher's state for a checkpoint, whole and in CPU memory; a collective where it is sharded.

    Args:
        teacher: the teacher.
        keep: whether this process writes the checkpoint. The others take part in gathering and keep nothing.

    Raises:
        TeacherError: `state_dict` returned something else than tensors by name.
    """
    state = teacher.state_dict()
    items = list(state.items()) if isinstance(state, Mapping) else [(None, state)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in items):
        kinds = {key: type(value).__name__ for key, value in items}
        raise TeacherError(
            f"teacher {teacher.strategy!r}: state_dict returned {kinds!r:.200}. A checkpoint stores it as tensors by "
            "name. Return {name: tensor}; a number becomes torch.tensor(number)."
        )
    return gathered_on_cpu(state, keep)


def load_state(teacher: Any, state: Mapping[str, Tensor]) -> None:
    """Give a teacher its state back.

    Raises:
        CheckpointError: the teacher reads a name that its state does not have.
    """
    try:
        teacher.load_state_dict(state)
    except KeyError as error:
        raise CheckpointError(
            f"teacher {teacher.strategy!r}: load_state_dict reads {error}, and the checkpoint has: "
            f"{_shortened(sorted(state)) or 'nothing'}. The teacher that wrote it had other names. Read what "
            "state_dict() gives, or resume with that teacher."
        ) from error


def check_state_keys(given: Iterable[str], expected: Iterable[str], name: str) -> None:
    """Refuse a state with other names than `state_dict` gives.

    Raises:
        CheckpointError: says which are missing and which are not known.
    """
    given, expected = set(given), set(expected)
    if given != expected:
        differences = {"without": sorted(expected - given), "with unknown": sorted(given - expected)}
        words = " and ".join(f"{word} {_shortened(keys)}" for word, keys in differences.items() if keys)
        raise CheckpointError(
            f"teacher {name!r} was given a state {words}. It must get back what its state_dict() gave, or it would go "
            "on as another teacher. Resume with the teacher and the student that wrote the checkpoint."
        )


def _shortened(keys: Sequence[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(map(repr, keys[:most])) + more
