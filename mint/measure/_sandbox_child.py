"""Runs one untrusted program inside a child process. Started only by `sandbox.run_python`.

Reads one JSON object from standard input: {program, nonce, seconds, memory_bytes, file_bytes}. Writes one
line, `<nonce> <verdict>`, to the inherited standard output; the program itself only ever sees /dev/null
there.
"""

import json
import os
import resource
import sys

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events (docs.python.org/3/library/audit_events.html) that no graded program needs.
_FORBIDDEN = (
    "socket.",
    "ctypes.",
    "subprocess.",
    "resource.",
    "shutil.",
    "pty.",
    "fcntl.",
    "mmap.",
    "winreg.",
)
_FORBIDDEN_EXACT = (
    "os.fork",
    "os.forkpty",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.kill",
    "os.killpg",
    "sys.addaudithook",
    "sys.setprofile",
    "sys.settrace",
)
_PATH_EVENTS = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "os.chdir",
)


def _limit(order: dict) -> None:
    seconds = int(order["seconds"]) + 1
    for what, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 64),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _guard(home: str) -> None:
    """Refuse sockets, processes and changes outside `home`. A speed bump, not a wall: see
    `sandbox.run_python`.
    """
    realpath, sep, fspath = os.path.realpath, os.sep, os.fspath

    def outside(path: object) -> bool:
        if isinstance(path, int) or path is None:
            return False
        full = realpath(os.fsdecode(fspath(path)))
        return not (full == home or full.startswith(home + sep) or full == "/dev/null")

    def hook(event: str, args: tuple) -> None:
        if event in _FORBIDDEN_EXACT or event.startswith(_FORBIDDEN):
            raise PermissionError(f"blocked: {event}")
        if event == "open":
            path, mode, flags = (*args, None, None)[:3]
            writes = bool((flags or 0) & _WRITE_FLAGS) or (isinstance(mode, str) and set(mode) & set("wax+"))
            if writes and outside(path):
                raise PermissionError("blocked: write outside the working folder")
        elif event in _PATH_EVENTS and any(
            outside(p) for p in args[:2] if isinstance(p, str | bytes | os.PathLike)
        ):
            raise PermissionError(f"blocked: {event} outside the working folder")

    sys.addaudithook(hook)


def _verdict(program: str) -> str:
    try:
        code = compile(program, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"syntax: {error}"
    try:
        exec(code, {"__name__": "__main__"})
    except AssertionError as error:
        return f"assertion: {error}" if str(error) else "assertion"
    except MemoryError:
        return "memory"
    except PermissionError as error:
        text = str(error)
        return text if text.startswith("blocked") else f"PermissionError: {text}"
    except OSError as error:
        return "file size" if error.errno == 27 else f"{type(error).__name__}: {error}"  # 27: EFBIG
    except (SystemExit, KeyboardInterrupt) as error:
        return f"exited early ({type(error).__name__})"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "passed"


def main() -> None:
    order = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    _limit(order)
    _guard(os.path.realpath(os.getcwd()))
    verdict = " ".join(_verdict(order["program"]).split())[:300]
    os.write(report, f"{order['nonce']} {verdict}\n".encode("utf-8", "replace"))
    os._exit(0)  # threads the program left behind must not keep the process alive


if __name__ == "__main__":
    main()
