"""Names of the product's environment variables, and those in an environment that are none.

One list for all services, because they often share an environment. A variable that is none is a
warning in a service, so that an older version starts with a newer one's environment, and an error
in `nanoinfer up`.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Final

PREFIX: Final = "NANOINFER_"
# The settings of the common room, then of the gateway, the tokenizer and the engine.
_SETTINGS: Final = """
default_deadline_seconds drain_delay_seconds drain_seconds host log_format log_level
max_connection_age_seconds max_connection_idle_seconds max_deadline_seconds max_message_bytes
max_received_bytes max_unsent_bytes metrics_port metrics_prefix port port_file reflection
trace_proxy trust_incoming_trace

engine max_answer_bytes max_buffered_bytes max_prompt_bytes max_prompt_tokens
max_request_prompt_bytes max_requests max_tenant_requests num_write_slots
ready_without_upstreams resolve_seconds silence_seconds stall_seconds tokenizer
tokenizer_timeout_seconds

max_batch_texts max_characters max_pending model num_template_workers num_threads pattern
special_tokens template_timeout_seconds

block_size device device_memory_share dtype kv_cache_dtype kv_cache_memory load_report_seconds
max_batch_requests max_batch_tokens max_buffered_tokens max_messages_per_second max_mixed_tokens
max_model_len max_queue_seconds max_waiting_bytes max_waiting_requests max_waiting_tokens
mixed_graphs model_name prefix_caching quantization reader_stall_seconds tensor_parallel threads
"""
SETTINGS: Final = frozenset(_SETTINGS.split())
# Of the settings' file, and of the command line.
OTHERS: Final = frozenset({"config", "target", "use_proxy"})
VARIABLES: Final = frozenset(f"{PREFIX}{name.upper()}" for name in SETTINGS | OTHERS)
# What Kubernetes sets in every pod for a Service whose name begins with `nanoinfer`.
_SERVICE_LINK: Final = re.compile(r"_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT_\d+_(TCP|UDP)(_\w+)?")


def unknown_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """Describes each variable that has the product's prefix and no meaning, by name."""
    for name in sorted(environment):
        if not name.upper().startswith(PREFIX) or name.upper() in VARIABLES:
            continue
        is_link = re.search(rf"({_SERVICE_LINK.pattern})$", name) is not None
        if is_link or environment[name].startswith(("tcp://", "udp://")):
            continue
        setting = name.lower().removeprefix(PREFIX.lower())
        nearest = difflib.get_close_matches(setting, SETTINGS | OTHERS, n=1, cutoff=0.7)
        hint = f"; did you mean {PREFIX}{nearest[0].upper()}?" if nearest else ""
        yield f"{name} is no setting{hint}"
