"""Monitors that name a failing run while it fails. Knows logged metrics and traced rollouts; nothing of models."""
