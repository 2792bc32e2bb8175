"""What the compiler makes of the loss kernels, for Hopper and Blackwell, on any machine; and their times on a GPU.

    python tools/bench/kernel_report.py [--quick]   registers, spills, shared memory, instructions; roofline arithmetic
    python tools/bench/kernel_report.py --update    write this Triton's golden table, which the tests compare with
    ... --triton FOLDER                             with the Triton in FOLDER: pip install --no-deps --target FOLDER
    python tools/bench/kernel_report.py --run       time the head on this GPU (refused where there is none)

The table is compiled (Triton, its ptxas and cuobjdump), not run. Each of the versions VERSIONS has its golden table:
ours, and the one that torch's CUDA wheel brings. The roofline is arithmetic from data sheets, not a
measurement: the largest of matrix time at dense peak, HBM time and exp time (one MUFU each: 16 a clock and SM), at
70B shapes (K 8192, V 128256 over TP 8, T 8192 tokens), for the sums (one product) and for a whole update (the kernels'
four products: logits twice, dHidden, dWeight). --quick: the three kernels of the recommended recipe only.

Last line, JSON: {"triton", "kernels": [{"kernel", "arch", "registers", "spill_bytes", "shared_bytes", "tensor_memory",
"matrix", "tma_loads", "mix"}], "roofline_arithmetic": [{"gpu", "precision", "pass", "products", "matrix_us", "hbm_us",
"exp_us", "bound_us"}], "worst_spill_bytes", "measured": null}. With --run instead: {"gpu", "measured": [{"T", "K", "V",
"precision", "backend", "pass", "ms", "tflops"}]}.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
GOLDEN = ROOT / "tests" / "golden" / "loss_kernels"
KERNELS = ROOT / "treepo_mega" / "loss" / "triton"
SOURCES = (
    KERNELS / "kernels.py",
    KERNELS / "rows.py",
    KERNELS / "launch.py",
    ROOT / "tools" / "bench" / "kernel_aot.py",
)
"""What the compiled kernels depend on, beside Triton itself: their code, tile sizes and specialisations."""
VERSIONS = {"3.7.1": "torch 2.13.0 for CUDA brings it", "3.8.0": "setup.py pins it for machines without a GPU"}
"""Versions of Triton whose kernels are proven, and why these."""
QUICK = ("forward-fp8-blockwise", "dlogits-fp8-blockwise", "combine")
TOKENS, WIDTH, VOCAB = 8192, 8192, 128256 // 8

GPUS = {
    "H100 SXM": {"bf16": 989e12, "fp8": 1979e12, "hbm": 3.35e12, "exp": 16 * 132 * 1.755e9},
    "B200": {"bf16": 2250e12, "fp8": 4500e12, "hbm": 8.0e12, "exp": 16 * 148 * 1.85e9},
}
"""Dense peaks, FLOP/s; HBM bytes/s; exponentials/s. From the vendor's data sheets."""


class NoGoldenTable(RuntimeError):
    """Nobody has compiled the kernels with this version of Triton, or not since their code changed."""


def installed() -> str:
    """The version of Triton that this process imports."""
    return importlib.metadata.version("triton")


def fingerprint(version: str) -> str:
    """SHA-256 over Triton's version and the bytes of SOURCES. Equal fingerprints compile to equal kernels."""
    digest = hashlib.sha256(version.encode())
    for path in SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def golden(version: str) -> dict[str, Any]:
    """The golden table of a version of Triton. Raises NoGoldenTable, which says how to make it."""
    path = GOLDEN / f"{version}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    raise NoGoldenTable(
        f"Triton {version} has no golden table in {GOLDEN.relative_to(ROOT)}, which has {', '.join(VERSIONS)}: nobody "
        f"looked at what its compiler makes of the kernels. Run {how_to_update(version)}, look at what spills, "
        "and commit the file"
    )


def how_to_update(version: str) -> str:
    """The commands that write a version's golden table."""
    update = "python tools/bench/kernel_report.py --update"
    if version == installed():
        return f"`{update}`"
    folder = f"build/triton-{version}"
    return f"`pip install --no-deps --target {folder} triton=={version}` and `{update} --triton {folder}`"


def stale_tables() -> list[str]:
    """For each table that is of other sources than these, how to write it anew."""
    return [
        f"{version}: {how_to_update(version)}"
        for version in VERSIONS
        if golden(version)["fingerprint"] != fingerprint(version)
    ]


def spilled_bytes(version: str) -> int:
    """Bytes a thread that kernels of a version's golden table spill."""
    return sum(kernel["spill_bytes"] for kernel in golden(version)["kernels"])


