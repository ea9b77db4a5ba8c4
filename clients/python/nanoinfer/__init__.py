"""NanoInfer: client library and command line."""
