"""A reward server: an HTTP service that grades answers for a run, on this machine or another.

    python examples/python/reward_server.py                  # starts one, grades four answers through it, and ends
    python examples/python/reward_server.py --port 8800      # serves until it is stopped

A run asks it with these keys (docs/guides/remote-rewards.md says what is sent):

    data.verifier=http:sums 'reward.servers=[{name: sums, url: http://localhost:8800/score}]'

Put your own judgement into `grade`: a model's, a compiler's, a table's.
"""

from __future__ import annotations

import argparse
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAX_BYTES = 16 << 20
"""Of a request."""


# --8<-- [start:grade]
def grade(item: dict[str, Any]) -> float | dict[str, Any]:
    """A number, an object with "score" and further numbers, or an object with "error"."""
    numbers = re.findall(r"-?\d+", item["solution_str"])
    if not item["ground_truth"].lstrip("-").isdigit():
        return {"error": f"the truth {item['ground_truth']!r} is no number"}
    return {"score": float(numbers[-1:] == [item["ground_truth"]]), "numbers": len(numbers)}


# --8<-- [end:grade]


class Handler(BaseHTTPRequestHandler):
    """POST of `{"items": [...]}` gives `{"scores": [...]}`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Grade the items of a request."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= MAX_BYTES:
            self.reply(413, {"error": f"expected a body of at most {MAX_BYTES} bytes"})
            return
        try:
            items = json.loads(self.rfile.read(length))["items"]
            scores = [grade(item) for item in items]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.reply(400, {"error": f"{type(error).__name__}: {error}"})
            return
        self.reply(200, {"scores": scores})

    def reply(self, status: int, body: dict[str, Any]) -> None:
        """Send JSON."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a run sends thousands of requests a step."""


def try_it(port: int) -> None:
    """Grade four answers as a run would."""
    from treepo_mega.config import RewardConfig
    from treepo_mega.data.rewards import RewardItem, RewardPool

    server = {"name": "sums", "url": f"http://127.0.0.1:{port}/score", "batch_size": 4}
    answers = [("13", "6+7=13"), ("13", "6+7=12"), ("13", "no idea"), ("thirteen", "13")]
    with RewardPool(RewardConfig.model_validate({"servers": [server]})) as pool:
        items = [RewardItem("http:sums", "sums", answer, truth, prompt="6+7=") for truth, answer in answers]
        for item, result in zip(items, pool.score(items), strict=True):
            told = f"score {result.score} {result.extra}" if result.score is not None else f"lost: {result.error}"
            print(f"{item.solution_str:>8}  {told}")


def main() -> None:
    """Serve, or try it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=0, help="serve on this port; without it, try the server and end")
    args = parser.parse_args()
    server = ThreadingHTTPServer((args.host, args.port), Handler)
    if args.port:
        print(f"http://{args.host}:{args.port}/score", flush=True)
        server.serve_forever()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try_it(server.server_address[1])
    server.shutdown()


if __name__ == "__main__":
    main()
