"""Loading: every layout that is accepted, and every refusal with the name at fault."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nanoinfer_engine.core.batch import Batch, BatchRow
from nanoinfer_engine.core.config import CheckpointError, EngineConfig
from nanoinfer_engine.core.progress import LoadProgress
from nanoinfer_engine.step.runner import ModelRunner
from nanoinfer_engine.weights import checkpoints
from nanoinfer_engine.weights.checkpoints import open_checkpoint
from safetensors.torch import load_file, save_file

from tests.engine.compute.driver import GREEDY, AllLogits, Job, make_runner, run
from tests.engine.tiny_checkpoints import (
    VOCAB_SIZE,
    make_checkpoint,
    make_model,
    nanogpt_checkpoint,
)

TOKENS = tuple(range(3, 50))
ROW = BatchRow(TOKENS, 0, tuple(range(6)), True, GREEDY)


def logits(path: Path) -> torch.Tensor:
    return AllLogits(path).step([ROW])[0]


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return make_checkpoint("qwen3", tmp_path / "model")


def test_shards_are_read_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model("llama2").save_pretrained(tmp_path, max_shard_size="100KB")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    opened: list[str] = []
    original = checkpoints.safe_open

    def spy(path: Path, **arguments: Any) -> Any:
        opened.append(path.name)
        return original(path, **arguments)

    monkeypatch.setattr(checkpoints, "safe_open", spy)
    calls: list[LoadProgress] = []
    ModelRunner(EngineConfig(model_path=tmp_path), calls.append)
    assert opened == files * 2  # every header, then every file's tensors
    shards = [call.shard for call in calls]
    assert shards == sorted(shards)
    assert set(shards) == set(range(1, len(files) + 1))
    assert {call.num_shards for call in calls} == {len(files)}


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_shards_give_the_same_model_and_fingerprint(tmp_path: Path) -> None:
    single = make_checkpoint("llama2", tmp_path / "single")
    make_model("llama2").save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(logits(single), logits(tmp_path / "sharded"))
    one, other = make_runner(single), make_runner(tmp_path / "sharded")
    assert one.weights_fingerprint == other.weights_fingerprint
    assert len(bytes.fromhex(one.weights_fingerprint)) == 32


def test_fingerprint_tells_weights_apart(qwen3: Path) -> None:
    seen = {make_runner(qwen3).weights_fingerprint}
    for row in (0, 128, 255):  # start, middle and end of a tensor larger than its samples
        edit_tensors(
            qwen3, lambda tensors, row=row: tensors["model.embed_tokens.weight"][row].neg_()
        )  # type: ignore[misc]
        seen.add(make_runner(qwen3).weights_fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_nanogpt_file(tmp_path: Path, bias: bool, compiled: bool) -> None:
    saved = nanogpt_checkpoint(compiled=compiled, bias=bias)
    torch.save(saved, tmp_path / "ckpt.pt")
    arguments = saved["model_args"]
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=arguments["block_size"],
            n_embd=arguments["n_embd"],
            n_layer=arguments["n_layer"],
            n_head=arguments["n_head"],
            activation_function="gelu",
        )
    ).eval()
    state = {name: torch.zeros_like(value) for name, value in reference.state_dict().items()}
    for name, value in saved["model"].items():
        plain = name.removeprefix("_orig_mod.")
        linear = value.ndim == 2 and ".h." in plain
        state[plain] = value.t() if linear else value
    reference.load_state_dict(state)
    with torch.inference_mode():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    assert (logits(tmp_path / "ckpt.pt") - expected).abs().max().item() <= 1e-4


def test_nanogpt_arguments_under_config_and_legacy_file_format(tmp_path: Path) -> None:
    saved = nanogpt_checkpoint()
    path = make_checkpoint("nanogpt", tmp_path)
    renamed = {"model": saved["model"], "config": saved["model_args"]}
    torch.save(renamed, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(logits(tmp_path / "old.pt"), logits(path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_dtype_is_converted(qwen3: Path, dtype: torch.dtype) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    before = logits(qwen3)
    edit_tensors(qwen3, convert)
    assert (logits(qwen3) - before).abs().max().item() < 0.3


def test_names_without_the_model_prefix_and_repeated_tied_head(qwen3: Path) -> None:
    before = logits(qwen3)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(plain)
        tensors["lm_head.weight"] = plain["embed_tokens.weight"].clone()
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edit_tensors(qwen3, rename)
    assert torch.equal(logits(qwen3), before)


def test_rope_in_the_older_spelling(tmp_path: Path) -> None:
    directory = make_checkpoint("llama3", tmp_path / "model")
    before = logits(directory)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope
    path.write_text(json.dumps(values))
    assert torch.equal(logits(directory), before)


def test_max_window_layers_without_layer_types(tmp_path: Path) -> None:
    directory = make_checkpoint("qwen2_window", tmp_path / "model")
    assert open_checkpoint(directory).config.sliding_windows == (None, 13, 13)
    edit_config(directory, layer_types=None)
    assert open_checkpoint(directory).config.sliding_windows == (None, 13, 13)
    edit_config(directory, use_sliding_window=False)
    assert open_checkpoint(directory).config.sliding_windows == (None, None, None)


@pytest.mark.matrix("R79")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", "3"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", None),
        ("vocab_size", 2**40),
        ("hidden_size", 2.5),
        ("hidden_size", -64),
        ("intermediate_size", 0),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 31),
        ("max_position_embeddings", -5),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "small"),
        ("hidden_act", "relu"),
        ("attention_bias", "yes"),
        ("tie_word_embeddings", 1),
        ("model_type", "mamba"),
        ("model_type", None),
        ("quantization_config", {"bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["linear_attention"] * 3),
        ("layer_types", [["full_attention"]] * 3),
        ("sliding_window is None", None),
        ("sliding_window", -2),
        ("rope_parameters", "fast"),
    ],
)
def test_nonsense_configuration_names_the_field(qwen3: Path, field: str, value: object) -> None:
    if field == "sliding_window":
        edit_config(qwen3, use_sliding_window=True)
    if field == "sliding_window is None":
        edit_config(qwen3, layer_types=["sliding_attention"] * 3)
    else:
        edit_config(qwen3, **{field: value})
    (qwen3 / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=field):
        open_checkpoint(qwen3)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "rope_type is 'yarn'"),
        ({"rope_type": "longrope"}, "rope_type is 'longrope'"),
        ({"type": "dynamic", "factor": 2.0}, "type is 'dynamic'"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": -1}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        (
            {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1},
            "high_freq_factor",
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.4}, "partial_rotary_factor"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"full_attention": {"rope_type": "yarn"}}, "full_attention"),
    ],
)
def test_rope_that_cannot_be_computed_is_refused(
    qwen3: Path, rope: dict[str, object], named: str
) -> None:
    edit_config(qwen3, rope_parameters=None, rope_scaling=rope)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(qwen3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", -1),
        ("n_embd", 62),
        ("n_head", 0),
        ("n_positions", None),
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_gpt2_configuration_that_cannot_be_computed(
    tmp_path: Path, field: str, value: object
) -> None:
    directory = make_checkpoint("gpt2", tmp_path / "model")
    edit_config(directory, **{field: value})
    with pytest.raises(CheckpointError, match=field):
        open_checkpoint(directory)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000])
def test_config_that_is_no_json_object(qwen3: Path, content: str) -> None:
    (qwen3 / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(qwen3)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.matrix("R78")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(K_PROJ), rf"{K_PROJ[6:]}: missing"),
        (drop("model.embed_tokens.weight"), r"embed_tokens\.weight: missing"),
        (drop("model.layers.2.self_attn.q_norm.weight"), r"q_norm\.weight: missing"),
        (put("model.extra.weight", torch.zeros(2)), r"model\.extra\.weight: not a tensor"),
        (put("model.layers.3.mlp.up_proj.weight", torch.zeros(2)), r"layers\.3\.mlp\.up_proj"),
        (put("model.layers.0.self_attn.q_proj.bias", torch.zeros(128)), r"q_proj\.bias: not a"),
        (put(K_PROJ, torch.zeros(64, 63)), rf"{K_PROJ}: shape \[64, 63\].*\[64, 64\]"),
        (put(K_PROJ, torch.zeros(64 * 64)), rf"{K_PROJ}: shape"),
        (put(K_PROJ, torch.zeros(64, 64, dtype=torch.int8)), rf"{K_PROJ}: dtype I8"),
        (put("norm.weight", torch.zeros(64)), r"stored twice"),
        (put("lm_head.weight", torch.zeros(VOCAB_SIZE, 64)), r"lm_head\.weight: differs"),
        (put("lm_head.weight", torch.zeros(3)), r"lm_head\.weight: differs"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    qwen3: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_tensors(qwen3, edit)
    with pytest.raises(CheckpointError, match=message):
        make_runner(qwen3)


def truncated(data: bytes) -> bytes:
    return data[:-100]


def huge_header(data: bytes) -> bytes:
    return (2**40).to_bytes(8, "little") + data[8:]


def offsets_beyond_the_file(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(each for each in header if each != "__metadata__")
    header[name]["data_offsets"][1] += 2**40
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


@pytest.mark.matrix("R78")
@pytest.mark.parametrize(
    "damage", [truncated, huge_header, offsets_beyond_the_file, lambda data: b"", lambda _: b"{}"]
)
def test_damaged_file_is_named(qwen3: Path, damage: Callable[[bytes], bytes]) -> None:
    path = qwen3 / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        make_runner(qwen3)


@pytest.mark.matrix("R79")
@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "OUTSIDE", "a\\b.safetensors", "model.bin", "", 7]
)
def test_shard_index_cannot_leave_the_directory(qwen3: Path, shard: object) -> None:
    shutil.copytree(qwen3, qwen3.parent / "other")
    if shard == "OUTSIDE":
        shard = str(qwen3.parent / "other" / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (qwen3 / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in .* not a .safetensors"):
        open_checkpoint(qwen3)


def test_shard_index_that_lies(qwen3: Path) -> None:
    index = qwen3 / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x.weight": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"x\.weight is in none"):
        open_checkpoint(qwen3)
    index.write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        open_checkpoint(qwen3)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(qwen3)
    shutil.copy(qwen3 / "model.safetensors", qwen3 / "copy.safetensors")
    both = {"a": "model.safetensors", "b": "copy.safetensors"}
    index.write_text(json.dumps({"weight_map": both}))
    with pytest.raises(CheckpointError, match="already in another file"):
        open_checkpoint(qwen3)


def test_directories_without_one_clear_set_of_weights(qwen3: Path, tmp_path: Path) -> None:
    (qwen3 / "model.safetensors").rename(qwen3 / "renamed.safetensors")
    assert open_checkpoint(qwen3).shapes["model.norm.weight"] == (64,)
    shutil.copy(qwen3 / "renamed.safetensors", qwen3 / "second.safetensors")
    with pytest.raises(CheckpointError, match="several"):
        open_checkpoint(qwen3)
    for path in qwen3.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        open_checkpoint(qwen3)
    with pytest.raises(CheckpointError, match="absent: no such file or directory"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "model.onnx").write_text("")
    with pytest.raises(CheckpointError, match="neither a model directory"):
        open_checkpoint(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("config.json", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("x.gguf", "GGUF", "GGUF is not supported"),
        ("pytorch_model.bin", "", "save_pretrained"),
    ],
)
def test_weights_of_another_kind_say_what_to_do(
    qwen3: Path, file: str, content: str, said: str
) -> None:
    if not file.endswith((".safetensors", ".json")):
        (qwen3 / "model.safetensors").unlink()
    (qwen3 / file).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(qwen3)


def test_a_byte_order_mark_in_the_configuration_changes_nothing(qwen3: Path) -> None:
    before = open_checkpoint(qwen3).config
    text = (qwen3 / "config.json").read_text(encoding="utf-8")
    (qwen3 / "config.json").write_text(text, encoding="utf-8-sig")
    assert open_checkpoint(qwen3).config == before


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["NANOINFER_TEST_CANARY"],)


@pytest.mark.matrix("R77")
def test_pickle_that_runs_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    monkeypatch.setenv("NANOINFER_TEST_CANARY", str(canary))
    torch.save({"model_args": Malicious(), "model": {}}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"model": Malicious()}))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(tmp_path / name)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("model_args"), "model_args"),
        (lambda saved: saved.update(model_args=None), "model_args"),
        (lambda saved: saved.pop("model"), "no model state"),
        (lambda saved: saved["model"].update(x=3), "'x' is no tensor"),
        (lambda saved: saved["model_args"].pop("n_layer"), "n_layer"),
        (lambda saved: saved["model_args"].update(n_layer=-2), "n_layer"),
        (lambda saved: saved["model_args"].update(n_layer=3), r"h\.2\.ln_1\.weight: missing"),
        (lambda saved: saved["model_args"].update(bias=True), r"bias: missing"),
        (lambda saved: saved["model"].pop("_orig_mod.transformer.wpe.weight"), r"wpe\.weight"),
        (
            lambda saved: saved["model"].update(
                {"_orig_mod.transformer.wpe.weight": torch.zeros(256, 64, dtype=torch.int32)}
            ),
            r"wpe\.weight: .*int32 is not a float",
        ),
    ],
)
def test_nanogpt_file_that_does_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    saved = nanogpt_checkpoint()
    change(saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=message):
        make_runner(tmp_path / "ckpt.pt")


def test_truncated_pt_file(tmp_path: Path) -> None:
    path = make_checkpoint("nanogpt", tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
        open_checkpoint(path)


def test_runner_refuses_settings_that_contradict_the_model(qwen3: Path) -> None:
    for settings, message in (
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"max_model_len": 257}, "max_model_len 257"),
        ({"max_model_len": 0}, "max_model_len 0"),
        ({"kv_cache_bytes": 100}, "kv_cache_bytes 100"),
        ({"block_size": 0}, "block_size 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_runner(qwen3, **settings)


def test_runner_describes_itself_and_reports_progress(qwen3: Path) -> None:
    calls: list[LoadProgress] = []
    config = make_runner(qwen3)._config
    runner = ModelRunner(config, calls.append)
    expected = sum(parameter.numel() for parameter in make_model("qwen3").parameters())
    assert runner.num_parameters == expected
    assert calls[0] == LoadProgress(0, 4 * expected, 1, 1)
    assert calls[-1] == LoadProgress(4 * expected, 4 * expected, 1, 1)
    loaded = [call.num_bytes for call in calls]
    assert loaded == sorted(set(loaded))
    assert runner.vocab_size == VOCAB_SIZE
    assert runner.max_model_len == 256
    assert runner.block_size == 8
    # 4 MiB over 3 layers of K and V, 8 tokens, 2 heads of 32, 4 bytes
    assert runner.num_blocks == (4 << 20) // (3 * 2 * 8 * 2 * 32 * 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs_close_to_float32(qwen3: Path, dtype: str) -> None:
    job, precise = Job(list(TOKENS), 4), Job(list(TOKENS), 4)
    run(make_runner(qwen3, dtype=dtype), [job])
    run(make_runner(qwen3), [precise])
    assert job.output[0].token_id == precise.output[0].token_id


def test_warm_up_leaves_no_trace(qwen3: Path) -> None:
    cold, warm = make_runner(qwen3), make_runner(qwen3, max_batch_requests=8)
    assert warm.warm_up() > 0
    jobs = [Job(list(TOKENS), 12), Job(list(TOKENS), 12)]
    run(cold, jobs[:1])
    run(warm, jobs[1:])
    assert jobs[0].tokens == jobs[1].tokens


def test_what_a_former_owner_left_in_a_block_reaches_nobody(qwen3: Path) -> None:
    clean, poisoned = make_runner(qwen3), make_runner(qwen3)
    poisoned._cache._storage.fill_(float("nan"))
    jobs = [Job(list(TOKENS), 30, chunk=9), Job(list(TOKENS), 30, chunk=9)]
    run(clean, jobs[:1])
    run(poisoned, jobs[1:])
    assert jobs[0].tokens == jobs[1].tokens


def test_execution_with_bad_row_leaves_the_others(qwen3: Path) -> None:
    """A mask outside the vocabulary is that row's error; its neighbour samples as if alone."""
    runner = make_runner(qwen3)
    good = BatchRow(TOKENS, 0, tuple(range(6)), True, GREEDY)
    bad = BatchRow(TOKENS, 0, tuple(range(6, 12)), True, GREEDY, frozenset({10**6}))
    (expected,) = runner.launch(Batch((good,))).results()
    results = runner.launch(Batch((bad, good))).results()
    assert isinstance(results[0], Exception)
    assert results[1] == expected
