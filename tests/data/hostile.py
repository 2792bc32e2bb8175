"""A user's file of verifiers that misbehave, each by the answer it is given; run in real workers alone."""

HOSTILE = """
import os, sys, time, subprocess, pathlib

LEFT = []

def score(data_source, solution_str, ground_truth, extra_info=None):
    what = solution_str
    if what == "good":
        return 0.5
    if what == "dict":
        return {"score": 1, "acc": True, "pred": "4", "big": [1, 2]}
    if what == "nanextra":
        return {"score": 1, "format": float("nan")}
    if what == "extra":
        return {"score": extra_info["a"]["b"]}
    if what == "length":
        return {"score": 1.0, "length": len(ground_truth)}
    if what == "hang":
        time.sleep(1000)
    if what == "spin":
        return float(len(str(9 ** 9 ** 9)))  # holds the interpreter lock for hours
    if what == "raise":
        raise KeyError("no such thing")
    if what == "nan":
        return float("nan")
    if what == "inf":
        return {"score": float("inf")}
    if what == "text":
        return "1.0"
    if what == "none":
        return None
    if what == "noscore":
        return {"points": 1.0}
    if what == "exit":
        os._exit(7)
    if what == "sysexit":
        sys.exit(3)
    if what == "segfault":
        import ctypes
        print("about to touch address 0", file=sys.stderr, flush=True)
        ctypes.string_at(0)
    if what == "recurse":
        return score(data_source, solution_str, ground_truth, extra_info)
    if what == "memory":
        return float(len(bytearray(64 << 30)))
    if what == "grow":
        kept = []
        while True:
            kept.append(bytearray(16 << 20))
    if what == "leak":
        while True:
            LEFT.append(bytearray(16 << 20))
    if what == "print":
        print('{"id": 0, "score": 99.0, "extra": {}}' * 10, flush=True)
        os.write(1, b"\\x00garbage\\n" * 20000)
        os.system("echo from a child")
        return 0.25
    if what == "stdin":
        return 1.0 if sys.stdin.read() == "" else 0.0
    if what == "child":
        child = subprocess.Popen(["sleep", "1000"])
        pathlib.Path(ground_truth).write_text(str(child.pid))
        time.sleep(1000)
    if what == "once":
        flag = pathlib.Path(ground_truth)
        if not flag.exists():
            flag.write_text("seen")
            os._exit(9)
        return 1.0
    if what == "forge":
        os.write(int(ground_truth), b"this is no reply\\n")
        return 1.0
    if what == "pid":
        return float(os.getpid())
    raise AssertionError(what)
"""
