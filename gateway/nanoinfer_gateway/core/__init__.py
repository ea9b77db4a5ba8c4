"""Generation of text without a transport: admission, the flow, decoding, stop strings."""
