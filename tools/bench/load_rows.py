"""What loading a large prompt file costs: time, memory, duplicates, and whether time grows with the rows alone.

    python tools/bench/load_rows.py [--quick] [--rows N] [--format parquet|jsonl]

The file is made in a temporary folder, in the shape of DAPO-17k as it is published: 17 398 distinct problems as chat
messages, each about a hundred times, 1 791 700 rows with an `extra_info.index` of their own. The tokenizer is
byte-level with a chat template: slower than a real one per character, with longer lists of tokens.

Two loads, of a quarter of the rows and of all, say whether the time is linear. The cursor is built too: it reads every
prompt for its fingerprint. CPU seconds say more than wall seconds on a shared machine. `mib`: peak memory of the
process so far, above what it was before the first load. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

DISTINCT = 17_398
ROWS = 1_791_700
QUICK_ROWS = 60_000
CHUNK = 50_000
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows_of(count: int, distinct: int) -> Iterator[dict[str, Any]]:
    """`count` rows of `distinct` problems in a fixed shuffled order, as DAPO-17k has its columns."""
    chance = random.Random(0)
    for number in range(count):
        problem = number if number < distinct else chance.randrange(distinct)
        text = f"Solve the following math problem step by step. Let $n = {problem}$. " + "Find $n^2 + 2n + 1$. " * 12
        yield {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": text}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str((problem + 1) ** 2), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"{number:08x}-dapo"},
        }


def write(path: Path, count: int, distinct: int) -> None:
    """The file, in pieces of `CHUNK` rows."""
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows_of(count, distinct))
        return
    import pyarrow
    import pyarrow.parquet

    writer = None
    batch: list[dict[str, Any]] = []
    for number, row in enumerate(rows_of(count, distinct), 1):
        batch.append(row)
        if len(batch) == CHUNK or number == count:
            table = pyarrow.Table.from_pylist(batch)
            writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
            batch = []
    assert writer is not None
    writer.close()


def make_tokenizer() -> Any:
    """Byte-level, with the marks of a chat model."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def peak_mib() -> float:
    """The process's peak resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print one line a load, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} rows")
    parser.add_argument("--rows", type=int, help=f"default: {ROWS}")
    parser.add_argument("--format", choices=["parquet", "jsonl"], default="parquet")
    args = parser.parse_args()
    count = args.rows or (QUICK_ROWS if args.quick else ROWS)
    distinct = max(1, count * DISTINCT // ROWS)

    from treepo_mega.config import DataConfig
    from treepo_mega.data.cursor import PromptCursor
    from treepo_mega.data.prompts import load_prompts

    tokenizer = make_tokenizer()
    out: dict[str, Any] = {"format": args.format, "rows": count, "distinct": distinct}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"dapo.{args.format}"
        started = time.monotonic()
        write(path, count, distinct)
        size = path.stat().st_size / 2**20
        print(f"made {path.name}: {count} rows, {size:.0f} MiB, in {time.monotonic() - started:.1f} s")
        before = peak_mib()
        for name, part in (("quarter", count // 4), ("all", count)):
            started = time.monotonic()
            started_cpu = time.process_time()
            data = DataConfig(train=[{"path": f"{path}@[0:{part}]"}], max_prompt_len=2048)
            prompts = load_prompts(data.train, data, tokenizer, vocab_size=len(tokenizer))
            loaded = time.monotonic() - started
            loaded_cpu = time.process_time() - started_cpu
            PromptCursor(prompts, seed=0, shuffle=True)
            cursor = time.monotonic() - started - loaded
            cursor_cpu = time.process_time() - started_cpu - loaded_cpu
            shared = len({id(prompt.tokens) for prompt in prompts})
            print(f"{name}: {len(prompts)} prompts in {loaded:.1f} s, cursor {cursor:.1f} s, {shared} lists of tokens")
            print("\n".join(f"    {note}" for note in prompts.notes))
            assert shared <= distinct
            out[name] = {
                "seconds": round(loaded, 2),
                "cpu_seconds": round(loaded_cpu, 2),
                "cpu_us_per_row": round(loaded_cpu / part * 1e6, 2),
                "cursor_seconds": round(cursor, 2),
                "cursor_cpu_seconds": round(cursor_cpu, 2),
                "duplicates": len(prompts) - shared,
                "mib": round(peak_mib() - before, 1),
            }
            del prompts
    print(json.dumps(out))


if __name__ == "__main__":
    main()
