"""Several devices that share one model, each a process of its own."""
