"""Reading checkpoints by slices, writing them whole, and naming what is wrong with them."""

import itertools
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from treepo_mega.checkpoint.hf import HfCheckpointError, HfReader
from treepo_mega.checkpoint.load import fill_local
from treepo_mega.modelspec.mcore_layout import ModelSpec, chunk_layouts, hf_shapes

EMBEDDING = "model.embed_tokens.weight"


def box(shape):
    return tuple((0, n) for n in shape)


def everything(directory):
    spec = ModelSpec.from_hf(directory)
    with HfReader(directory, spec) as reader:
        return {name: reader.read(name, box(shape)) for name, shape in hf_shapes(spec).items()}


def edit(directory, change, file="model.safetensors"):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_reads_slices_of_single_and_sharded_files(tiny_hf, options):
    directory = tiny_hf("llama", **options)
    assert (directory / "model.safetensors.index.json").exists() == bool(options)
    state = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    with HfReader(directory, ModelSpec.from_hf(directory)) as reader:
        part = reader.read("model.layers.2.mlp.down_proj.weight", ((3, 9), (16, 48)), torch.bfloat16)
    assert torch.equal(part, state["model.layers.2.mlp.down_proj.weight"][3:9, 16:48].bfloat16())
    assert all(torch.equal(t, state[n]) for n, t in everything(directory).items())


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that torch hands out while this is on and that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self._seen = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        mine = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in mine:
                self.live += t.nbytes
                self.peak = max(self.peak, self.live)
                weakref.finalize(t, self._gone, t.nbytes)
        return out

    def _gone(self, size):
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_reads_its_own_bytes_once_and_holds_its_shard_and_one_slice(tiny_hf, dtype):
    directory, tp, pp = tiny_hf("llama", max_shard_size="50KB"), 2, 2
    spec, read = ModelSpec.from_hf(directory), 0
    replicated = 0
    for tp_rank, pp_rank in itertools.product(range(tp), range(pp)):
        (layout,) = chunk_layouts(spec, tp=tp, pp=pp, tp_rank=tp_rank, pp_rank=pp_rank)
        blocks = [b for p in layout.values() for b in p.blocks]
        replicated += sum(b.numel for b in blocks if len(b.shape) == 1 and tp_rank)
        with HfReader(directory, spec) as reader, LiveBytes() as memory:
            params = {n: torch.full(p.shape, torch.nan, dtype=dtype) for n, p in layout.items()}
            shard = memory.live
            filled = fill_local(params, layout, reader)
        assert filled == sum(b.numel for b in blocks) * dtype.itemsize
        assert reader.bytes_read == sum(b.numel for b in blocks) * 4, "every byte of its own, once, and no other"
        assert shard == sum(p.nbytes for p in params.values())
        assert memory.peak <= shard + max(b.numel for b in blocks) * 8, "one slice, and its cast"
        assert reader.total_bytes == sum(f.nbytes for f in everything(directory).values())
        assert memory.peak < reader.total_bytes
        read += reader.bytes_read
    assert read == reader.total_bytes + replicated * 4, "norms are read by both tensor-parallel ranks, all else by one"


def test_missing_unexpected_and_misshapen_tensors(tiny_hf):
    directory = tiny_hf("llama")
    original = directory / "model.safetensors"
    saved = original.read_bytes()
    name = "model.layers.1.self_attn.k_proj.weight"

    def misspell(tensors):
        tensors["model.layers.1.self_attn.k_porj.weight"] = tensors.pop(name)

    cases = [
        (lambda t: t.pop(name), ["1 tensors missing", name]),
        (misspell, ["1 tensors missing", f"k_porj.weight (did you mean {name!r}?)"]),
        (lambda t: t.update({name: torch.zeros(16, 31)}), [str(original), name, "[16, 31]", "[16, 32]"]),
        (lambda t: t.update({name: torch.zeros(16, 32, dtype=torch.int8)}), [name, "I8", "BF16"]),
    ]
    for change, words in cases:
        original.write_bytes(saved)
        edit(directory, change)
        with pytest.raises(HfCheckpointError) as e:
            HfReader(directory, ModelSpec.from_hf(directory))
        assert all(w in str(e.value) for w in words), str(e.value)


def test_missing_and_broken_files(tiny_hf):
    directory = tiny_hf("llama", max_shard_size="20KB")
    spec = ModelSpec.from_hf(directory)
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    saved = shard.read_bytes()
    shard.write_bytes(saved[: len(saved) // 2])
    with pytest.raises(HfCheckpointError, match=f"{shard.name}: not a readable safetensors file"):
        HfReader(directory, spec)
    shard.unlink()
    with pytest.raises(HfCheckpointError, match=f"{shard.name}: no such file, although"):
        HfReader(directory, spec)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}}))
    with pytest.raises(HfCheckpointError, match="expected a file name in this directory"):
        HfReader(directory, spec)
    index.write_text("[]")
    with pytest.raises(HfCheckpointError, match="expected a JSON object with a weight_map"):
        HfReader(directory, spec)
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(HfCheckpointError, match=r"found pytorch_model.bin \(convert to safetensors first"):
        HfReader(directory, spec)


def test_tied_head_in_the_file_must_equal_the_embedding(tiny_hf):
    directory = tiny_hf("qwen2", tied=True)
    edit(directory, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    assert "lm_head.weight" not in everything(directory)
    edit(directory, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(HfCheckpointError, match=r"tie_word_embeddings: true, but lm_head.weight"):
        everything(directory)


def test_derived_buffers_of_old_files_are_skipped(tiny_hf):
    directory = tiny_hf("llama")
    edit(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert "model.norm.weight" in everything(directory)
