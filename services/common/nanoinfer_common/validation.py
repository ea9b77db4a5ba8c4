"""The one validator of requests."""


def is_label(value: object, max_chars: int) -> bool:
    """Says whether `value` is a string of 1 to `max_chars` visible ASCII characters."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= max_chars
        and all("!" <= character <= "~" for character in value)
    )
