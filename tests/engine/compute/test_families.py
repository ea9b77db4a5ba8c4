"""Every family's config.json with its fields dropped, nulled, added, moved: the logits are those of
transformers, far beyond windows and original context, or the checkpoint is refused by name."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from nanoinfer_engine.core.batch import BatchRow
from nanoinfer_engine.core.config import CheckpointError, ModelConfig, RopeConfig
from nanoinfer_engine.models import build_model
from nanoinfer_engine.models.families import FAMILIES
from nanoinfer_engine.models.model_config import read_huggingface_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.engine.compute.driver import GREEDY, AllLogits
from tests.engine.tiny_checkpoints import LLAMA3_ROPE, VOCAB_SIZE, make_model

Values = dict[str, Any]
TOKENS = tuple(random.Random(5).choices(range(VOCAB_SIZE), k=110))
KINDS = (
    "llama2",
    "llama3",
    "mistral",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "gpt2",
)
QUICK = 40  # changes of each kind in the quick set; the slow one has all
ABSENT = object()

_LINEAR = {"rope_type": "linear", "factor": 2.0}
_LLAMA3 = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
_SHORT_LLAMA3 = {k: v for k, v in _LLAMA3.items() if k != "original_max_position_embeddings"}
SECTIONS: tuple[Any, ...] = (
    {},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    _LINEAR,
    {**_LINEAR, "rope_theta": 500.0},
    {"type": "linear", "factor": 3.0},
    {"type": "linear", "rope_type": "default", "factor": 3.0},
    _LLAMA3,
    _SHORT_LLAMA3,
    {**_LLAMA3, "rope_theta": 500.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"type": "yarn", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
    {"full_attention": {**_LINEAR, "rope_theta": 500.0}},
    {"full_attention": _LINEAR, "sliding_attention": {**_LINEAR, "rope_theta": 90.0}},
    {"full_attention": None, "sliding_attention": {"type": "linear", "factor": 3.0}},
    {"sliding_attention": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"full_attention": {"rope_type": "yarn", "factor": 4.0}},
    "fast",
)
LAYERS = (
    ["full_attention"] * 3,
    ["sliding_attention", "full_attention", "sliding_attention"],
    ["linear_attention"] * 3,
    ["full_attention"],
    ["full_attention", "sliding_attention"] * 2,
)
# values for fields of every family, those that mean nothing to most of them included
OTHERS: dict[str, tuple[Any, ...]] = {
    "sliding_window": (5, 23, 4096, 0),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 2, 28),
    "layer_types": LAYERS,
    "rms_norm_eps": (1e-3, 1e-5, 1e-6),
    "layer_norm_epsilon": (1e-3, 1e-6),
    "layer_norm_eps": (1e-3,),
    "head_dim": (8, 16, 32),
    "num_key_value_heads": (1, 2, 4),
    "num_attention_heads": (2, 8),
    "hidden_size": (32, 64),
    "attention_bias": (True, False),
    "qkv_bias": (True, False),
    "mlp_bias": (True, False),
    "hidden_act": ("gelu", "gelu_pytorch_tanh", "relu", "swish"),
    "activation_function": ("gelu", "gelu_pytorch_tanh", "relu"),
    "tie_word_embeddings": (True, False),
    "rope_theta": (500.0, 1e6),
    "rope_scaling": SECTIONS,
    "rope_parameters": SECTIONS,
    "partial_rotary_factor": (0.5, 1.0),
    "original_max_position_embeddings": (32, 128),
    "max_position_embeddings": (128, 512),
    "n_positions": (128, 512),
    "n_ctx": (128,),
    "n_inner": (96, 256),
    "scale_attn_weights": (False,),
    "scale_attn_by_inverse_layer_idx": (True,),
    "reorder_and_upcast_attn": (True,),
    "is_causal": (True, False, None),
    "is_decoder": (True, False),
    "is_encoder_decoder": (True,),
    "add_cross_attention": (True,),
    "per_layer_config": ({"0": {"sliding_window": 5}}, {}),
    "attention_chunk_size": (16,),
    "logit_scale": (0.5,),
    "final_logit_softcapping": (5.0,),
    "attention_multiplier": (0.3,),
    "embedding_multiplier": (2.0,),
    "attn_logit_softcapping": (1.0, 0, "much"),
    "hidden_activation": ("gelu", "silu", "relu"),
    "query_pre_attn_scalar": (4, 256, 0),
    "rope_local_base_freq": (90.0, 1e5),
    "sliding_window_pattern": (1, 2, 3, 0),
    "use_bidirectional_attention": (True, False),
    "attention_dropout": (0.5,),
    "pretraining_tp": (2,),
    "chunk_size_feed_forward": (8,),
    "vocab_size": (300,),
    "num_hidden_layers": (2, 4),
    "architectures": (["SomethingForCausalLM"], None),
    "dtype": ("bfloat16",),
    "torch_dtype": ("float16",),
}


class Original(NamedTuple):
    """A checkpoint's description and its tensors."""

    values: Values
    state: dict[str, torch.Tensor]
    directory: Path


