"""OPSDConfig and OPSDTrainer, and what a run consists of: groups, rewards, checks, checkpoints, callbacks, the run card."""
