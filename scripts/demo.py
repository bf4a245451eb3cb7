"""The main job on the built-in model, as anybody would type it; run it with scripts/demo.

A habit first: its call sites are mined from Python's own library, one neuron learns from eight of them and is proved on unseen ones.
Then a single line. Then a process that knows only the patch files, and the way back, bit for bit.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from mint import console
from mint.cli import main as mint
from mint.errors import MintError

ROOT = Path(__file__).resolve().parent.parent
BUILTIN = "smollm2-135m"
OUT = Path("results") / "demo"
RULE, PAGE, HABIT, LINE = (
    str(OUT / name) for name in ("clock.jsonl", "clock.html", "clock.safetensors", "line.safetensors")
)
COPY = OUT / "patched"
WRONG, RIGHT = "time.time()", "time.perf_counter()"
LEFT_OUT = ("test", "tests", "site-packages", "idlelib", "lib2to3", "encodings")
CLOCK = "import time\n\nstart = time."
FIBONACCI = "def fibonacci(n):\n    if n <= 1:\n        return n\n    return"
FIXED = " fibonacci(n - 1) + fibonacci(n - 2)\n"


def shown(argv: list[str]) -> str:
    """A command as it is typed in bash."""

    def word(text: str) -> str:
        if "\n" not in text:
            return shlex.quote(text)
        escaped = text.replace("\\", r"\\").replace("'", r"\'").replace("\n", r"\n")
        return f"$'{escaped}'"

    return "$ mint " + " ".join(map(word, argv))


def run(*argv: str) -> None:
    """Show a command and run it here. Raises `MintError` where it fails, which it has then said itself."""
    print("\n" + shown(list(argv)), flush=True)
    code = mint(argv)
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise MintError(f"`mint {argv[0]}` ended with exit code {code}")


def fresh(prompt: str, *options: str) -> str:
    """What the model writes in a new process, through the command line."""
    argv = ["generate", "-m", BUILTIN, "--stop", "line", "-p", prompt, *options]
    print("\n" + shown(argv), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "mint", *argv], capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise MintError(f"the fresh process failed: {done.stderr.strip()}")
    print(done.stdout, end="", flush=True)
    return done.stdout


def digest(folder: Path) -> str:
    """SHA-256 of all weights of a saved model."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def main() -> None:
    """Do it all. Raises `MintError` where something did not hold."""
    from mint.model.loading import builtin_path

    started = time.perf_counter()
    os.chdir(ROOT)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    with console.working() as say:
        where = builtin_path(say)  # fetched and converted the first time
    clean = digest(where)

    print("== A habit: it writes time.time() where durations are measured. Where does that show?")
    left_out = [word for name in LEFT_OUT for word in ("--exclude", name)]
    library = ["--from", sysconfig.get_path("stdlib"), *left_out, "--lines", "6", "--limit", "16"]
    run("rule", "mine", "-m", BUILTIN, "--wrong", WRONG, "--right", RIGHT, *library, "--out", RULE)

    print("\n== One neuron learns from eight of the prompts; the others, of other files, judge it.")
    files = ["--report", PAGE, "--out", HABIT]
    run("repair", "-m", BUILTIN, "--rule", RULE, "--learn", "8", "--accept", "0.4", *files)

    print("\n== A single line, on top of that.")
    single = ["-p", FIBONACCI, "-t", FIXED, "--no-contexts", "--no-explain"]
    run("repair", "-m", BUILTIN, "--patch", HABIT, *single, "--out", LINE)

    print("\n== In a process that knows only the patch files:")
    before, after = fresh(CLOCK), fresh(CLOCK, "--patch", HABIT)
    print(f"   before {before.strip()!r}, after {after.strip()!r}")
    both = fresh(FIBONACCI, "--patch", HABIT, "--patch", LINE)
    if both != FIXED:
        raise MintError(f"the patched model writes {both!r}, not {FIXED!r}")

    print("\n== Into a saved model, and out of it again:")
    run("apply", HABIT, "-m", str(where), "--out", str(COPY))
    run("apply", LINE, "-m", str(COPY), "--in-place")
    patched = digest(COPY)
    run("revert", LINE, "-m", str(COPY), "--in-place")
    run("revert", HABIT, "-m", str(COPY), "--in-place")
    print(f"\nsha256 clean     {clean}\nsha256 patched   {patched}\nsha256 reverted  {digest(COPY)}")
    if digest(COPY) != clean or patched == clean:
        raise MintError("the reverted weights differ from the original ones")
    shutil.rmtree(COPY)

    print(f"\nEvery bit is as it was; {time.perf_counter() - started:.0f} s in all.")
    print(f"The page of the habit, with every prompt before and after: {PAGE}")


if __name__ == "__main__":
    try:
        main()
        code = 0
    except MintError as error:
        console.note(f"demo: {error}")
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
