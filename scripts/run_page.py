"""Run every command of a page as it stands, and compare what it prints with the page: README.md, docs/tutorial.md.

python scripts/run_page.py docs/tutorial.md            exit code 1 where a command fails or prints something else
python scripts/run_page.py docs/tutorial.md --write    put what was printed into the page

Commands are the lines behind `$ ` in blocks marked `console`; what follows them there is their output, stdout and stderr together.
They run one after another in bash in an empty folder, with this checkout as `$MINT`. Numbers may differ between versions of Python,
whose library is mined, and between processors, and so may the kind of edit; other words may not. `exit code N` as last line says which one is expected.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
PORT = "8000"
FREELY = re.compile(r"skipped: ")
"""Lines that depend on the folder that is mined."""


def commands(block: str) -> Iterator[tuple[str, str]]:
    """(command, its output) of one block; a command goes on behind a backslash."""
    for part in re.split(r"(?m)^\$ ", block)[1:]:
        found = re.match(r"((?:.*\\\n)*.*\n)", part)
        assert found is not None
        yield found[1], part[found.end() :]


def stable(output: str) -> str:
    """What must be the same: the words, without frames, numbers, names made of digits and texts out of the mined folder."""
    words = []
    for line in output.splitlines():
        if not FREELY.search(line):
            line = re.sub(r'^( *"\w+": ").*"', r"\1", line)
            line = re.sub(r"\b[0-9a-f]{12,64}\b|\d[\d,.]*(e-\d+)?|\b(rewrite|value)\b", "#", line)
            words += re.sub(r"[━┃┏┓┡┩└┘─│┳╇┴╈┬┼├┤╭╮╰╯]", " ", line).split()
    return " ".join(words)


class Shell:
    """Runs commands in an empty folder, where `mint` is this checkout's."""

    def __init__(self, folder: str):
        self.folder, self.servers, self.port = folder, [], PORT
        tools = Path(folder) / ".tools"
        tools.mkdir()
        for name, rest in (("mint", "-m mint "), ("python", "")):
            tool = tools / name
            tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" {rest}"$@"\n')
            tool.chmod(0o755)
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = os.environ | {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": paths,
            "MINT": str(ROOT),
            "COLUMNS": "100",
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])

    def run(self, command: str) -> tuple[str, float]:
        """(what it printed, CPU seconds of it and its children)."""
        command = command.replace(PORT, self.port)
        if command.rstrip().endswith("&"):
            return self.serve(command.rstrip().removesuffix("&")), 0.0
        began = os.times()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        ended = os.times()
        spent = ended.children_user + ended.children_system - began.children_user - began.children_system
        printed = done.stdout.replace(self.port, PORT).replace(str(ROOT), "$MINT")
        printed = "".join(line.rstrip() + "\n" for line in printed.splitlines())
        return printed + (f"exit code {done.returncode}\n" if done.returncode else ""), spent

    def serve(self, command: str) -> str:
        """Start a server and wait until it answers."""
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, start_new_session=True
        )
        self.servers.append(server)
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=5).close()
                return ""
            except OSError:
                time.sleep(0.2)
        return f"exit code {server.returncode}\n"

    def close(self) -> None:
        """End the servers that were started."""
        for server in self.servers:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def main() -> int:
    """Run the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    text, failed, total = asked.page.read_text(encoding="utf-8"), False, 0.0
    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(folder)
        try:
            for block in BLOCK.findall(text):
                made = ""
                for command, expected in commands(block):
                    printed, spent = shell.run(command)
                    total += spent
                    made += f"$ {command}{printed}"
                    print(f"{spent:6.1f} CPU s  $ {command.splitlines()[0]}", flush=True)
                    if not asked.write and stable(printed) != stable(expected):
                        print(f"--- the page\n{expected}--- printed\n{printed}---", flush=True)
                        failed = True
                if asked.write:
                    text = text.replace(f"```console\n{block}```", f"```console\n{made}```")
        finally:
            shell.close()
    print(f"{total:6.1f} CPU s in all")
    if asked.write:
        asked.page.write_text(text, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
