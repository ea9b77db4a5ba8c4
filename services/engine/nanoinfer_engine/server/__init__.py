"""The engine as a gRPC service: messages, statuses, metrics, settings."""
