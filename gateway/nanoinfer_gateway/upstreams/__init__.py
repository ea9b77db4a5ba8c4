"""Tokenizers and engines: addresses, replicas, signs of life, calls that move on."""
