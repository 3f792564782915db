"""OPSDConfig and OPSDTrainer, and what a run consists of: groups, rewards, checks, checkpoints, run card."""
