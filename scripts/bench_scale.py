"""What a repair costs on the device that is there: seconds, peak memory, and how both compare with other ways, in one run.

    python scripts/bench_scale.py --model smollm2-135m
    python scripts/bench_scale.py --shape 0.5B --shape 1.5B --shape 3B --no-others
    python scripts/bench_scale.py --model ./my-model --device cuda --dtype bfloat16 --cases cases.jsonl --limit 12

A shape is a model of random weights in bfloat16, made in memory: what it writes means nothing, what it costs does. Each
model runs in a process of its own; on a CPU its memory is limited to weights x 1.15 + 1.5 GB, so that a model which needs
more fails. Statistics are measured anew, without the cache. CPU seconds stand beside those of the clock: on a busy
machine only they say anything. The table goes to standard output as Markdown, with --json as JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers.initialization import no_init_weights

from mint import session
from mint.attribution.faults import find_faults
from mint.attribution.linear import linear_scores
from mint.case import Case, load_cases
from mint.errors import MintError
from mint.model.layout import find_layout
from mint.model.lm import LM
from mint.model.loading import BUILTIN, load_lm
from mint.reference import sample_layers, statistics
from mint.reference.moments import LINE_TOKENS, PASSAGE_TOKENS
from mint.solver import DEFAULT, SOLVERS, in_contexts
from mint.solver.baselines import lora
from mint.solver.problem import Problem, Settings

SHAPES = {
    # width, neurons, layers, attention heads, heads of keys and values, vocabulary (those of Qwen2.5-Coder)
    "tiny": (64, 256, 4, 4, 2, 1000),
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "3B": (2048, 11_008, 36, 16, 2, 151_936),
    "7B": (3584, 18_944, 28, 28, 4, 152_064),
}
LORA_STEPS = 30
SPARE = 1.5e9
"""Bytes beyond 1.15 times the weights that a repair may take."""
CASE = Case("sort", "# sort list l in descending order\n", "l.sort(reverse=True)\n")
SHORT = Case("short", "# sort list l\n", "ab\n")
"""For random weights, whose tokens are bytes."""


def random_lm(shape: str, device: str) -> LM:
    """A model of random weights, bytes as tokens, the vocabulary as wide as the shape says."""
    width, neurons, layers, heads, kept, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        hidden_size=width, intermediate_size=neurons, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kept, vocab_size=vocabulary, tie_word_embeddings=True, eos_token_id=0, bos_token_id=None,
        max_position_embeddings=32_768,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(1.0 if parameter.numel() == width else 0.0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = Tokenizer(models.BPE(vocab={"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    known.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, eos_token="<eos>", pad_token="<eos>")
    return LM(model, tokenizer, find_layout(model), f"random {shape}")


# ---------------------------------------------------------------------- one model


def timed(function: Callable[[], object]) -> tuple[object, float, float]:
    """(result, seconds of the clock, seconds of the CPU)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    clock, cpu = time.perf_counter(), time.process_time()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - clock, time.process_time() - cpu


def multiplications(lm: LM) -> float:
    """Multiplications and additions of the statistics: docs/scale.md, `2 w t l`."""
    top = max(sample_layers(lm)) + 1
    layers = [p for n, p in lm.model.named_parameters() if f"{lm.layout.layers}." in n]
    return 2.0 * sum(p.numel() for p in layers) / lm.n_layers * top * (PASSAGE_TOKENS + LINE_TOKENS)


def measure(options: argparse.Namespace) -> dict:
    """All figures of one model: name -> [seconds of the clock, CPU seconds], or a number."""
    on_gpu = options.device not in ("cpu", "mps")
    lm, *load = timed(
        lambda: (
            random_lm(options.shape[0], options.device)
            if options.shape
            else load_lm(options.model, device=options.device, dtype=options.dtype)
        )
    )
    assert isinstance(lm, LM)
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in lm.model.parameters()}.values())
    limit = 1.15 * weights + SPARE
    if not on_gpu and not options.no_limit:
        # What the libraries took before the model came is not the repair's.
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit) + _imports(weights), resource.RLIM_INFINITY))
    layers = sample_layers(lm)
    found: dict = {"model": lm.name, "dtype": str(lm.dtype).removeprefix("torch."), "weights": weights}
    found |= {"limit": limit, "load": load, "multiplications": multiplications(lm)}
    stats = statistics(lm, cache=False)
    found["statistics"] = timed(lambda: stats.measure(layers, layers))[1:]
    if options.solver == in_contexts.NAME:
        found["beyond"] = timed(lambda: stats.measure((), (), [in_contexts.layer_of(lm, Settings())]))[1:]
    own = [SHORT] if options.shape else [CASE]
    cases = own if options.cases is None else load_cases(options.cases)
    wishes = session.Wishes(contexts=False, effects=False)
    rows = []
    for case in cases:
        outcome, *seconds = timed(partial(session.repair, lm, [case], wishes, SOLVERS[options.solver]))
        if outcome.repairs[0].note is None:  # the model was wrong
            rows.append((case, outcome.success, seconds))
        if len(rows) == options.limit:
            break
    if not rows:
        raise MintError(f"{lm.name} writes every target already; give other --cases")
    found |= {"cases": len(rows), "solved": sum(good for _, good, _ in rows), "first repair": rows[0][2]}
    found["repair"] = [median(seconds[i] for _, _, seconds in rows) for i in (0, 1)]
    encoded = lm.encode(rows[0][0])
    faults = find_faults(lm, encoded)
    forward = min(timed(lambda: lm.logits([encoded.ids], [encoded.positions]))[2] for _ in range(3))
    attribution = min(timed(lambda: linear_scores(lm, encoded, faults[:1], None))[2] for _ in range(3))
    found |= {"forward": forward, "attribution in forwards": attribution / forward}
    found["peak"] = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    if not options.no_others:
        lora.STEPS = LORA_STEPS
        for name in ("lora", "mint-paper"):
            problem = Problem(rows[0][0], encoded)
            found[name] = timed(lambda p=problem, n=name: SOLVERS[n](lm, p, Settings()))[1:]
    return found


