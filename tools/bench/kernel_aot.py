"""Compile every kernel for Hopper and Blackwell on any machine, and look at what came out.

    reports = [report(v, arch) for v in VARIANTS for arch in ARCHS]

Triton compiles without a GPU, and its wheel brings ptxas and cuobjdump; so registers, spills, shared memory and the
instructions in use are known here, while speed is not. Spills and a fall back to mma.sync are what ruins a kernel, and
they come with harmless-looking edits: `tests/loss/test_triton.py` holds this report against a table in the repository.

Must run in a process that has not set TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from treepo_mega.loss.triton import kernels, rows
from treepo_mega.loss.triton.launch import BM, BN, LOUD, SPLIT_ACCUMULATOR, STAGES, TILES, WARPS

ARCHS = {90: "sm_90a", 100: "sm_100a"}
MAX_REGISTERS, MAX_SHARED = 255, 227 * 1024
"""Per thread, and bytes per thread block: what both architectures have."""
DEPTH = {"fp32": 32, "bf16": 64, "fp8e4nv": 128}


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of a kernel, as the launcher would make it."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Argument -> Triton type; constexpr arguments are in `constants`."""
    constants: dict[str, Any]
    warps: int = WARPS
    stages: int = STAGES
    product: str | None = None
    """Operand type of its matrix product."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the compiler made of a variant."""

    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    """Stored plus loaded, per thread."""
    shared_bytes: int
    tensor_memory: int
    """Columns of Blackwell's tensor memory."""
    matrix: dict[str, int]
    """Matrix instructions in PTX, and how many."""
    tma_loads: int
    mix: dict[str, int]
    """SASS instructions by kind."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


POINTERS = {"a_scale": "*fp32", "b_scale": "*fp32", "column": "*i32", "given": "*fp32"}
ALIGNED_STRIDES = ("x_stride", "out_stride", "dz_stride")
SIZES = {"T": "i32", "V": "i32", "K": "i32", "blocks": "i32", "inv_temperature": "fp32"}


def _product(name: str, kernel: Any, dtype: str, types: dict[str, str], *, loud: bool, **constants: Any) -> Variant:
    depth = DEPTH[dtype]
    tiles = {"BM": BM, "BN": BN, "BK": depth, "PRECISION": "ieee"}
    tiles["IMPRECISE"] = SPLIT_ACCUMULATOR if dtype == "fp8e4nv" else 0
    descriptors = {"a_desc": f"tensordesc<{dtype}[{BM}, {depth}]>", "b_desc": f"tensordesc<{dtype}[{BN}, {depth}]>"}
    kind, width = ("bf16", LOUD) if loud else (dtype, depth)
    descriptors |= {"a_loud": f"tensordesc<{kind}[{BM}, {width}]>", "b_loud": f"tensordesc<{kind}[{BN}, {width}]>"}
    tiles["LOUD"] = loud
    return Variant(name, kernel, descriptors | POINTERS | SIZES | types, tiles | constants, product=dtype)


OPERANDS = (
    ("bf16", "bf16", 0, False),
    ("fp8-tensorwise", "fp8e4nv", 0, True),
    ("fp8-rowwise", "fp8e4nv", 1, True),
    ("fp8-blockwise", "fp8e4nv", 2, True),
    ("fp8-tensorwise-quiet", "fp8e4nv", 0, False),
    ("fp8-rowwise-quiet", "fp8e4nv", 1, False),
    ("fp8-blockwise-quiet", "fp8e4nv", 2, False),
)
"""(name, Triton type, mode, loud channels in bf16?): all that `loss` can ask of the kernels; fp32 runs in torch."""


def _variants() -> list[Variant]:
    forward = {"partial": "*fp32", "splits": "i32"}
    vectors = dict.fromkeys(("lse", "entropy", "g_logp", "g_entropy", "dz_scale"), "*fp32")
    backward = vectors | {"first": "i32", "dz_stride": "i32"}
    out = []
    for label, dtype, mode, loud in OPERANDS:
        kind = {"loud": loud, "MODE": mode}
        out.append(_product(f"forward-{label}", kernels.forward_kernel, dtype, forward, TILES=TILES, **kind))
        # With an entropy term the kernel carries one more vector, and needs most registers.
        for name, entropy in ((f"dlogits-{label}", False), (f"dlogits-{label}-entropy", True)):
            kind |= {"ENTROPY": entropy, "ROW_SCALE": False}
            out.append(_product(name, kernels.dlogits_kernel, dtype, backward | {"dz": "*bf16"}, **kind))
    everything = {"loud": True, "MODE": 1, "ENTROPY": True, "ROW_SCALE": True}
    e5m2 = backward | {"dz": "*fp8e5"}
    out.append(_product("dlogits-fp8-rowwise-entropy-e5m2", kernels.dlogits_kernel, "fp8e4nv", e5m2, **everything))
    return out + _row_variants()


def _row_variants() -> list[Variant]:
    ints = dict.fromkeys(("N", "K", "x_stride", "out_stride", "row_stride", "block_stride", "blocks"), "i32")

    def of(kernel: Any, name: str, types: dict[str, str], **constants: Any) -> Variant:
        known = {k: v for k, v in (ints | types).items() if k in kernel.arg_names}
        return Variant(name, kernel, known, constants, warps=4, stages=3)

    arrays = ("logp", "entropy", "old", "weight", "ref", "A_pos", "A_neg", "n", "slope", "parts")
    numbers = ("low", "high", "dual", "kl_coef", "entropy_coef")
    policy = dict.fromkeys(arrays, "*fp32") | dict.fromkeys(numbers, "fp32") | {"T": "i32", "programs": "i32"}
    combine = dict.fromkeys(("partial", "given", "peak", "sums"), "*fp32")
    combine |= {"column": "*i32", "T": "i32", "splits": "i32"}
    cast = {"x": "*bf16", "out": "*fp8e4nv", "factor": "*fp32"}
    return [
        of(rows.amax_kernel, "quantise-amax", {"x": "*bf16", "amax": "*fp32"}, BM=32, BLOCK=128),
        of(rows.cast_kernel, "quantise-cast", cast, SHARED_ROWS=1, LARGEST=448.0, BM=32, BLOCK=128),
        of(rows.combine_kernel, "combine", combine, BM=256),
        of(rows.policy_kernel, "policy", policy, KL=3, BM=256),
        of(rows.policy_kernel, "policy-k2", policy, KL=2, BM=256),
        of(rows.policy_kernel, "policy-k1", policy, KL=1, BM=256),
        of(rows.policy_kernel, "policy-no-kl", policy, KL=0, BM=256),
    ]


VARIANTS = _variants()


def compile_variant(v: Variant, capability: int) -> Any:
    """Triton's compiled kernel for compute capability 90 or 100."""
    names = v.kernel.arg_names
    missing = [n for n in names if n not in v.types and n not in v.constants]
    if missing:
        raise ValueError(f"variant {v.name} has no type for {missing}")
    signature = {n: "constexpr" if n in v.constants else v.types[n] for n in names}
    # Pointers and row strides are multiples of 16 bytes, as torch's allocator and the launcher make them.
    aligned = [n for n in names if signature[n].startswith("*") or n in ALIGNED_STRIDES]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(v.kernel, signature, {(names.index(k),): x for k, x in v.constants.items()}, attributes)
    options = {"num_warps": v.warps, "num_stages": v.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def _assemble(ptx: str, capability: int) -> tuple[str, str]:
    """(what ptxas says about registers and spills, the SASS)."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as tmp:
        path, cubin = Path(tmp) / "kernel.ptx", Path(tmp) / "kernel.cubin"
        path.write_text(ptx)
        said = _run(ptxas, "-v", f"-arch={ARCHS[capability]}", path, "-o", cubin)
        return said, _run(tools / "cuobjdump", "-sass", cubin)


KINDS = {
    "tensor": ("HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA", "HMMA", "QMMA"),
    "tma": ("UTMALDG", "UBLKCP"),
    "exp_log": ("MUFU",),
    "fp32": ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX"),
    "global": ("LDG", "STG"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "local": ("LDL", "STL"),
    "tensor_memory": ("LDTM", "STTM"),
}
"""SASS opcodes by what they use; `local` are spills."""


def instruction_mix(sass: str) -> dict[str, int]:
    """Instructions by kind; those of no kind are `other` (integer, control, barriers)."""
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9]*)", sass)
    mix = dict.fromkeys([*KINDS, "other"], 0)
    for opcode in opcodes:
        kind = next((k for k, names in KINDS.items() if opcode.startswith(names)), "other")
        mix[kind] += 1
    return mix


MATRIX = re.compile(r"\b(wgmma\.mma_async\S*|tcgen05\.mma\.\S*|mma\.sync\S*)")


def report(v: Variant, capability: int) -> Report:
    """Compile and inspect one variant."""
    compiled = compile_variant(v, capability)
    ptx = compiled.asm["ptx"]
    said, sass = _assemble(ptx, capability)
    matrix: dict[str, int] = {}
    for name in MATRIX.findall(ptx):
        matrix[name] = matrix.get(name, 0) + 1
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    found = re.search(r"Used (\d+) registers", said)
    if found is None:
        raise RuntimeError(f"ptxas did not say how many registers {v.name} uses:\n{said}")
    return Report(
        v.name,
        ARCHS[capability],
        int(found.group(1)),
        sum(spills),
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", 0) or 0,
        matrix,
        ptx.count("cp.async.bulk.tensor"),
        instruction_mix(sass),
    )
