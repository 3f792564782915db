"""Reads a run's folder, and writes pages to look at; knows nothing of models or trainers."""
