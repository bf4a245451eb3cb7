"""Read many damaged and crafted patch files: each must load or be refused in one line, in little memory.

    python scripts/fuzz_patch.py [--files 100000] [--seed 0]

Prints the first file that does anything else (its seed), and exits 1. What a file may cost is bounded: the memory of the
process may not grow by more than 64 MiB over the whole run.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

from mint.errors import PatchError
from mint.patch import from_bytes, to_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.mutations import mutated  # noqa: E402

SAMPLES = Path(__file__).parents[1] / "tests" / "data" / "patches"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first file; the next has the next seed"
    )
    args = parser.parse_args()
    good = [p.read_bytes() for p in sorted(SAMPLES.glob("*.safetensors"))]
    for data in good:
        from_bytes(data)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    loaded = refused = 0
    for seed in range(args.seed, args.seed + args.files):
        data = mutated(good[seed % len(good)], seed)
        try:
            to_bytes(from_bytes(data))
            loaded += 1
        except PatchError as error:
            refused += 1
            if "\n" in str(error):
                print(f"seed {seed}: more than one line: {error}")
                return 1
        except BaseException as error:
            print(f"seed {seed}: {type(error).__name__}: {error}")
            return 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = time.perf_counter() - started
    print(
        f"{args.files} files: {loaded} load, {refused} are refused, none crashes; {seconds:.0f} s, memory grew by {grown} KiB"
    )
    return int(grown > 64 << 10)


if __name__ == "__main__":
    sys.exit(main())