def _imports(weights: int) -> int:
    """Bytes of data that this process held before its model, now that it holds it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData"):
            return max(0, int(line.split()[1]) * 1024 - weights)
    return 0


# ---------------------------------------------------------------------- all of them


def row(found: dict) -> dict[str, str]:
    """One model's column of the table."""
    if "error" in found:
        return {"model": found["model"], "solved": found["error"]}

    def seconds(name: str) -> str:
        return f"{found[name][0]:.1f} ({found[name][1]:.1f})" if name in found else ""

    def times(name: str) -> str:
        return f"{found[name][1] / found['first repair'][1]:.1f} x" if name in found else ""

    rate = found["multiplications"] / max(found["statistics"][1], 1e-9) / 1e9
    return {
        "model": f"{found['model']}, {found['dtype']}",
        "load, s (CPU s)": seconds("load"),
        "statistics, once": seconds("statistics"),
        "statistics, GFLOP by formula / CPU s": f"{rate:.0f}",
        "more text for contexts, once": seconds("beyond"),
        "first repair, proof included": seconds("first repair"),
        f"repair, median of {found['cases']}": seconds("repair"),
        "solved": f"{found['solved']} of {found['cases']}",
        "attribution of all neurons, plain forwards": f"{found['attribution in forwards']:.2f}",
        "peak memory, GB": f"{found['peak'] / 1e9:.2f}",
        "weights x 1.15 + 1.5 GB": f"{found['limit'] / 1e9:.2f}",
        f"LoRA r=8, {LORA_STEPS} steps / repair (CPU)": times("lora"),
        "mint-paper / repair (CPU)": times("mint-paper"),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help=f"default {BUILTIN}, unless shapes are given")
    parser.add_argument("--shape", action="append", default=[], choices=SHAPES, help="may be repeated")
    parser.add_argument("--cases", type=Path, help="file of cases; default one line of Python")
    parser.add_argument("--limit", type=int, default=12, help="cases that need a repair (default 12)")
    parser.add_argument("--solver", default=DEFAULT, choices=sorted(SOLVERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-others", action="store_true", help="leave out LoRA and mint-paper")
    parser.add_argument("--no-limit", action="store_true", help="let a model take more memory than it should")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure every model in a process of its own; 1 if one failed."""
    options = parse(arguments)
    if options.one:
        print(json.dumps(measure(options)))
        return 0
    given = list(sys.argv[1:] if arguments is None else arguments)
    wanted = [["--model", options.model]] if options.model or not options.shape else []
    wanted = [["--model", options.model or BUILTIN]] if wanted else []
    wanted += [["--shape", shape] for shape in options.shape]
    kept = [
        a
        for i, a in enumerate(given)
        if not {a, *given[max(i - 1, 0) : i]} & {"--model", "--shape", "--json"}
    ]
    results = []
    for one in wanted:
        done = subprocess.run(
            [sys.executable, __file__, "--one", *one, *kept], capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["killed"])[-1]
            results.append({"model": " ".join(one[1:]), "error": f"failed: {last[:160]}"})
        else:
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(f"{one[1]}: {'failed' if done.returncode else 'done'}", file=sys.stderr)
    if options.json:
        print(json.dumps(results))
    else:
        columns = [row(found) for found in results]
        names = list(dict.fromkeys(name for column in columns for name in column))
        cells = [[name, *(column.get(name, "") for column in columns)] for name in names]
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        lines.insert(1, "|" + "---|" * len(cells[0]))
        machine = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"{torch.get_num_threads()} CPU threads"
        )
        print(f"{machine}, torch {torch.__version__}\n\n" + "\n".join(lines))
    return int(any("error" in found for found in results))


if __name__ == "__main__":
    sys.exit(main())
