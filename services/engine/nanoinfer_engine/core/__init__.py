"""Scheduling and requests as plain data: no torch, no gRPC."""
