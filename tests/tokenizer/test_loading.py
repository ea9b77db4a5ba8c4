import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nanoinfer_common.fingerprint import tokenizer_fingerprint
from nanoinfer_tokenizer.encodings import Frame, TokenizerFileError
from nanoinfer_tokenizer.loading import RankFileOptions, load_tokenizer
from nanoinfer_tokenizer.patterns import PATTERNS
from transformers import PreTrainedTokenizerFast

from tests.tokenizer.conftest import decode
from tests.tokenizer.test_encodings import corpus
from tests.tokenizer.tiny_tokenizers import make_tokenizer, train

Directories = Callable[[str], Path]


def write_ranks(path: Path) -> Path:
    """Writes the ranks of the tiny GPT-2 tokenizer."""
    encoding = load_tokenizer(path).encoding
    tokens = encoding.vocabulary.spelling.tokens[:-1]
    lines = [f"{base64.b64encode(data).decode()} {rank}" for rank, data in enumerate(tokens)]
    file = path / "vocabulary.tiktoken"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GPT-2 model directory of this test's own."""
    train("gpt2").save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_directory_and_its_file_give_the_same(directory_of: Directories) -> None:
    directory = directory_of("llama3")
    whole = load_tokenizer(directory)
    file = load_tokenizer(directory / "tokenizer.json")
    assert whole.encoding.vocabulary == file.encoding.vocabulary
    assert whole.chat_template == file.chat_template
    assert whole.eos_token_ids == file.eos_token_ids == (704,)
    assert whole.template_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    assert (whole.name, file.name) == (directory.name, "tokenizer")


def test_a_rank_file_gives_the_ids_of_the_tokenizer_it_came_from(model: Path) -> None:
    expected = load_tokenizer(model).encoding
    encoding = load_tokenizer(write_ranks(model)).encoding
    assert encoding.info.backend == "tiktoken"
    assert encoding.vocabulary == expected.vocabulary
    for text in corpus(100):
        assert encoding.encode(text) == expected.encode(text)


def test_a_rank_files_pattern_and_special_tokens_can_be_chosen(model: Path) -> None:
    options = RankFileOptions("qwen2", ("<a>", "<b>"))
    encoding = load_tokenizer(write_ranks(model), options).encoding
    assert encoding.vocabulary.special == {700: "<a>", 701: "<b>"}
    assert "qwen2" in encoding.info.reason
    default = load_tokenizer(model / "vocabulary.tiktoken", RankFileOptions("qwen2")).encoding
    assert list(default.vocabulary.special.values())[1:] == ["<|im_start|>", "<|im_end|>"]


def test_rank_file_settings_are_refused_where_they_mean_nothing(model: Path) -> None:
    with pytest.raises(TokenizerFileError, match="brings its own pattern"):
        load_tokenizer(model, RankFileOptions())


