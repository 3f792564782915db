"""Losses: student states and a teacher's signal in, one number per token out.

Pure functions: no logging, no device moves, no knowledge of which teacher made the signal.

| file | what it knows |
|---|---|
| `entries.py` | the table of divergences: what each vocabulary entry adds, and its slope |
| `supports.py` | which entries are compared, and what becomes of the rest |
| `divergence.py` | the settings of a divergence, its words and its formula |
| `estimators.py` | what sampled tokens alone say: k1, k2, k3, what later tokens cost, importance |
| `weights.py` | which tokens count, and how much |
| `rule.py` | all of these for a block of tokens: logits in, loss and gradient out |
| `kernel.py` | chunks and products: every vocabulary-wide one once |
| `objective.py` | the settings of a run, and the entry point |
"""

from __future__ import annotations

from opsd.losses.divergence import Divergence
from opsd.losses.objective import LossOutput, Objective
from opsd.losses.rule import Tokens

__all__ = ["Divergence", "LossOutput", "Objective", "Tokens"]
