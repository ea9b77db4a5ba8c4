"""How to be a service here: lifecycle, telemetry, configuration, errors, validation."""
