"""The gateway: composes tokenizer and engine, admits, matches stop strings, traces."""
