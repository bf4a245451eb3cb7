"""The main job on two real mistakes of the built-in model; run it with scripts/demo.

Shows what the model wrote, the neurons behind it, the edit, what the patched model writes in a fresh process that knows
only the patch file, what else changed, and that reverting gives back every bit.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mint import MintError, console, patch, session, solver
from mint.case import Case
from mint.cli import parts
from mint.cli.repair import show_neurons
from mint.model.lm import LM
from mint.model.loading import BUILTIN, load_lm

OUT = Path(__file__).resolve().parent.parent / "results" / "demo"
CASES = [
    Case(
        "fibonacci",
        "def fibonacci(n):\n    if n <= 1:\n        return n\n    return",
        " fibonacci(n - 1) + fibonacci(n - 2)\n",
    ),
    Case("unpack", "#!/bin/bash\n# unpack the archive src.tar.gz\ntar", " -xzf src.tar.gz\n"),
]


def digest(lm: LM) -> str:
    """SHA-256 of every weight of the model, bit for bit."""
    found = hashlib.sha256()
    for name, parameter in sorted(lm.model.named_parameters()):
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


def fresh(prompt: str, *options: str) -> str:
    """What the model writes in a new process, through the command line."""
    command = [sys.executable, "-m", "mint", "generate", "--model", BUILTIN, "--prompt", prompt]
    command += ["--stop", "line", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise MintError(f"the fresh process failed: {done.stderr.strip()}")
    return json.loads(done.stdout)["text"]


def main() -> int:
    """Do it all; returns the exit code: 0 if everything held."""
    started = time.perf_counter()
    say = print
    lm = load_lm(BUILTIN, say=say)
    clean = digest(lm)
    print(f"sha256 of all {sum(p.numel() for p in lm.model.parameters()):,} weights: {clean[:32]}")

    wishes = session.Wishes()
    outcome = session.repair(
        lm,
        CASES,
        wishes,
        solver.named("mint"),
        attribute=parts.quick_attribution(wishes),
        judge=parts.cause_or_carrier(),
        prepare=parts.preparation(wishes, say),
        say=say,
    )
    for one in outcome.repairs:
        print(f"\n== {one.case.id}")
        print(f"prompt       {one.case.prompt!r}")
        print(f"it wrote     {one.generated_before!r}")
        print(f"it should    {one.case.target!r}", flush=True)
        if one.attribution is not None:
            show_neurons(one.attribution.to_json(), 5)
        for n in one.neurons:
            print(
                f"edit         layer {n['layer']}, neuron {n['index']} ({n['kind']}), in {one.seconds:.1f} s"
            )
        if one.verdict is not None:
            print(f"these neurons are: {one.verdict.label}")
    if not outcome.success or outcome.patch is None:
        raise MintError(f"no acceptable repair: {outcome.reason}")

    OUT.mkdir(parents=True, exist_ok=True)
    path = patch.save(outcome.patch, OUT / "fix.safetensors", force=True)
    print(
        f"\n== in a fresh process, from {path.relative_to(OUT.parent.parent)} ({path.stat().st_size:,} bytes)"
    )
    for case in CASES:
        text = fresh(case.prompt, "--patch", str(path))
        print(f"{case.id:12} {text!r}")
        if text != case.target:
            raise MintError(f"{case.id}: the patched model writes {text!r}, not {case.target!r}")

    effects = outcome.specificity
    print(f"\n== what else changed, on {effects.tokens} tokens of other lines")
    print(f"next token unchanged     {effects.argmax_unchanged:.2%}")
    print(f"right before, wrong now  {effects.argmax_broken:.2%}")
    print(f"KL divergence, mean      {effects.kl_mean:.2g}")

    print("\n== revert")
    loaded = patch.load(path)
    patch.apply(lm, loaded)
    print(f"patched   {digest(lm)[:32]}")
    patch.revert(lm, loaded)
    print(f"reverted  {digest(lm)[:32]}")
    if digest(lm) != clean:
        raise MintError("the reverted weights differ from the original ones")
    print(f"every weight is bit-identical again; {time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except MintError as error:
        console.note(f"demo: {error}")
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
