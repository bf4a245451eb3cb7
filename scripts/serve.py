"""A small OpenAI-compatible server (`/v1/models`, `/v1/completions`) for trying out; one request at a time, greedy only.

python scripts/serve.py --model ./my-model --port 8000

For the tutorial and for tests of a client. Serve users with a real one: docs/serving.md.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from mint.model.lm import LM
from mint.model.loading import load_lm


def handler(lm: LM, name: str) -> type[BaseHTTPRequestHandler]:
    """The requests that the server of one model answers."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, value: object, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer({"object": "list", "data": [{"id": name, "object": "model"}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions" or asked.get("temperature"):
                self.answer({"error": "only /v1/completions at temperature 0"}, 400)
                return
            ids = lm.encode_prompt(asked["prompt"])
            written = lm.generate([ids], asked.get("max_tokens", 16))[0]
            ended = bool(written) and written[-1] in lm.stop_ids()
            text = lm.continuation(ids, written[:-1] if ended else written)
            reason = "stop" if ended else "length"
            self.answer({"model": name, "choices": [{"text": text, "index": 0, "finish_reason": reason}]})

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=8000)
    asked = parser.parse_args()
    lm = load_lm(asked.model)
    server = HTTPServer(("127.0.0.1", asked.port), handler(lm, Path(lm.name).name))
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
