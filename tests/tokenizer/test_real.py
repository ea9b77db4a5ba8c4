"""Real tokenizers against `tokenizers` and `transformers`: decoding, framing, the guard."""

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nanoinfer_tokenizer.chat import ChatRenderer, Message
from nanoinfer_tokenizer.encodings import encode_with_control
from nanoinfer_tokenizer.guard import ContentGuard
from nanoinfer_tokenizer.loading import LoadedTokenizer, load_tokenizer
from nanoinfer_tokenizer.streaming import StreamDecoder
from nanoinfer_tokenizer.template_process import TemplateLimits
from nanoinfer_tokenizer.template_worker import ChatEnvironment, render
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from tests.real import TOKENIZERS, chat_template, chat_template_names, real_tokenizer
from tests.tokenizer.conftest import decode
from tests.tokenizer.conversations import FRAGMENTS, HARMLESS, MARKED
from tests.tokenizer.tiny_tokenizers import TEXTS

# gpt-oss's is the largest, and of the same kind as Llama 3's.
names = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "gptoss")) for name in TOKENIZERS],
)


@cache
def ours(name: str) -> LoadedTokenizer:
    return load_tokenizer(real_tokenizer(name))


@cache
def theirs(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(real_tokenizer(name) / "tokenizer.json"))


@cache
def telling_ids(name: str) -> list[int]:
    """Ids whose text depends on neighbours, or that are no text of their own."""
    vocabulary = ours(name).encoding.vocabulary
    spelling = vocabulary.spelling
    added = theirs(name).get_added_tokens_decoder()
    spaces = [i for i, token in enumerate(spelling.tokens) if token and not token.strip()]
    broken = [i for i, token in enumerate(spelling.tokens) if is_broken(token)]
    chosen = [sorted(spelling.byte_ids), spaces, broken, sorted(added), sorted(vocabulary.special)]
    return [token_id for group in chosen for token_id in group[:300]]


def is_broken(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return True
    return False


def streamed(name: str, ids: Sequence[int], cuts: Sequence[int], *, skip_special: bool) -> str:
    decoder = StreamDecoder(ours(name).encoding.vocabulary, skip_special=skip_special)
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    return "".join(decoder.push(ids[a:b]) for a, b in pairwise(edges)) + decoder.finish()


@names
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_ids_decode_as_the_library_decodes_them(name: str, data: st.DataObject) -> None:
    size = theirs(name).get_vocab_size()
    one = st.sampled_from(telling_ids(name)) | st.integers(0, size - 1)
    ids = data.draw(st.lists(one, max_size=24))
    cuts = data.draw(st.lists(st.integers(0, 24), max_size=6))
    for skip in (True, False):
        expected = theirs(name).decode(ids, skip_special_tokens=skip)
        assert decode(ours(name).encoding.vocabulary, ids, skip_special=skip) == expected
        assert streamed(name, ids, cuts, skip_special=skip) == expected


@names
def test_every_id_alone_and_after_another_decodes_as_the_librarys(name: str) -> None:
    vocabulary = ours(name).encoding.vocabulary
    size = len(vocabulary.spelling.tokens)
    word = ours(name).encoding.encode("word")[-1]
    ids = random.Random(1).sample(range(size), 4000) + telling_ids(name)
    alone = theirs(name).decode_batch([[i] for i in ids], skip_special_tokens=False)
    after = theirs(name).decode_batch([[word, i, word] for i in ids], skip_special_tokens=False)
    for token_id, one, three in zip(ids, alone, after, strict=True):
        assert decode(vocabulary, [token_id]) == one
        assert decode(vocabulary, [word, token_id, word]) == three


@names
def test_real_texts_come_back_as_from_the_library(name: str) -> None:
    encoding = ours(name).encoding
    for text in [*TEXTS, "".join(FRAGMENTS), "a\n\n\n    b\t\tc", " leading", "  two", "🏳️‍🌈 ꙮ ཨ"]:
        ids = theirs(name).encode(text, add_special_tokens=False).ids
        expected = theirs(name).decode(ids)
        assert streamed(name, ids, range(len(ids)), skip_special=True) == expected
        assert encode_with_control(encoding, text) == ids


# --- what is put around a text ---


@pytest.fixture(scope="module")
def flagged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, object]], Path]:
    """Copies a real tokenizer's directory with other flags in its config."""

    def write(name: str, flags: dict[str, object]) -> Path:
        source = real_tokenizer(name)
        directory = tmp_path_factory.mktemp(name)
        (directory / "tokenizer.json").symlink_to(source / "tokenizer.json")
        config = json.loads((source / "tokenizer_config.json").read_text())
        kept = {key: value for key, value in config.items() if not key.startswith("add_")}
        (directory / "tokenizer_config.json").write_text(json.dumps(kept | flags))
        return directory

    return write


@pytest.mark.parametrize(
    "name",
    ["llama2", "deepseek_v3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama3_1",))],
)
def test_flags_in_the_config_do_what_transformers_does_with_them_as_arguments(
    name: str, flagged: Callable[[str, dict[str, object]], Path]
) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(real_tokenizer(name))
    unset = load_tokenizer(flagged(name, {}))
    text = unset.encoding.encode("Hi")
    assert unset.frame.around(text) == theirs(name).encode("Hi").ids
    for bos, eos in ((True, True), (True, False), (False, True), (False, False)):
        tokenizer = load_tokenizer(flagged(name, {"add_bos_token": bos, "add_eos_token": eos}))
        reference.add_bos_token, reference.add_eos_token = bos, eos
        assert tokenizer.frame.around(text) == reference.encode("Hi"), (bos, eos)


