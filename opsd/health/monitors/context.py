"""Teacher prompts that lose their end: what the teacher should know is cut."""

from __future__ import annotations

from opsd.health.monitor import FINE, Monitor, Values, Verdict


class Context(Monitor):
    """Names shortened fields."""

    name, needs = "context", ("context/shortened",)

    def judge(self, values: Values) -> Verdict:
        """Return what it says."""
        share = values.now("context/shortened")
        level = self.level_of(share)
        if level == "fine":
            return FINE
        cut = f", by {values.now('context/tokens_cut'):.0f} tokens on average" if "context/tokens_cut" in values else ""
        return Verdict(
            level,
            f"{share:.0%} of teacher prompts have a field shortened{cut}",
            "Raise max_prompt_tokens, shorten the field in the rows, or drop such rows (drop_long_rows).",
            {"shortened": share},
        )