def roofline() -> list[dict[str, Any]]:
    """Lower bounds in microseconds from counts alone."""
    rows = []
    flop = 2.0 * TOKENS * WIDTH * VOCAB
    for gpu, peak in GPUS.items():
        for precision, size in (("bf16", 2), ("fp8", 1)):
            operands = size * (TOKENS + VOCAB) * WIDTH
            # dz goes out and in twice in bf16; dWeight is read and written in fp32; products of gradients are bf16.
            gradients = 2 * 2 * (TOKENS + VOCAB) * WIDTH + 3 * 2 * TOKENS * VOCAB + 8 * VOCAB * WIDTH
            for name, low, bf16, nbytes, exps in (
                ("sums", 1, 0, operands, TOKENS * VOCAB),
                ("update", 2, 2, 2 * operands + gradients, 2 * TOKENS * VOCAB),
            ):
                matrix = flop * (low / peak[precision] + bf16 / peak["bf16"])
                times = {"matrix_us": matrix, "hbm_us": nbytes / peak["hbm"], "exp_us": exps / peak["exp"]}
                times = {k: round(v * 1e6, 1) for k, v in times.items()}
                row = {"gpu": gpu, "precision": precision, "pass": name, "products": low + bf16}
                rows.append({**row, **times, "bound_us": max(times.values())})
    return rows


def compiled(quick: bool) -> list[dict[str, Any]]:
    """The reports of all variants, or of the quick ones."""
    from tools.bench import kernel_aot as aot

    wanted = [v for v in aot.VARIANTS if not quick or v.name in QUICK]
    return [aot.report(v, arch).as_dict() for v in wanted for arch in aot.ARCHS]


def show(kernels: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """Tables for people."""
    kinds = list(kernels[0]["mix"])
    print(
        f"{'kernel':<34}{'arch':<9}{'regs':>5}{'spill':>6}{'smem':>8}{'tmem':>5}  " + " ".join(f"{k:>7}" for k in kinds)
    )
    for k in kernels:
        sizes = f"{k['registers']:>5}{k['spill_bytes']:>6}{k['shared_bytes']:>8}{k['tensor_memory']:>5}  "
        print(f"{k['kernel']:<34}{k['arch']:<9}{sizes}" + " ".join(f"{k['mix'][x]:>{max(7, len(x))}}" for x in kinds))
    print(f"\narithmetic, not measured: T {TOKENS}, K {WIDTH}, V/tp {VOCAB}; microseconds")
    for r in lines:
        times = f"matrix {r['matrix_us']:>8}  HBM {r['hbm_us']:>7}  exp {r['exp_us']:>6}  bound {r['bound_us']:>8}"
        print(f"{r['gpu']:<10}{r['precision']:<6}{r['pass']:<8}{r['products']} products  {times}")


def run_on_gpu() -> int:
    """Time forward and update of the head for each precision and backend on this GPU."""
    import torch

    from treepo_mega.runtime.device import compute_capability, device, has_cuda

    if not has_cuda():
        print("--run needs a CUDA device, and torch sees none: without it this command compiles only", file=sys.stderr)
        return 2
    import triton

    from treepo_mega.loss.logprobs import logprob_entropy
    from treepo_mega.loss.operands import Numerics
    from treepo_mega.loss.shard import Shard

    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, device=device(), dtype=torch.bfloat16).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(VOCAB, WIDTH, device=device(), dtype=torch.bfloat16) * 0.02)
    weight.main_grad = torch.zeros(VOCAB, WIDTH, device=device())
    target = torch.randint(0, VOCAB, (TOKENS,), device=device())
    rows = []
    for precision in ("bf16", "fp8"):
        for backend in ("torch", "triton"):
            shard = Shard.of(weight, 0, VOCAB, numerics=Numerics(precision), backend=backend)

            def forward(shard: Shard = shard) -> Any:
                return logprob_entropy(hidden, weight, target, shard)[0]

            def update(shard: Shard = shard) -> None:
                logprob_entropy(hidden, weight, target, shard)[0].sum().backward()

            for name, f, products in (("sums", torch.no_grad()(forward), 1), ("update", update, 4)):
                ms = triton.testing.do_bench(f)
                tflops = products * 2.0 * TOKENS * WIDTH * VOCAB / ms / 1e9
                row = {"T": TOKENS, "K": WIDTH, "V": VOCAB, "precision": precision, "backend": backend, "pass": name}
                rows.append({**row, "ms": round(ms, 4), "tflops": round(tflops, 1)})
                print(rows[-1])
    print(json.dumps({"gpu": f"sm_{''.join(map(str, compute_capability()))}", "measured": rows}))
    return 0


def main() -> int:
    """Command line; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="three kernels only")
    p.add_argument("--update", action="store_true", help=f"write {GOLDEN.relative_to(ROOT)}/VERSION.json")
    p.add_argument("--triton", metavar="FOLDER", help="use the Triton that lies in FOLDER")
    p.add_argument("--run", action="store_true", help="time the head on this GPU")
    args = p.parse_args()
    if args.run:
        return run_on_gpu()
    if os.environ.pop("TRITON_INTERPRET", None):
        print("TRITON_INTERPRET is ignored here: the interpreter compiles nothing", file=sys.stderr)
    if args.triton:
        # Before the first import of Triton: the folder's version hides the installed one.
        sys.path.insert(0, args.triton)
    import triton

    kernels, lines = compiled(args.quick), roofline()
    if args.update and not args.quick:
        body = {"triton": triton.__version__, "fingerprint": fingerprint(installed()), "kernels": kernels}
        (GOLDEN / f"{installed()}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    show(kernels, lines)
    worst = max(k["spill_bytes"] for k in kernels)
    body = {"triton": triton.__version__, "kernels": kernels, "roofline_arithmetic": lines}
    print(json.dumps({**body, "worst_spill_bytes": worst, "measured": None}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
