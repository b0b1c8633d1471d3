"""The trainer, its checkpoints, its run folder."""
