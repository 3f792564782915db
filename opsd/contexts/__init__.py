"""The teacher's context for a row: templates, schedules, prompts as ids, truncation, lint."""