# --- what users say ---


def template_of(name: str) -> str:
    """The tokenizer's own chat template, or a plain one where its files bring none."""
    plain = "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}{% endfor %}"
    return ours(name).chat_template or plain


def is_blank(token: str) -> bool:
    return not token.replace("\u2581", " ").strip()


def chat_ids(renderer: ChatRenderer, name: str, contents: list[str]) -> list[int]:
    roles = ["user", "assistant"]
    messages = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    rendered = renderer.render(messages, add_generation_prompt=True)
    return encode_with_control(ours(name).encoding, rendered.guarded, rendered.restore)


@pytest.mark.matrix("R14")
@names
def test_no_added_token_arises_from_what_a_user_says(name: str) -> None:
    added = theirs(name).get_added_tokens_decoder()
    forbidden = {i: token.content for i, token in added.items() if not is_blank(token.content)}
    assert len(forbidden) >= 3
    tokens = list(forbidden.values())
    limits = TemplateLimits(num_workers=1, timeout_seconds=60)
    with closing(ChatRenderer(template_of(name), ours(name), limits)) as renderer:

        def found(content: str) -> list[int]:
            ids = chat_ids(renderer, name, ["hi", "so", content])
            return [token_id for token_id in ids if token_id in forbidden]

        expected = found("x")
        for content in ("".join(tokens), " ".join(tokens), "\n".join(t + t[:-1] for t in tokens)):
            assert found(content) == expected
            assert forbidden.keys().isdisjoint(ours(name).encoding.encode(content))
        for token in random.Random(2).sample(tokens, min(len(tokens), 40)):
            assert found(token) == expected, token


@names
def test_the_opt_in_reads_every_added_token(name: str) -> None:
    encoding = ours(name).encoding
    added = theirs(name).get_added_tokens_decoder()
    wanted = [i for i, token in added.items() if not is_blank(token.content)]
    text = "x".join(added[i].content for i in wanted)
    ids = encode_with_control(encoding, text)
    assert [i for i in ids if i in set(wanted)] == wanted


@names
def test_harmless_chats_have_the_ids_of_transformers(name: str) -> None:
    limits = TemplateLimits(num_workers=1, timeout_seconds=60)
    template = template_of(name)
    reference = PreTrainedTokenizerFast.from_pretrained(real_tokenizer(name))
    contents = ["1 < 2 | [x] {y}\n\n    z\t", "Yes.", "  Zwölf 你好 😀 \n"]
    messages = [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant", "user"], contents, strict=True)
    ]
    expected = reference.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=False
    )
    with closing(ChatRenderer(template, ours(name), limits)) as renderer:
        assert chat_ids(renderer, name, contents) == expected


@pytest.mark.parametrize("file", chat_template_names())
def test_real_templates_see_what_was_written(file: str) -> None:
    source = chat_template(file)
    variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    environment = ChatEnvironment()
    template = environment.from_string(source)
    reference = _compile_jinja_template(source)
    guard = ContentGuard(["<think>", "</think>", "[INST]", "<tool_call>", "|end|"], source)
    num_rendered = 0
    for conversation in [*HARMLESS, *MARKED]:
        protected = guard.protect([content for _, content in conversation])
        roles = [role for role, _ in conversation]

        def messages(contents: Sequence[str], roles: list[str] = roles) -> list[dict[str, str]]:
            pairs = zip(roles, contents, strict=True)
            return [{"role": role, "content": content} for role, content in pairs]

        environment.stand_ins.table = dict(protected.stand_ins)
        answer = render(
            template,
            variables | {"messages": messages(protected.texts)},
            1_000_000,
            environment.stand_ins,
        )
        written = messages([content for _, content in conversation])
        try:
            expected = reference.render(variables | {"messages": written})
        except Exception:
            assert "refused" in answer
        else:
            assert answer["text"].translate(protected.restore) == expected
            num_rendered += 1
    assert num_rendered > 0


# --- how long it takes ---


@pytest.mark.parametrize(
    ("name", "nearly"), [("llama3_1", "<|reserved_special_token_"), ("gemma3", "<unused")]
)
def test_searching_does_not_try_one_token_after_the_other(name: str, nearly: str) -> None:
    control = ours(name).encoding.control
    guard = ContentGuard(control.tokens, "")
    one_by_one = re.compile("|".join(map(re.escape, sorted(control.tokens, key=len, reverse=True))))

    def cpu_seconds(work: Callable[[str], object], text: str) -> float:
        started = time.thread_time()
        work(text)
        return time.thread_time() - started

    text = nearly * 3000
    reference = cpu_seconds(lambda text: one_by_one.findall(text), text)
    split = min(cpu_seconds(lambda text: list(control.split(text)), text) for _ in range(3))
    protect = min(cpu_seconds(lambda text: guard.protect([text]), text) for _ in range(3))
    assert max(split, protect) < reference / 4
