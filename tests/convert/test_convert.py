"""The converters as a user runs them: any layout in, any layout out, bit-equal, and nothing left after an error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.ranks import found_by
from tests.reshard.bugs import BUGS
from tests.reshard.models import write_qwen2
from treepo_mega.checkpoint.hf import HfCheckpointError
from treepo_mega.checkpoint.mcore import CheckpointError
from treepo_mega.config import ConfigError
from treepo_mega.convert.convert import companions_of, conversion_config, hf_to_mcore, mcore_to_hf, stored_dtype
from treepo_mega.runtime.files import OutputExistsError

REPO = Path(__file__).resolve().parents[2]
TO_MCORE = REPO / "tools" / "convert_hf_to_mcore.py"
TO_OTHER = REPO / "tools" / "convert_mcore_to_mcore.py"
CONVERT = (REPO / "treepo_mega" / "cli.py", "convert")
"""What `python -m treepo_mega.cli convert` runs."""


def layout(tp=1, pp=1, vpp=None):
    sizes = ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp]
    return sizes + (["--virtual-pipeline-model-parallel-size", vpp] if vpp else [])


def tensors_of(directory):
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize(
    "kind, options, there, back",
    [
        pytest.param("llama", {}, {}, {"tp": 2}, marks=pytest.mark.slow),
        # In the short suite too, although it takes longer than its tests should: the whole path, once.
        ("qwen2", {"tied": True, "dtype": torch.bfloat16}, {"tp": 2, "pp": 2}, {}),
        pytest.param(
            "qwen3", {"max_shard_size": "50KB"}, {"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_round_trip_is_bit_equal_in_any_layout(tiny_hf, tmp_path, run_ranks, kind, options, there, back):
    source, mcore, out = tiny_hf(kind, **options), tmp_path / "mcore", tmp_path / "back"
    (source / "tokenizer.json").write_text("{}")
    ranks = there.get("tp", 1) * there.get("pp", 1)
    code, text = run_ranks(ranks, TO_MCORE, "--hf", source, "--save", mcore, *layout(**there), timeout=240)
    assert code == 0, text
    note = json.loads((mcore / "conversion.json").read_text())
    assert note["verified"] is True
    assert note["max_logit_difference"] <= 1e-4
    memory, parts = note["memory"], there.get("tp", 1) * there.get("pp", 1)
    assert memory["read_mib"] <= memory["of_mib"] * {1: 1, 2: 0.7, 4: 0.6}[parts], "its own slices only"
    assert f"read {memory['read_mib']:.1f} of them" in text and memory["peak_mib"] > memory["shard_mib"]
    assert note["params_dtype"] == ("bf16" if options.get("dtype") else "fp32")
    expected = tensors_of(source)
    assert (note["tensors"], note["parameters"]) == (len(expected), sum(t.numel() for t in expected.values()))

    shards = ["--max-shard-size-mib", 0.05]
    ranks = back.get("tp", 1) * back.get("pp", 1)
    code, text = run_ranks(
        ranks, *CONVERT, "to-hf", "--load", mcore, "--save", out, *layout(**back), *shards, timeout=240
    )
    assert code == 0, text
    found = tensors_of(out)
    assert set(found) == set(expected)
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items())
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    ids = torch.arange(0, 300, 13)[None]
    logits = [AutoModelForCausalLM.from_pretrained(d)(ids).logits for d in (source, out)]
    assert torch.equal(*logits)
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "mcore", "back"}


@pytest.mark.slow
def test_another_layout_without_hf_weights_and_verification_of_what_exists(tiny_hf, tmp_path, run_ranks):
    source = tiny_hf("llama", tied=True)
    code, text = run_ranks(1, TO_MCORE, "--hf", source, "--save", tmp_path / "one", "--no-verify")
    assert code == 0, text
    weights = source / "model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    padding = ["--make-vocab-size-divisible-by", 16]
    arguments = ["--load", tmp_path / "one", "--save", tmp_path / "four", *layout(pp=2), *padding]
    code, text = run_ranks(2, TO_OTHER, *arguments)
    assert code == 0, text
    assert json.loads((tmp_path / "four" / "conversion.json").read_text())["written_by"] == {"tp": 1, "pp": 2}

    weights.write_bytes(kept)
    code, text = run_ranks(1, TO_MCORE, "--hf", source, "--verify", tmp_path / "four")
    assert code == 0, text
    assert "four holds the weights of" in text
    tensors = load_file(weights)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] += 0.01
    tensors["model.layers.3.mlp.up_proj.weight"][3, 3] += 0.01
    save_file(tensors, weights, metadata={"format": "pt"})
    code, text = run_ranks(1, *CONVERT, "verify", "--hf", source, "--load", tmp_path / "four")
    assert code == 2
    assert (
        "2 tensors of the Megatron checkpoint differ from the source, first model.layers.2.mlp.up_proj.weight" in text
    )


@pytest.mark.slow
def test_nothing_appears_when_the_logits_disagree(tiny_hf, tmp_path, run_ranks):
    arguments = ["--hf", tiny_hf("llama"), "--save", tmp_path / "mcore", "--logits-tolerance", -1]
    code, text = run_ranks(1, TO_MCORE, *arguments)
    assert code == 2
    assert "treepo-mega: error: logits of the probe prompt differ from transformers by" in text
    assert "Traceback" not in text
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


FIRST = {  # the first module that diverges for each bug, when the map that reads is also the one that checks
    "K and V swapped": "model.layers.1",
    "biases of K and V swapped": "model.layers.0",
    "a bias of another layer": "model.layers.0",
    "gate and up swapped": "model.layers.0",
    "one TP slice shifted, columns": "model.layers.1",
    "one TP slice shifted, rows": "model.layers.0",
    "heads in another order within a rank": "model.layers.1",
    "output projection of another rank": "model.layers.0",
    "two layers swapped": "model.layers.0",
    "norms of a layer swapped": "model.layers.0",
    "final norm swapped with a layer's": "model.layers.1",
    "halves of the vocabulary swapped": "model.embed_tokens",
}
SPOILT = {
    "norm negated": "model.layers.0",
    "final norm": "model.norm",
    "not a number": "lm_head",
    "rotary base": "model.layers.0",
}


@pytest.mark.slow
def test_verification_sees_every_planted_bug_and_names_the_first_layer(tmp_path, run_ranks):
    (tmp_path / "work").mkdir()
    source = write_qwen2(tmp_path / "hf", 5)
    code, text = run_ranks(2, Path(__file__).with_name("verify_worker.py"), source, tmp_path / "work", timeout=240)
    assert code == 0, text
    found = found_by(text)
    assert found["right"]["read"] == "", "right weights pass"
    assert "the first layer that diverges is model.layers.0" in found["right"]["command"]
    assert found["right"]["left"] == ""
    assert found["read"].keys() == FIRST.keys() == BUGS.keys() and len(BUGS) >= 10
    for bug, first in FIRST.items():
        for kind in ("read", "export"):
            error = found[kind][bug]
            assert "logits of the probe prompt differ" in error and error.endswith(f"diverges is {first}"), (kind, bug)
        error = found["one-sided"][bug]
        assert "differ from the source, first " in error and first in error.partition("first ")[2], (bug, error)
    for case, first in SPOILT.items():
        assert found["spoilt"][case].endswith(f"diverges is {first}"), found["spoilt"]


def test_bad_source_is_refused_before_anything_starts(tiny_hf, tmp_path, monkeypatch):
    # Not `torch.distributed.is_initialized()`: an engine of an earlier test leaves its group to this process.
    started: list[object] = []
    monkeypatch.setattr("treepo_mega.convert.convert.dist.initialize", lambda *a: started.append(a))
    source, name = tiny_hf("llama"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    cfg = conversion_config(source)
    for change, words in [
        ({**tensors, name: torch.zeros(48, 31)}, r"up_proj.weight has shape \[48, 31\]; .* \[48, 32\]"),
        ({k: v for k, v in tensors.items() if k != name}, "1 tensors missing: model.layers.1.mlp.up_proj.weight"),
        ({**tensors, "model.layers.9.mlp.up_proj.weight": tensors[name].clone()}, "1 tensors unexpected"),
    ]:
        save_file(change, source / "model.safetensors")
        with pytest.raises(HfCheckpointError, match=words):
            hf_to_mcore(source, tmp_path / "mcore", cfg)
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}
    assert not started


def test_sizes_that_do_not_fit_are_refused(tiny_hf, tmp_path):
    source = tiny_hf("llama")
    with pytest.raises(ConfigError, match="world size 1 is not a multiple of tensor_model_parallel_size 2"):
        hf_to_mcore(source, tmp_path / "mcore", conversion_config(source, tp=2))
    with pytest.raises(ConfigError, match="num_key_value_heads 2"):
        hf_to_mcore(source, tmp_path / "mcore", conversion_config(source, tp=4))
    with pytest.raises(ConfigError, match="tensor_model_parallel_size"):
        conversion_config(source, tp=0)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="exists already"):
        hf_to_mcore(source, tmp_path / "taken", conversion_config(source))


def test_way_back_needs_a_complete_checkpoint_and_a_config(tiny_hf, tmp_path):
    source = tiny_hf("llama")
    with pytest.raises(CheckpointError, match="--hf"):
        companions_of(tmp_path / "none", None)
    assert companions_of(tmp_path / "none", source) == source
    (tmp_path / "torn").mkdir()
    with pytest.raises(CheckpointError, match=r"no manifest.json"):
        mcore_to_hf(tmp_path / "torn", tmp_path / "out", conversion_config(source))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_says_its_dtype_in_its_note(tmp_path):
    assert stored_dtype(tmp_path) is None
    (tmp_path / "conversion.json").write_text('{"params_dtype": "bf16"}')
    assert stored_dtype(tmp_path) == "bf16"
    (tmp_path / "conversion.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"conversion.json: expected .* choose --params-dtype"):
        stored_dtype(tmp_path)


def test_source_dtype_decides_unless_told(tiny_hf):
    source = tiny_hf("llama", dtype=torch.bfloat16)
    assert conversion_config(source).model.params_dtype == "bf16"
    assert conversion_config(source, params_dtype="fp32").model.params_dtype == "fp32"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    with pytest.raises(ConfigError, match="dtype is 'float16'; choose --params-dtype"):
        conversion_config(source)