def kept(values: Values) -> Values:
    """Without what is to be absent."""
    return {name: value for name, value in values.items() if value is not ABSENT}


def older(values: Values) -> Values:
    """The spelling of transformers 4: rope_theta and rope_scaling beside one another."""
    section = dict(values.get("rope_parameters") or {})
    local = {}
    if "full_attention" in section:
        local = {"rope_local_base_freq": section["sliding_attention"]["rope_theta"]}
        section = dict(section["full_attention"])
    theta = section.pop("rope_theta", ABSENT)
    scaling = section if section.get("rope_type", "default") != "default" else None
    rope = {"rope_parameters": ABSENT, "rope_theta": theta, "rope_scaling": scaling}
    return kept({**values, **rope, **local})


def changes(values: Values) -> Iterator[Values]:
    """Each field dropped, nulled, given another value; fields that belong together in all ways."""
    names = sorted({*values, *OTHERS} - {"model_type"})
    for name in names:
        yield {**values, name: ABSENT}
        yield {**values, name: None}
        for value in OTHERS.get(name, ()):
            yield {**values, name: value}
    if not FAMILIES[values["model_type"]].rope_kinds:
        yield from renamed(values)
        return
    for scaling, parameters, theta, original in itertools.product(
        (ABSENT, None, *SECTIONS), (ABSENT, *SECTIONS), (ABSENT, 500.0), (ABSENT, 32)
    ):
        rope = {"rope_scaling": scaling, "rope_parameters": parameters}
        yield {
            **values,
            **rope,
            "rope_theta": theta,
            "original_max_position_embeddings": original,
        }
    for window, used, first, kinds in itertools.product(
        (ABSENT, None, 9), (ABSENT, True, False), (ABSENT, 1, 28), (ABSENT, None, *LAYERS)
    ):
        own = {"sliding_window": window, "use_sliding_window": used}
        yield {**values, **own, "max_window_layers": first, "layer_types": kinds}


def renamed(values: Values) -> Iterator[Values]:
    """Fields under their other names, beside the proper ones and alone."""
    for alias, name in FAMILIES[values["model_type"]].aliases.items():
        for value in (values[name], 2 * values[name]):
            yield {**values, alias: value}
            yield {**values, alias: value, name: ABSENT}


