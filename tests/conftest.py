"""What holds for every test: no proxy of the machine stands between a test and its own sockets."""

import os

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "no_proxy", "no_grpc_proxy")

for name in PROXIES:
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
