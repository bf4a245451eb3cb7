"""`mint selftest` against a small local server, with the patched and with the plain model."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mint import patch as P
from mint.cli import main
from mint.model.lm import Template
from tests.conftest import tiny_lm
from tests.test_bank import CASES, repaired


class _Server(BaseHTTPRequestHandler):
    lm = None

    def _answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._answer({"data": [{"id": "tiny"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "tiny" and asked["temperature"] == 0
        chat = self.path == "/v1/chat/completions"
        dressed = replace(self.lm, template=Template(asked["messages"][0]["content"])) if chat else self.lm
        ids = dressed.encode_prompt(asked["messages"][-1]["content"] if chat else asked["prompt"])
        text = self.lm.continuation(ids, self.lm.generate([ids], asked["max_tokens"])[0])
        self._answer({"choices": [{"message": {"content": text}} if chat else {"text": text}]})

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    lm = tiny_lm("llama")
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (_Server,), {"lm": lm}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield lm, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_it_tells_the_patched_server_from_the_plain_one(served, tmp_path, capsys):
    lm, url = served
    case = CASES[0]
    before = lm.write(lm.encode(case), case)
    patch = repaired(lm, case)
    patch = replace(patch, info={"cases": [patch.info["cases"][0] | {"generated_before": before}]})
    file = P.save(patch, tmp_path / "fix.safetensors")
    assert main(["selftest", "--url", url, "--patch", str(file)]) == 3
    assert "like the model without the patch" in capsys.readouterr().err
    with P.applied(lm, patch):
        assert main(["selftest", "--url", url + "/v1/", "--patch", str(file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["patched"] and result["served_model"] == "tiny"
    assert [c["holds"] for c in result["cases"]] == [True]


def test_a_patch_made_in_a_chat_is_asked_in_a_chat(served, tmp_path, capsys):
    lm, url = served
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chatting = replace(lm, template=Template("be brief"))
    patch = repaired(chatting, CASES[0])
    patch = replace(patch, info=patch.info | {"chat": True, "system": "be brief"})
    file = P.save(patch, tmp_path / "fix.safetensors")
    with P.applied(lm, patch):
        assert main(["selftest", "--url", url, "--patch", str(file)]) == 0
    assert main(["selftest", "--url", url, "--patch", str(file)]) == 3
    capsys.readouterr()


def test_what_does_not_answer_is_told_in_one_line(tmp_path, capsys):
    cases = tmp_path / "c.jsonl"
    cases.write_text(json.dumps({"id": "a", "prompt": "x", "target": "y"}) + "\n")
    for url, said in (("http://127.0.0.1:9", "does not answer"), ("ftp://x", "is no address of a server")):
        assert main(["selftest", "--url", url, "--cases", str(cases)]) == 1
        assert said in capsys.readouterr().err
    assert main(["selftest", "--url", "http://127.0.0.1:9"]) == 2
