"""Transports: requests become the core's values, and its updates become messages."""
