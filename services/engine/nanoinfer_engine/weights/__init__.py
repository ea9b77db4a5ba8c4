"""Checkpoints on disk, and how they become a model's parameters."""