@pytest.mark.parametrize(
    "content", [b"not base64 1\n", b"YQ==\n", b"YQ== x\n", b"YQ== 0\n", b"", b"\xff\xfe"]
)
def test_damaged_rank_files_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.tiktoken"
    file.write_bytes(content)
    with pytest.raises(TokenizerFileError, match="rank file"):
        load_tokenizer(file)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "BPE"}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}},
        {"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}},
        {"model": {"type": "Nonsense", "vocab": {}}},
        {"added_tokens": [{"id": 1}]},
        {"added_tokens": ["<s>"]},
        {"pre_tokenizer": "ByteLevel"},
        {"post_processor": {"type": "Mystery"}},
        {"decoder": None, "normalizer": {"type": "Lowercase"}},
    ],
)
def test_damaged_tokenizers_are_refused(change: dict[str, Any], model: Path) -> None:
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(TokenizerFileError):
        load_tokenizer(model)


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "checkpoint.pt"):
        with pytest.raises(TokenizerFileError):
            load_tokenizer(path)
    (tmp_path / "tokenizer.json").write_bytes(b"\x80 not json")
    with pytest.raises(TokenizerFileError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(TokenizerFileError, match=r"^tokenizer\.json is not a JSON object$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerFileError, match=r"^tokenizer\.json is a Git LFS pointer"):
        load_tokenizer(tmp_path)


def test_an_eos_token_of_another_form_is_refused_in_words(model: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"eos_token": 3}')
    told = r"cannot be read: tokenizer_config\.json: eos_token is 3, must be a token's text$"
    with pytest.raises(TokenizerFileError, match=told):
        load_tokenizer(model)


def test_a_huge_id_does_not_make_a_huge_table(model: Path) -> None:
    file = model / "tokenizer.json"
    document = json.loads(file.read_text())
    document["added_tokens"][0]["id"] = 2**31
    file.write_text(json.dumps(document))
    with pytest.raises(TokenizerFileError, match="ids to"):
        load_tokenizer(model)


def test_where_the_chat_template_comes_from(model: Path) -> None:
    config = model / "tokenizer_config.json"
    assert load_tokenizer(model).chat_template is None
    config.write_text(json.dumps({"chat_template": "config"}))
    assert load_tokenizer(model).chat_template == "config"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(model).chat_template == "d"
    (model / "chat_template.jinja").write_text("file")
    assert load_tokenizer(model).chat_template == "file"
    (model / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(TokenizerFileError, match="unknown form"):
        load_tokenizer(model)


def test_eos_is_what_generation_config_config_and_tokenizer_name_together(model: Path) -> None:
    (model / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>", "lstrip": False}})
    )
    assert load_tokenizer(model).eos_token_ids == (700,)
    (model / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert load_tokenizer(model).eos_token_ids == (5, 700)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [700, 6]}))
    assert load_tokenizer(model).eos_token_ids == (5, 6, 700)
    # the model's configurations count, not those beside a tokenizer from elsewhere
    (model / "ckpt.pt").write_bytes(b"")
    assert load_tokenizer(model, model=model / "ckpt.pt").eos_token_ids == (700,)


def test_a_byte_order_mark_changes_neither_ids_nor_fingerprint(model: Path) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    before, fingerprint = load_tokenizer(model), tokenizer_fingerprint(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (model / name).read_text(encoding="utf-8")
        (model / name).write_text(text, encoding="utf-8-sig")
    after = load_tokenizer(model)
    assert after.encoding.encode("the cache") == before.encoding.encode("the cache")
    assert after.eos_token_ids == before.eos_token_ids == (700,)
    assert tokenizer_fingerprint(model) == fingerprint


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"ckpt.pt": ""}, "--tokenizer"),
        ({"x.gguf": "GGUF"}, "GGUF is not supported"),
        ({"pytorch_model.bin": ""}, "save_pretrained"),
        ({"m/adapter_config.json": "{}"}, "LoRA"),
        ({"m/tokenizer.model": ""}, "AutoTokenizer"),
        ({"m/vocab.json": "{}", "m/merges.txt": ""}, "AutoTokenizer"),
        ({"m/config.json": "{}", "m/model.safetensors": ""}, "--tokenizer"),
        ({"m/config.json": "{}", "m/pytorch_model.bin": ""}, "save_pretrained"),
        ({"m/tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
        ({"x.tiktoken": "version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
    ],
)
def test_a_path_without_a_tokenizer_says_what_to_do(
    files: dict[str, str], said: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerFileError, match=said):
        load_tokenizer(tmp_path / next(iter(files)).split("/")[0])


@pytest.mark.parametrize(
    ("post_processor", "prefix", "suffix"),
    [
        (None, (), ()),
        ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}, (), ()),
        ({"type": "BertProcessing", "sep": ["s", 1], "cls": ["c", 2]}, (2,), (1,)),
        (
            {
                "type": "Sequence",
                "processors": [
                    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
                    {
                        "type": "TemplateProcessing",
                        "single": [
                            {"SpecialToken": {"id": "b", "type_id": 0}},
                            {"Sequence": {"id": "A", "type_id": 0}},
                            {"SpecialToken": {"id": "e", "type_id": 0}},
                        ],
                        "pair": [],
                        "special_tokens": {
                            "b": {"id": "b", "ids": [3], "tokens": ["b"]},
                            "e": {"id": "e", "ids": [4, 5], "tokens": ["e", "e"]},
                        },
                    },
                ],
            },
            (3,),
            (4, 5),
        ),
    ],
)
def test_what_is_put_around_a_text(
    post_processor: object, prefix: tuple[int, ...], suffix: tuple[int, ...], model: Path
) -> None:
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": post_processor}))
    assert load_tokenizer(model).frame == Frame(prefix, suffix)


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
@pytest.mark.parametrize("family", ["qwen2", "llama3"])
def test_flags_decide_what_is_put_around_a_text_and_unset_ones_leave_it(
    bos: bool | None, eos: bool | None, family: str, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path, family)
    config = tmp_path / "tokenizer_config.json"
    flags = {"add_bos_token": bos, "add_eos_token": eos}
    config.write_text(json.dumps(json.loads(config.read_text()) | flags))
    # What transformers does with flags given as arguments, an unset one filled in.
    unset = {"add_bos_token": family == "llama3", "add_eos_token": False}
    given = {name: unset[name] if flag is None else flag for name, flag in flags.items()}
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path, **given)
    ours = load_tokenizer(tmp_path)
    assert ours.frame.around(ours.encoding.encode("Hi")) == theirs.encode("Hi")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"add_bos_token": "yes"}, "no true or false"),
        ({"add_bos_token": True, "bos_token": "<nowhere>"}, "<nowhere>"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(
    change: dict[str, Any], reason: str, model: Path
) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps(change))
    with pytest.raises(TokenizerFileError, match=reason):
        load_tokenizer(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("whole", [True, False])
def test_deeply_nested_files_are_refused(name: str, whole: bool, model: Path) -> None:
    deep = "[" * 200_000 + "]" * 200_000
    text = deep if whole else '{"model": ' + deep + ', "chat_template": ' + deep + "}"
    (model / name).write_text(text)
    with pytest.raises(TokenizerFileError, match=r"deep|cannot be read"):
        load_tokenizer(model)
    with pytest.raises(ValueError, match=f"^{name} cannot be read"):
        tokenizer_fingerprint(model)


def test_deeply_nested_steps_are_refused(model: Path) -> None:
    step: dict[str, Any] = {"type": "ByteLevel"}
    for _ in range(300):
        step = {"type": "Sequence", "decoders": [step]}
    file = model / "tokenizer.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"decoder": step, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(TokenizerFileError):
        load_tokenizer(model)


def test_every_pattern_takes_every_character(tmp_path: Path) -> None:
    """A pattern that left text between its matches would lose it on tiktoken."""
    train("gpt2").save(str(tmp_path / "tokenizer.json"))
    ranks = write_ranks(tmp_path)
    # Beyond these planes nothing is assigned but tags and private use.
    codes = [*range(0xD800), *range(0xE000, 0x33500), *range(0xE0000, 0xE0200), 0xF0000, 0x10FFFF]
    everything = "".join(map(chr, codes))
    for pattern in PATTERNS:
        encoding = load_tokenizer(ranks, RankFileOptions(pattern)).encoding
        assert decode(encoding.vocabulary, encoding.encode(everything)) == everything
