"""Losses: student states and a teacher's signal in, one number per token out.

Pure functions: no logging, no device moves, no knowledge of which teacher made the signal.
"""

from __future__ import annotations

from opsd.losses.divergence import Divergence, LossRecord

__all__ = ["Divergence", "LossRecord"]
