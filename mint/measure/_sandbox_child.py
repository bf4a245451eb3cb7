"""Runs one untrusted program inside a child process. Started only by `sandbox.run_python`.

Reads one JSON object from standard input: {program, nonce, seconds, memory_bytes, file_bytes}. Writes one
line, `<nonce> <verdict>`, to the inherited standard output; the program itself only ever sees /dev/null
there. With the argument `--probe` it only prints the version of Landlock that the kernel offers, 0 for none.
"""

import json
import os
import resource
import struct
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
# Events about paths, and where their arguments name folders that a path is relative to (-1: the working folder).
_PATH_EVENTS: dict[str, tuple[int, ...]] = {
    "os.remove": (1,),
    "os.rename": (2, 3),
    "os.rmdir": (1,),
    "os.mkdir": (2,),
    "os.link": (2, 3),
    "os.symlink": (2,),
    "os.truncate": (),
    "os.chmod": (2,),
    "os.chown": (3,),
    "os.utime": (3,),
    "os.chdir": (),
    "os.setxattr": (),
    "os.removexattr": (),
}
# Modules whose C code opens files without telling any audit hook; refused where the kernel does not stand behind it.
_BEHIND_THE_HOOK = ("_sqlite3", "_gdbm", "_dbm", "readline", "_posixshmem")

# Landlock (docs.kernel.org/userspace-api/landlock.html): system call numbers and rights are the same on every machine.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PR_SET_NO_NEW_PRIVS = 38
_EXECUTE, _WRITE_FILE, _TRUNCATE, _IOCTL = 1 << 0, 1 << 1, 1 << 14, 1 << 15
_REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))
_REFER = 1 << 13
_TCP = 3
_SCOPED = 3


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


def _landlock_version() -> int:
    """What the kernel offers; 0 for none."""
    try:
        import ctypes

        return max(0, ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))
    except (ImportError, OSError, AttributeError):
        return 0


def _confine(home: str) -> bool:
    """Let the kernel refuse every write outside `home`, every new program and every TCP connection; False if it cannot.

    Whatever opens the file: SQLite, mknod, mkfifo, native code.
    """
    version = _landlock_version()
    if not version:
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    rights = _EXECUTE | _WRITE_FILE | _REMOVE_AND_MAKE
    rights |= (
        (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0) | (_IOCTL if version >= 5 else 0)
    )
    words = [rights] + ([_TCP] if version >= 4 else []) + ([_SCOPED] if version >= 6 else [])
    attributes = struct.pack(f"{len(words)}Q", *words)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    on_files = rights & (_WRITE_FILE | _TRUNCATE | _IOCTL)
    for path, allowed in ((home, rights & ~_EXECUTE), (os.devnull, on_files)):
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, folder), 0):
            return False
        os.close(folder)
    done = libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _guard(home: str, confined: bool) -> None:
    """Refuse sockets, processes and changes outside `home`. A speed bump, not a wall: see
    `sandbox.run_python`. confined: whether the kernel stands behind it.
    """
    realpath, sep, fspath = os.path.realpath, os.sep, os.fspath
    if not confined:
        import posix

        for module in (os, posix):  # no audit event tells of these
            for name in ("mkfifo", "mknod"):
                module.__dict__.pop(name, None)

    def outside(path: str | bytes | os.PathLike | int | None) -> bool:
        if path is None:
            return False
        name = f"/proc/self/fd/{path}" if isinstance(path, int) else os.fsdecode(fspath(path))
        full = realpath(name)
        return not (full == home or full.startswith(home + sep) or full == "/dev/null")

    def hook(event: str, args: tuple) -> None:
        if event in _FORBIDDEN_EXACT or event.startswith(_FORBIDDEN):
            raise PermissionError(f"blocked: {event}")
        if event == "import" and not confined and args[0] in _BEHIND_THE_HOOK:
            raise PermissionError(f"blocked: {args[0]} writes files that cannot be watched on this system")
        if event == "open":
            path, mode, flags = (*args, None, None)[:3]
            writes = bool((flags or 0) & _WRITE_FLAGS) or (isinstance(mode, str) and set(mode) & set("wax+"))
            if writes and not isinstance(path, int) and outside(path):
                raise PermissionError("blocked: write outside the working folder")
        elif event in _PATH_EVENTS:
            folders = [args[i] for i in _PATH_EVENTS[event] if i < len(args)]
            paths = [p for p in args[:2] if isinstance(p, str | bytes | os.PathLike)]
            paths += args[:1] if isinstance(args[0], int) else []
            if any(f not in (-1, None) for f in folders) or any(map(outside, paths)):
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
    if sys.argv[1:] == ["--probe"]:
        print(_landlock_version())
        return
    order = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    _limit(order)
    home = os.path.realpath(os.getcwd())
    _guard(home, _confine(home))
    verdict = " ".join(_verdict(order["program"]).split())[:300]
    os.write(answer, f"{order['nonce']} {verdict}\n".encode("utf-8", "replace"))
    os._exit(0)  # threads the program left behind must not keep the process alive


if __name__ == "__main__":
    main()
