"""What a teacher is shown: templates, schedules, renderers, truncation, lint."""
