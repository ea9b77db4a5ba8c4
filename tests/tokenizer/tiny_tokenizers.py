"""Makes small tokenizers, each trained here with the pre-tokenizer pattern of a real family.

`make_tokenizer(directory, family)` writes what a model directory holds: `tokenizer.json`,
`tokenizer_config.json` with a chat template, `generation_config.json`.
"""

import json
from pathlib import Path
from typing import Any

from nanoinfer_tokenizer.patterns import PATTERNS
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THINKING = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role == 'tool' or content.startswith('<tool_response>') %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""
HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
INSTRUCT = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# special tokens, added tokens that are not special, BOS, EOS, chat template
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"special": ["<|endoftext|>"], "eos": "<|endoftext|>"},
    "llama3": {
        "special": [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "template": HEADERS,
    },
    "qwen2": {
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "eos": "<|im_end|>",
        "template": CHATML,
    },
    "qwen3": {
        "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "added": ["<think>", "</think>", "<tool_response>", "</tool_response>"],
        "eos": "<|im_end|>",
        "template": THINKING,
    },
    "mistral": {
        "special": ["<s>", "</s>", "[INST]", "[/INST]"],
        "bos": "<s>",
        "eos": "</s>",
        "template": INSTRUCT,
    },
    "o200k": {"special": ["<|endoftext|>"], "eos": "<|endoftext|>"},
}
_PATTERN_OF = {"qwen3": "qwen2", "mistral": "tekken"}

TEXTS = (
    "The quick brown fox jumps over the lazy dog. It isn't what we'd say, they've said; I'm sure.",
    "THE KEY-VALUE CACHE HOLDS WHAT ATTENTION NEEDS. The key-value cache holds what it needs.",
    "def step(self, batch: Batch) -> list[int]:\n    return [row.id for row in batch.rows]\n",
    "for (int i = 0; i < 1024; ++i) {\n\tsum += values[i] * 3.14159;\n}\r\n\r\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Où est l'été à Noël?",
    "人工智能模型把文字变成数字。日本語のテキストも、한국어 텍스트도 처리합니다。",
    "Съешь же ещё этих мягких французских булок. Η γρήγορη αλεπού. مرحبا بالعالم. שלום עולם.",
    "नमस्ते दुनिया। สวัสดีชาวโลก 😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 1234567890 ½ ² ٣",
    "          spaces      and\n\n\nlines\t\ttabs --- === *** <html><body> </think> <| |> ###",
)


def train(family: str, *, vocab_size: int = 700) -> Tokenizer:
    """Trains `family`'s byte-level BPE on `TEXTS`; special tokens follow the model's vocabulary."""
    description = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE(ignore_merges=family in ("llama3", "mistral")))
    if family == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = Regex(PATTERNS[_PATTERN_OF.get(family, family)])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if family in ("qwen2", "qwen3"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in description["special"]]
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in description.get("added", ())]
    )
    if bos := description.get("bos"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def make_tokenizer(directory: Path, family: str, *, vocab_size: int = 700) -> Path:
    """Writes a model directory's tokenizer files and returns the directory."""
    description = FAMILIES[family]
    tokenizer = train(family, vocab_size=vocab_size)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": description["eos"],
        "bos_token": description.get("bos"),
        "chat_template": description.get("template"),
        "clean_up_tokenization_spaces": False,
    }
    config = {name: value for name, value in config.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    eos_token_id = tokenizer.token_to_id(description["eos"])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    return directory
