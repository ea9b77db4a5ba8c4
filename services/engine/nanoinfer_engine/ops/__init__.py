"""The operations that a model is written in, one implementation a device."""