def all_changes(values: Values) -> list[Values]:
    """In both spellings, each once."""
    both = [*changes(values), *changes(older(values))]
    return list({json.dumps(kept(each), sort_keys=True): kept(each) for each in both}.values())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Many tiny products: threads that wait for one another on a busy machine cost ten times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Original]:
    return {kind: original(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def original(kind: str, directory: Path) -> Original:
    model = make_model(kind)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.01)  # so small that a norm's epsilon counts
    model.save_pretrained(directory)
    values = json.loads((directory / "config.json").read_text())
    return Original(values, model.state_dict(), directory)


def reference(made: Original, values: Values) -> torch.Tensor | None:
    """The logits of transformers; None where it refuses the configuration."""
    try:
        # a copy: the class writes its defaults into the sections that it is given
        config = CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception:  # there are many ways to refuse
        return None
    model.load_state_dict(made.state, strict=True)
    try:
        with torch.inference_mode():
            return model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    except Exception:
        return None


class Ours:
    """Our logits by configuration: many changes have the same."""

    def __init__(self, made: Original) -> None:
        self._directory = made.directory
        self._known: dict[ModelConfig, torch.Tensor] = {}

    def __call__(self, values: Values) -> torch.Tensor:
        (self._directory / "config.json").write_text(json.dumps(values))
        config = read_huggingface_config(self._directory)
        if config not in self._known:
            row = BatchRow(TOKENS, 0, tuple(range(14)), True, GREEDY)
            self._known[config] = AllLogits(self._directory).step([row])[0]
        return self._known[config]


def compare(made: Original, wanted: list[Values]) -> tuple[int, int]:
    """Assert that no logits differ; how many were compared, how many refused here."""
    ours, num_compared, num_refused = Ours(made), 0, 0
    for values in wanted:
        changed = {k: values.get(k, "absent") for k in {*values, *made.values}}
        changed = {k: v for k, v in changed.items() if v != made.values.get(k, "absent")}
        try:
            actual = ours(values)
        except CheckpointError:
            num_refused += 1
            continue
        expected = reference(made, values)
        if expected is None:
            continue
        error = (actual - expected).abs().max().item() / expected.std().item()
        assert error < 1e-3, f"{changed} changes the logits by {error:.3g} standard deviations"
        num_compared += 1
    return num_compared, num_refused


KNOWN: tuple[tuple[str, Values, Values], ...] = (
    # kind, change, what our configuration must be; each was read wrongly or refused once
    ("llama2", {"sliding_window": 5}, {"sliding_windows": (None,) * 3}),
    ("llama2", {"layer_types": LAYERS[1], "sliding_window": 5}, {"sliding_windows": (None,) * 3}),
    ("phi3", {"layer_types": LAYERS[1]}, {"sliding_windows": (40,) * 3}),
    ("phi3", {"rms_norm_eps": ABSENT}, {"norm_eps": 1e-5}),
    ("llama2", {"rms_norm_eps": ABSENT}, {"norm_eps": 1e-6}),
    ("mistral", {"sliding_window": ABSENT}, {"sliding_windows": (4096,) * 3}),
    ("mistral", {"sliding_window": None}, {"sliding_windows": (None,) * 3}),
    ("mistral", {"attention_bias": True}, {"qkv_bias": False}),
    ("qwen2", {"attention_bias": True}, {"qkv_bias": True, "output_bias": False}),
    ("qwen2_window", {"layer_types": ABSENT}, {"sliding_windows": (None, 13, 13)}),
    ("qwen2_window", {"layer_types": LAYERS[1]}, {"sliding_windows": (13, None, 13)}),
    ("llama2", {"rope_scaling": _LINEAR}, {"rope": RopeConfig(10_000.0, "linear", 2.0)}),
    (
        "llama3",
        {"original_max_position_embeddings": 32},
        {"rope": RopeConfig(10_000.0, "llama3", 4.0, 1.0, 4.0, 32)},
    ),
    (
        "llama3",
        {"rope_parameters": _SHORT_LLAMA3, "rope_theta": 500.0},
        {"rope": RopeConfig(500.0, "llama3", 4.0, 1.0, 4.0, 256)},
    ),
    ("gemma2", {"layer_types": ABSENT}, {"sliding_windows": (11, None) * 2}),
    (
        "gemma2",
        {"layer_types": ABSENT, "sliding_window_pattern": 3},
        {"sliding_windows": (11, None) * 2},
    ),
    ("gemma2", {"hidden_act": "relu"}, {"activation": "gelu_tanh"}),
    ("gemma2", {"attn_logit_softcapping": ABSENT}, {"attention_softcap": 50.0}),
    ("gemma2", {"attn_logit_softcapping": None}, {"attention_softcap": None}),
    ("gemma3", {"layer_types": ABSENT}, {"sliding_windows": (11,) * 4}),
    (
        "gemma3",
        {"layer_types": ABSENT, "sliding_window_pattern": 3},
        {"sliding_windows": (11, 11, None, 11)},
    ),
    ("gemma3", {"attn_logit_softcapping": 1.0}, {"attention_softcap": None}),
    ("gemma3", {"final_logit_softcapping": 2.0}, {"logit_softcap": 2.0}),
    (
        "gemma3",
        {"rope_parameters": ABSENT},
        {"rope": RopeConfig(1e6), "local_rope": RopeConfig(1e4)},
    ),
    (
        "gemma3",
        {
            "rope_parameters": ABSENT,
            "rope_theta": 3000.0,
            "rope_local_base_freq": 90.0,
            "rope_scaling": _LINEAR,
        },
        {"rope": RopeConfig(3000.0, "linear", 2.0), "local_rope": RopeConfig(90.0)},
    ),
    ("gpt2", {"n_embd": ABSENT, "hidden_size": 64}, {"hidden_size": 64}),
    ("gpt2", {"sliding_window": 5}, {"sliding_windows": (None,) * 3}),
)


@pytest.mark.parametrize(("kind", "change", "expected"), KNOWN)
def test_what_a_family_reads_and_its_own_defaults(
    kind: str, change: Values, expected: Values, originals: dict[str, Original]
) -> None:
    made = originals[kind]
    values = kept({**made.values, **change})
    assert compare(made, [values]) == (1, 0)
    config = read_huggingface_config(made.directory)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("llama2", {"is_causal": False}, "is_causal is False"),
        ("gpt2", {"is_causal": None}, "is_causal is None"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ("phi3", {"rope_scaling": _LINEAR}, "rope_type is 'linear'"),
        ("phi3", {"rope_scaling": {"type": "su"}}, "type is 'su'"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
        (
            "llama2",
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": _LINEAR},
            "rope_scaling: rope_theta is 10000.0, but rope_parameters, which rope_scaling replaces",
        ),
        ("llama2", {"per_layer_config": {"0": {}}}, "per_layer_config"),
        ("llama2", {"rms_norm_eps": None}, "rms_norm_eps is None"),
        ("gpt2", {"hidden_size": 32}, "n_embd says another"),
        ("gemma2", {"rope_parameters": {"full_attention": {}}}, "per kind of layer"),
        ("gemma2", {"sliding_window": None}, "sliding_window is None"),
        ("gemma3", {"layer_types": ABSENT, "sliding_window": None}, "sliding_window is None"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "object of full_attention"),
        ("gemma3", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ("gemma3", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    kind: str, change: Values, said: str, originals: dict[str, Original]
) -> None:
    made = originals[kind]
    with pytest.raises(CheckpointError, match=re.escape(said)):
        Ours(made)(kept({**made.values, **change}))


def test_norms_with_an_offset_and_embeddings_are_rounded_as_transformers_rounds_them(
    originals: dict[str, Original],
) -> None:
    """1 + weight in float32 whatever is computed with; the embeddings' scale in its format."""
    made = originals["gemma3"]
    values = {**made.values, "hidden_size": 3072}
    (made.directory / "config.json").write_text(json.dumps(values))
    config = read_huggingface_config(made.directory)
    model = build_model(config, 16, torch.bfloat16, torch.device("cpu"))
    assert model.embedding_scale == 55.5  # of 55.4256
    norms = {name: each for name, each in model.named_parameters() if "norm" in name}
    assert len(norms) == 6 * config.num_layers + 1
    assert {each.dtype for each in norms.values()} == {torch.float32}
    (made.directory / "config.json").write_text(json.dumps(made.values))
    stored = made.state["model.layers.1.pre_feedforward_layernorm.weight"]
    loaded = AllLogits(made.directory).model.get_parameter("layers.1.mlp_norm.weight")
    assert torch.equal(loaded, 1 + stored)


def test_fields_without_effect_are_listed(originals: dict[str, Original]) -> None:
    made = originals["llama2"]
    change = {"sliding_window": 5, "logit_scale": 0.5, "pretraining_tp": 1, "use_cache": True}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "beta_fast": 32}
    Ours(made)({**made.values, **change, "rope_parameters": rope})
    unread = read_huggingface_config(made.directory).unread_fields
    assert unread == ("logit_scale", "sliding_window", "rope_parameters.beta_fast")
    Ours(made)(made.values)
    assert read_huggingface_config(made.directory).unread_fields == ()


@cache
def sample(num: int, count: int) -> tuple[int, ...]:
    """`count` places of `num`, the same in every run."""
    return tuple(sorted(random.Random(num).sample(range(num), min(count, num))))


@pytest.mark.matrix("R79")
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_changed_configurations_gives_transformers_logits_or_is_refused(
    kind: str, originals: dict[str, Original]
) -> None:
    made = originals[kind]
    every = all_changes(made.values)
    num_compared, _ = compare(made, [every[i] for i in sample(len(every), QUICK)])
    assert num_compared >= QUICK // 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_every_changed_configuration_gives_transformers_logits_or_is_refused(
    kind: str, originals: dict[str, Original]
) -> None:
    made = originals[kind]
    num_compared, num_refused = compare(made, all_changes(made.values))
    assert num_compared > 30
    assert num_refused > 20
