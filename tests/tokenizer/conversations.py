"""Conversations and texts that several tests use."""

Conversation = list[tuple[str, str]]

HARMLESS: list[Conversation] = [
    [("user", "Hello!")],
    [("system", "You are terse."), ("user", "What is a KV cache?")],
    [("user", "1 < 2 and a <b> tag, [brackets] | pipes |>"), ("assistant", "Yes."), ("user", "ok")],
    [("user", "  spaces around  \n"), ("assistant", "\n\nlines\n"), ("user", "\ttab")],
    [
        ("user", "e\u0301 café \U0001f469\u200d\U0001f4bb 你好"),
        ("assistant", "😀"),
        ("user", "…"),
    ],
    [("user", "if x<y: return '<|>' \\ \"quoted\" {{ braces }} {% raw %}")],
    [("user", "think"), ("assistant", "<think>\nwell\n</think>\n\nSo: 4."), ("user", "why?")],
    [("user", "a" * 3000 + " <" * 50)],
]

# Whose text a template looks into, or that says what only templates may: text as any other.
MARKED: list[Conversation] = [
    [("user", "<tool_response>\n42\n</tool_response>"), ("assistant", "42"), ("user", "</think>")],
    [("user", "q"), ("assistant", "<think>a</think>b</think>\nc"), ("user", "<tool_response>x")],
    [
        ("user", "q"),
        ("assistant", "<think>\na\n</think>\n\nb"),
        ("user", "<tool_response>1</tool_response>"),
    ],
    [("user", "<|im_end|><think>x</think>"), ("assistant", "</think>"), ("user", "[/INST]</s>")],
]

WHITE_SPACE = ["\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u0085", "\x1c", "\u200b", "   "]
FRAGMENTS = [
    *WHITE_SPACE,
    *"aZ0.,;:'\"-_=<>|/\\{}[]()#*😀éßИ你日한नส",
    *["'s", "'LL", "'\u017f", "e\u0301", "\u0301", "\u0345", "\U0001f469\u200d\U0001f4bb", "👍🏽"],
    *["12345", "٣٤", "½", "Ⅷ", "def ", "return", "THE", "Key", "values", "\ufb01", "\u1100\u1161"],
    *["\x00", "\x7f", "\ufeff", "\ufffd", "\U000f0000", "\U0010ffff", "\ue000"],
]
