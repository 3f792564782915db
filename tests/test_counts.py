"""What a step computes, in counts that are the same on every machine: seconds would not be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MAKE_TEACHER, make_rollouts, make_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from opsd import OPSDTrainer
from opsd.models.passes import plan_passes
from opsd.rollouts import Ids, Rollouts

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


def step(trainer: OPSDTrainer, rollouts: Rollouts) -> None:
    """Do what a micro-batch does."""
    trainer.model.train()
    trainer.accelerator.backward(trainer.compute_loss(trainer.model, trainer._scored(rollouts)))


def flops_of_step(trainer: OPSDTrainer, rollouts: Rollouts) -> int:
    """Return the floating-point operations of a micro-batch's matrix products."""
    with FlopCounterMode(display=False) as counter:
        step(trainer, rollouts)
    return sum(counter.get_flop_counts()["Global"].get(product, 0) for product in PRODUCTS)


def weights_of_layers(model: nn.Module) -> int:
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    return sum(layer.weight.numel() for name, layer in layers.items() if "lm_head" not in name)


def computed_tokens(prompts: Sequence[Ids], completions: Sequence[Ids]) -> int:
    """Return the tokens of all passes, padding included."""
    lengths = [len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True)]
    return sum(family.cost(lengths, 0) for family in plan_passes(prompts, completions))


@pytest.mark.parametrize("teacher", ["same_checkpoint", "ema", "sibling"])
def test_a_step_makes_each_product_once(tmp_path: Path, teacher: str) -> None:
    """Body: forward, twice that backward, the teacher's forward. Head: logits of both, two gradients; scored tokens."""
    trainer = make_trainer(tmp_path, MAKE_TEACHER[teacher]())
    rollouts = trainer.scorer.prepare_rollouts(make_rollouts(6))
    step(trainer, rollouts)  # probes of a model are made once
    completions = rollouts.trimmed_completions
    of_student = computed_tokens(rollouts.prompt_ids, completions)
    of_teacher = sum(computed_tokens(shown, completions) for shown in rollouts.teacher_prompt_ids.values())
    config = trainer.model.config
    body = 2 * weights_of_layers(trainer.model) * (3 * of_student + of_teacher)
    head = 2 * config.hidden_size * config.vocab_size * 4 * rollouts.num_scorable
    assert flops_of_step(trainer, rollouts) == body + head


class Waits(TorchDispatchMode):
    """Counts values that are read from tensors: there a host waits for its GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("teacher", ["same_checkpoint", "ema", "sibling"])
def test_a_micro_batch_waits_for_the_device_as_often_with_more_rows(tmp_path: Path, teacher: str) -> None:
    """Once in the loss; twice a pass, for its mask and for its longest row; once in the backward pass of a CPU."""
    trainer = make_trainer(tmp_path, MAKE_TEACHER[teacher]())
    rollouts = trainer.scorer.prepare_rollouts(make_rollouts(8))
    step(trainer, rollouts)
    for rows in (rollouts.select([0, 1]), rollouts):
        with Waits() as waits:
            step(trainer, rows)
        assert waits.count == 1 + 2 * 2 + 1


def test_products_grow_in_line_with_the_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MAKE_TEACHER["same_checkpoint"]())
    rollouts = trainer.scorer.prepare_rollouts(make_rollouts(4))
    step(trainer, rollouts)
    one = flops_of_step(trainer, rollouts.select([3]))
    for count in (2, 4, 8):
        assert flops_of_step(trainer, rollouts.select([3] * count)) <= count * one


@pytest.mark.parametrize("longest", [64, 256, 1024])
def test_a_sixth_of_the_tokens_is_padding_at_most(longest: int) -> None:
    """Lengths as training has them: prompts of 30 to 60 tokens, completions of any length up to the longest."""
    generator = torch.Generator().manual_seed(longest)

    def sequences(low: int, high: int) -> list[Ids]:
        lengths = torch.randint(low, high + 1, (16,), generator=generator).tolist()
        return [torch.randint(1, 10**6, (length,), generator=generator).tolist() for length in lengths]

    prompts, completions = sequences(30, 60), sequences(1, longest)
    real = sum(map(len, prompts)) + sum(map(len, completions)) - 16
    assert real <= computed_tokens(prompts, completions) <= real * 7 / 6
