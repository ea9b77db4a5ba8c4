"""One step on a device: inputs, launches, graphs, timing."""
