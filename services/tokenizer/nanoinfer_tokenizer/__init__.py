"""Text to ids and back: encodings, chat templates, the vocabulary.

Everything below `service` knows neither grpc nor the protos.
"""
