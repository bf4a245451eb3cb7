"""Runs a short Python program under limits and says how it ended. Knows nothing about tasks or models.

For code that a *model* wrote by mistake, not for code that an attacker wrote on purpose.

Covered
    wall-clock time (the whole process group is killed), CPU time, address space, size of each file written,
    number of open files; standard input is empty and all output is thrown away; a temporary working folder,
    removed afterwards; an empty environment. Python's audit hooks refuse sockets, new processes, signals to
    others, ctypes, and writing, moving, deleting or changing attributes outside the working folder. Where the
    kernel has Landlock it refuses the same writes whoever makes them (SQLite, mknod, mkfifo, native code); where
    it has not, the modules that write behind the hooks are refused instead, and `weakness` says so. Where the system's `unshare`
    may make namespaces, the program also runs without any network interface and in a process namespace of its
    own, which takes every descendant with it when it ends. A program that leaves early (`sys.exit`,
    `os._exit`) before its checks ran does not pass.
Not covered
    reading files that the user may read; filling the disk with many small files; code written to defeat the
    audit hook (from native extensions, or by memory tricks); without `unshare`, a descendant that got around
    the hook and left the process group. Limits on processes do not bind root. For hostile code use a virtual
    machine.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CHILD = Path(__file__).with_name("_sandbox_child.py")
_UNSHARE = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")


@dataclass(frozen=True)
class RunResult:
    """How a program ended. `passed` only when it ran to its end without an exception."""

    passed: bool
    detail: str
    """`passed`, `timeout`, `memory`, `file size`, `assertion…`, `syntax…`, `blocked…`, `exited early…`,
    `Error: text`.
    """


@cache
def isolation() -> tuple[str, ...]:
    """The command prefix that gives a program its own namespaces; empty where not permitted."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    prefix = (unshare, *_UNSHARE)
    try:
        trial = subprocess.run([*prefix, "true"], capture_output=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return prefix if trial.returncode == 0 else ()


@cache
def landlock() -> int:
    """Version of Landlock that the kernel offers to keep writes inside the working folder; 0 for none."""
    try:
        probe = [sys.executable, "-I", "-B", str(_CHILD), "--probe"]
        return int(
            subprocess.run(probe, capture_output=True, timeout=60, stdin=subprocess.DEVNULL).stdout or 0
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0


def weakness() -> str | None:
    """What this system's sandbox cannot do, one line for the user; None where everything is in place."""
    missing = []
    if not landlock():
        missing.append("writes outside the working folder (no Landlock in the kernel)")
    if not isolation():
        missing.append("the network and left-over processes (no namespaces)")
    if not missing:
        return None
    return (
        f"programs are judged behind Python's audit hooks alone for {' and '.join(missing)}; run untrusted models in a"
        " container or a virtual machine"
    )


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_python(
    program: str, *, seconds: float = 10.0, memory_bytes: int = 512 << 20, file_bytes: int = 1 << 20
) -> RunResult:
    """Run `program` in a fresh interpreter and report how it ended, under the limits listed above.

    `seconds` wall clock (CPU time is limited to the same, rounded up); `memory_bytes` of address space, the
    interpreter itself takes about 30 MB; `file_bytes` for each file written. Never raises for what the
    program does.
    """
    nonce = secrets.token_hex(16)
    order = {
        "program": program,
        "nonce": nonce,
        "seconds": seconds,
        "memory_bytes": memory_bytes,
        "file_bytes": file_bytes,
    }
    command = [*isolation(), sys.executable, "-I", "-B", str(_CHILD)]
    with tempfile.TemporaryDirectory(prefix="mint-run-") as home, tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env={"PATH": os.defpath, "HOME": home, "TMPDIR": home, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(order).encode(), timeout=seconds)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
        answer.seek(0)
        text = answer.read(4096).decode("utf-8", "replace")
    return _result(text, nonce, process.returncode, timed_out)


def _result(answer: str, nonce: str, code: int, timed_out: bool) -> RunResult:
    if timed_out:
        return RunResult(False, "timeout")
    if answer.startswith(nonce + " "):
        verdict = answer[len(nonce) + 1 :].strip()
        return RunResult(verdict == "passed", verdict)
    number = -code if code < 0 else code - 128
    if number in (signal.SIGXCPU, signal.SIGKILL):
        return RunResult(False, "timeout")
    if number == signal.SIGXFSZ:
        return RunResult(False, "file size")
    return RunResult(False, f"exited early (status {code})")
