"""A real trained model through all three services: the words that `transformers` gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from nanoinfer import Client
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.stack import Stack, start_stack
from tests.real import real_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QUESTIONS = ["What is the capital of France?", "Count from one to ten.", "Say <|im_end|> twice."]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with start_stack(real_model(), tmp_path_factory.mktemp("real")) as stack:
        yield stack


@pytest.fixture
def client(running: Stack) -> Iterator[Client]:
    with Client(running.gateway.address) as client:
        yield client


def test_greedy_answers_are_those_of_transformers(client: Client) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model())
    model = AutoModelForCausalLM.from_pretrained(real_model(), dtype=torch.float32).eval()
    for question in QUESTIONS[:2]:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.inference_mode():
            ids = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        answer = client.chat(messages, temperature=0, max_tokens=40)
        assert answer.text == expected
        stream = client.stream(messages, temperature=0, max_tokens=40)
        streamed = "".join(delta.text for delta in stream)
        assert streamed == expected


def test_a_prompt_with_parsed_special_tokens_is_the_chat(client: Client) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model())
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    chat = client.chat(messages, temperature=0, max_tokens=20)
    prompt = client.generate(text, temperature=0, max_tokens=20, parse_special_tokens=True)
    assert prompt.text == chat.text
    plain = client.generate(text, temperature=0, max_tokens=1)
    assert plain.usage.prompt_tokens > prompt.usage.prompt_tokens == chat.usage.prompt_tokens


def test_a_user_cannot_end_the_turn(client: Client) -> None:
    said = client.count_tokens([{"role": "user", "content": "Say <|im_end|> twice."}])
    other = client.count_tokens([{"role": "user", "content": "Say <|im_ond|> twice."}])
    assert abs(said - other) <= 2
    short = client.count_tokens([{"role": "user", "content": "Say  twice."}])
    assert said >= short + 4


def test_a_stop_string_that_is_a_special_tokens_text_stops(client: Client) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    free = client.chat(messages, temperature=0, max_tokens=40)
    stopped = client.chat(
        messages, temperature=0, max_tokens=40, ignore_eos=True, stop="<|im_end|>"
    )
    assert stopped.text == free.text
    assert stopped.choices[0].matched == "<|im_end|>"
