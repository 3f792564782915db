"""Asks servers for the log-probabilities of given tokens. Knows ids and numbers; nothing of teachers or training."""
