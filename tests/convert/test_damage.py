"""Damaged checkpoints, through the real commands: refused with a name, and nothing is left or half-loaded."""

from pathlib import Path

from tests.conftest import TINY_SYMBOLS, write_tiny_tokenizer
from tests.ranks import found_by

WORKER = Path(__file__).with_name("damage_worker.py")
UP = "model.layers.1.mlp.up_proj.weight"
WORDS = {
    "missing tensor": [f"1 tensors missing: {UP}"],
    "renamed tensor": [f"1 tensors missing: {UP}", f"upp_proj.weight (did you mean {UP!r}?)"],
    "padded vocabulary": ["model.safetensors: tensor lm_head.weight has shape [304, 32]", "asks for [301, 32]"],
    "padded width": [f"model.safetensors: tensor {UP} has shape [64, 32]", "asks for [48, 32]"],
    "integers": [f"tensor {UP} has dtype I8"],
    "truncated file": ["model.safetensors: not a readable safetensors file (truncated?)"],
    "damaged header": ["model.safetensors: not a readable safetensors file"],
    "truncated shard": ["model-00002-of-", "not a readable safetensors file (truncated?)"],
    "missing shard": ["model-00002-of-", "no such file, although model.safetensors.index.json names it"],
    "misplaced tensor": [f"tensor {UP} is missing"],
    "tied head that differs": [
        "tie_word_embeddings: true, but lm_head.weight",
        "differs from model.embed_tokens.weight",
    ],
    "flipped bit": ["__0_0.distcp: SHA-256 is", "changed or damaged"],
    "flipped bit in the metadata": [".metadata: SHA-256 is"],
    "truncated": [".distcp: expected", "is damaged"],
    "missing file": [".distcp: expected", "found nothing"],
    "renamed": ["decoder.final_layernorm.weight [32] is missing (did you mean 'decoder.final_norm.weight'?)"],
    "one layer more": ["has shape [4, 32]; expected [5, 32]"],
    "another vocabulary, padded alike": [
        "[384, 32] for a vocabulary of 301; expected [384, 32] for a vocabulary of 300"
    ],
    "wider": ["tensor decoder.layers.mlp.linear_fc1.weight has shape [4, 96, 32]; expected [4, 128, 32]"],
    "another model": ["q_layernorm.weight [4, 8] is missing"],
    "again": ["q_layernorm.weight [4, 8] is missing"],
    "by the trainer": ["__0_0.distcp: SHA-256 is"],
}


def test_damage_is_named_and_nothing_is_left(tiny_hf, tmp_path, run_ranks):
    sources = [tiny_hf("llama"), tiny_hf("llama", name="sharded", max_shard_size="50KB")]
    sources += [tiny_hf("qwen2", name="tied", tied=True), tiny_hf("qwen3", name="other")]
    write_tiny_tokenizer(sources[0], TINY_SYMBOLS)  # training reads its prompts before any weights
    (tmp_path / "work").mkdir()
    code, text = run_ranks(1, WORKER, *sources, tmp_path / "work")
    found = found_by(text)
    errors = found["errors"]
    assert errors.pop("whole") == "", "the checkpoint itself is good"
    assert errors.keys() == WORDS.keys()
    for case, words in WORDS.items():
        assert all(w in errors[case] for w in words), (case, errors[case])
    assert found["left"] == ["damaged", "mcore"], "no output, whole or partial, of a conversion that failed"
    after = text.partition("FOUND ")[2]
    assert code == 2 and "SHA-256 is" in after and "Traceback" not in after, "as treepo-mega train says it"
