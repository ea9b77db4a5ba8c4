"""Logits to token ids: processors, draws, log-probabilities."""
