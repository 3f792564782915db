"""Losses: student states and a teacher's signal in, one number per token out.

Pure functions: no logging, no device moves, no knowledge of which teacher made the signal.

| file | contents |
|---|---|
| `pointwise.py` | the table of divergences: the term of each vocabulary entry, and its gradient |
| `supports.py` | which entries are compared, and how the mass outside them is treated |
| `estimators.py` | estimates from sampled tokens: k1, k2, k3, rewards to go, baseline, importance ratio |
| `divergence.py` | a divergence with its settings: value and gradient of a block of tokens, description, formula |
| `token_weights.py` | weights of tokens from the predictions of both models |
| `rule.py` | the loss of a block of tokens: logits in, loss and gradient out |
| `kernel.py` | chunks and matrix products: every vocabulary-wide one once |
| `objective.py` | the loss of a run: its settings and the entry point |

Add a divergence with a row of `pointwise.DIVERGENCES`.
"""

from __future__ import annotations

from opsd.losses.divergence import Divergence
from opsd.losses.objective import LossOutput, Objective
from opsd.losses.rule import Tokens

__all__ = ["Divergence", "LossOutput", "Objective", "Tokens"]
