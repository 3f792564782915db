"""Check 4: where student and teacher differ in a rollout: at its first tokens, or everywhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from opsd.doctor.patient import Patient
from opsd.findings import Finding

FIRST = 3  # tokens; a template or thinking mismatch shows here (methods: OPSD #10, tinker-cookbook #796)
SPIKE = 5.0  # times the median of the other tokens
LEAST = 1.0  # nats; below this a spike costs little
NOISE = 0.2  # of the divergence: less is averaged out over the tokens of a step
LARGE = 3.0  # nats at the median token: the teacher gives it 1/20 of the student's probability
find = functools.partial(Finding, "divergence")


def check_divergence(patient: Patient) -> Iterator[Finding]:
    """Compare the KL of the first tokens with the rest, and the rest with a useful teacher's."""
    values = patient.disagreement
    rest = torch.cat([row[FIRST:] for row in values])
    if not any(map(len, values)):
        yield find("skip", "every rollout is empty.")
        return
    yield from _noise(patient, float(torch.cat(values).mean()))
    if not len(rest):
        yield find("skip", f"no rollout is longer than {FIRST} tokens: nothing to compare the first tokens with.")
        return
    # Medians over rollouts, position by position: a mismatch moves one position of nearly all of them.
    first = [float(torch.stack([row[at] for row in values if len(row) > at]).median()) for at in range(FIRST)]
    spike, usual = max(first), float(rest.median())
    where = ("first", "second", "third")[first.index(spike)]
    figures = {"first_tokens": first, "median_of_the_rest": usual}
    detail = tuple(_first_tokens(patient, values))
    if spike > max(LEAST, SPIKE * usual):
        saw = (
            f"KL at the {where} token is {spike:.2f} nats, and {usual:.2f} after the first {FIRST} (medians): student "
            "and teacher open answers differently"
        )
        if any(prompt.context is not None and prompt.context.examples for prompt in patient.teacher_prompts):
            yield find("pass", f"{saw}, as the worked examples in the context ask for.", figures=figures)
            return
        yield find(
            "warn",
            f"{saw}.",
            "Compare how student and teacher open the answer (check tokenizers), or leave these tokens out: "
            f"skip_first_tokens: {FIRST}.",
            detail,
            figures,
        )
    elif usual > LARGE:
        yield find(
            "warn",
            f"KL is {usual:.1f} nats at the median token: student and teacher disagree about ordinary tokens. The "
            "prompts are misaligned, or the teacher cannot do this task.",
            "Compare both prompts with `opsd show`; try the teacher without its context; use a teacher closer to the "
            "student.",
            detail,
            figures,
        )
    else:
        yield find(
            "pass",
            f"KL is {spike:.2f} nats at the {where} token and {usual:.2f} after the first {FIRST} (medians).",
            figures=figures,
        )


def _noise(patient: Patient, taught: float) -> Iterator[Finding]:
    """Compare what a server's rounding does with what it is to teach."""
    noise = patient.teacher.noise
    if noise <= NOISE * taught:
        return
    yield find(
        "fail" if noise > taught else "warn",
        f"the teacher's servers answer one request with log-probabilities that differ by {noise:.2g} nats per token, "
        f"and the divergence that they are to teach is {taught:.2g}.",
        "Serve the teacher in float32 (--dtype float32), or with a context that tells it more.",
        figures={"noise": noise, "divergence": taught},
    )


def _first_tokens(patient: Patient, values: list[torch.Tensor], most: int = 3) -> Iterator[str]:
    for completion, row in list(zip(patient.sampled[0], values, strict=True))[:most]:
        tokens = [repr(patient.tokenizer.decode([token])) for token in completion[: FIRST + 3]]
        yield "  ".join(f"{token} {value:.2f}" for token, value in zip(tokens, row.tolist(), strict=False))
