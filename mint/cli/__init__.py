"""The `mint` command: parse, call, print. Every error ends here, as one line and an exit code.

Exit codes: 0 done; 1 an error of the user's or the machine's; 2 usage; 3 no acceptable repair, nothing changed; 130
interrupted. Nothing heavy is imported before the command is known, so that `--help` and mistakes answer at once.
"""

import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. argv: default the process's own arguments."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:
        pass  # not the main thread: whoever runs us there handles signals
    _show_warnings()
    try:
        from mint.cli.app import run

        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted; no file is half written", INTERRUPTED)
    except BrokenPipeError:
        # The reader went away; nothing more can be said on stdout, not even by the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _explain(error)


class _Stderr(logging.Handler):
    """What the library warns of, such as an edit that it finished, as one line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"mint: note: {' '.join(record.getMessage().splitlines())}", file=sys.stderr)


def _show_warnings() -> None:
    logger = logging.getLogger("mint")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr(logging.WARNING))


def _explain(error: Exception) -> int:
    """One line for whatever went wrong."""
    from mint.errors import MintError

    if isinstance(error, MintError):
        return _fail(str(error), error.exit_code)
    # A usage error of click, which typer may bring along under its own name.
    usage = getattr(error, "format_message", None)
    if usage is not None:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(usage(), file=sys.stderr)
            return 2
        context = getattr(error, "ctx", None)
        hint = f"; see '{context.command_path} --help'" if context is not None else ""
        return _fail(usage().rstrip(".") + hint, getattr(error, "exit_code", 2))
    if os.environ.get("MINT_DEBUG"):
        raise error
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return _fail(
            "not enough memory; use a smaller model, --dtype bfloat16, or --device with more memory", 1
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _fail(
            f"the disk is full ({error.filename or error.strerror}); make room and run this again", 1
        )
    if isinstance(error, OSError):
        return _fail(
            f"{error.filename or 'the system'}: {error.strerror or error}; check the path and its rights", 1
        )
    text = " ".join(str(error).split())[:300]
    return _fail(
        f"internal error: {type(error).__name__}: {text}; please report it with the trace that MINT_DEBUG=1 shows",
        1,
    )


def _fail(message: str, code: int) -> int:
    try:
        print("mint: " + " ".join(message.splitlines()), file=sys.stderr)
    except OSError:
        pass  # nobody listens
    return code
