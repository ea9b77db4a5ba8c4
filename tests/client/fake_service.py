"""A stand-in for a service's process: `python fake_service.py NAME [--ready-after S] ... FLAGS`.

Listens like the real ones (port file, health), writes its events to $FAKE_EVENTS, and misbehaves as
told.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


def record(name: str, event: str) -> None:
    entry = {"name": name, "event": event, "time": time.monotonic(), "argv": sys.argv}
    entry["environment"] = dict(os.environ)
    line = json.dumps(entry)
    with Path(os.environ["FAKE_EVENTS"]).open("a") as file:
        file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--ready-after", type=float, default=0.0)
    parser.add_argument("--die-after", type=float)
    parser.add_argument("--die-at", type=Path, help="dies when this file is there")
    parser.add_argument("--stop-seconds", type=float, default=0.0)
    parser.add_argument("--deaf", action="store_true")
    arguments, _ = parser.parse_known_args()
    told = set() if arguments.deaf else {signal.SIGTERM}
    if arguments.deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Waited for, not handled: a parent's death tells us once per thread of it, and a handler that
    # interrupts itself inside Event.set() waits for its own lock forever.
    signal.pthread_sigmask(signal.SIG_BLOCK, told)
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    status = health_pb2.HealthCheckResponse
    checks.set("readiness", status.NOT_SERVING)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    record(arguments.name, "started")
    arguments.port_file.write_text(f"listening on 127.0.0.1:{port}\n")
    timer = threading.Timer(arguments.ready_after, lambda: checks.set("readiness", status.SERVING))
    timer.daemon = True
    timer.start()
    if arguments.die_after is not None or arguments.die_at is not None:
        time.sleep(arguments.die_after or 0)
        while arguments.die_at is not None and not arguments.die_at.exists():
            time.sleep(0.02)
        print("something broke\nlast words", flush=True)
        os._exit(7)
    signal.sigwait(told)
    record(arguments.name, "told")
    time.sleep(arguments.stop_seconds)
    record(arguments.name, "ended")


if __name__ == "__main__":
    main()
