"""Rules against their competitors, on the same learn and unseen prompts, each with its cost and its side effects.

    python scripts/bench_rules.py mine --model smollm2-135m --from LIBRARY --from SITE_PACKAGES --out rules/
    python scripts/bench_rules.py run rules/*.jsonl --model smollm2-135m --out results.jsonl
    python scripts/bench_rules.py run rules/*.jsonl --model smollm2-135m --curve --out curve.jsonl
    python scripts/bench_rules.py row rules/*.jsonl --model smollm2-135m --out row.jsonl

`mine` writes one rule file for each of `RULES`; `--calls FILE` adds code from a JSON Lines file with `before` and `line`.
`run` measures every method on every rule and prints a table; `--curve` measures mint for 1, 2, 4, 8 and 16 learn prompts.
`row` repairs all rules one after another (the first `--limit` of them), as `mint repair --rule` does, and tests all of them
again after `--at` 1, 5, 10 and 20 and at the end; what it refuses counts as the model is without it. Rows are written as they
are measured, and the same command goes on where it stopped. Everything is free greedy generation; `changed` and
`broken` are shares of the tokens of the lines that ship for measuring, in `run` of held-out code as well (argmax, with the text fed in). Settings of the
competitors are chosen on the learn prompts, or are those of their papers; `dev` rules may be used to choose ours.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from mint.case import Case, load_cases
from mint.errors import MintError
from mint.evaluation.drift import pass_at_1
from mint.evaluation.ledger import Ledger
from mint.files import write_file
from mint.measure import judges, specificity
from mint.model.lm import LM
from mint.model.loading import BUILTIN, load_lm
from mint.patch import Patch, make_edit
from mint.reference import passages, statistics
from mint.rules.curve import COUNTS
from mint.rules.cut import settle
from mint.rules.figures import Prompted, count_faults, count_kept, lines_of, prepared, write_all
from mint.rules.judge import text_of
from mint.rules.mine import Search, mine
from mint.rules.repair import RuleRepair, RuleWishes, repair_rules
from mint.rules.rule import Rule, dump_rule, load_rule
from mint.rules.solve import RuleSettings, solve_rule
from mint.session import Session, measured_sequences
from mint.solver.baselines import star
from mint.solver.baselines.random_controls import random_direction
from mint.solver.problem import Problem, Settings, changed, put_in, take_out

RULES = {
    "clock": ("time.time()", "time.perf_counter()", "dev"),
    "md5": ("hashlib.md5(", "hashlib.sha256(", "dev"),
    "none": ("$X == None", "$X is None", "dev"),
    "warn": ("logger.warn(", "logger.warning(", "dev"),
    "getcwd": ("os.getcwd()", "Path.cwd()", ""),
    "call": ("subprocess.call(", "subprocess.run(", ""),
    "system": ("os.system(", "subprocess.run(", ""),
    "encoding": ("open($P)", 'open($P, encoding="utf-8")', ""),
    "pickle": ("pickle.load(", "json.load(", ""),
    "loop": ("asyncio.get_event_loop()", "asyncio.get_running_loop()", ""),
    "utcnow": ("datetime.utcnow()", "datetime.now(timezone.utc)", ""),
    "randint": ("random.randint(", "secrets.randbelow(", ""),
    "print": ("print(", "logger.info(", ""),
    "bare-except": ("except:", "except Exception:", ""),
    "mktemp": ("tempfile.mktemp(", "tempfile.mkstemp(", ""),
    "asserts": ("self.assertEquals(", "self.assertEqual(", ""),
    "asarray": ("np.array(", "np.asarray(", ""),
    "fullmatch": ("re.match(", "re.fullmatch(", ""),
    "isfile": ("os.path.exists(", "os.path.isfile(", ""),
    "orjson": ("json.dumps(", "orjson.dumps(", ""),
    "popen": ("subprocess.Popen(", "subprocess.run(", ""),
    "deepcopy": ("copy.copy(", "copy.deepcopy(", ""),
}
"""name -> (wrong, right, `dev` where settings may be chosen on it)."""
STEPS, RATE, RANK = 30, 5e-3, 8
"""Of the adapters: what EDAPIBench (arXiv 2511.21022) uses, one prompt there, all learn prompts here."""
STRENGTHS = (0.5, 1.0, 2.0, 4.0)

Writer = Callable[[Sequence[Prompted]], list[str]]


@dataclass
class Trial:
    """One rule on one model, and what a method may look at: the learn prompts and what is kept on the learn side."""

    lm: LM
    rule: Rule
    rows: list[Prompted]
    before: list[str]
    ids: list[list[int]]
    learnt: list[int]

    @property
    def learn(self) -> list[Prompted]:
        return [self.rows[i] for i in self.learnt]

    @property
    def targets(self):
        return settle(self.lm, [p.cut for p in self.learn])

    @property
    def keep(self):
        return [
            replace(p.cut.encoded, target=tuple(self.ids[i]))
            for i, p in enumerate(self.rows)
            if p.row.role != "fault" and p.row.split == "learn" and self.ids[i]
        ]

    def write(self, rows: Sequence[Prompted]) -> list[str]:
        return write_all(self.lm, rows)[0]

    def right(self, writer: Writer, rows: Sequence[Prompted]) -> int:
        return sum(t.startswith(p.row.target or "\0") for t, p in zip(writer(rows), rows, strict=True))


# ---------------------------------------------------------------------- methods


@contextmanager
def by_mint(trial: Trial) -> Iterator[tuple[Writer, dict]]:
    solution = _solution(trial)
    with changed(trial.lm, solution.change):
        yield trial.write, {"neurons": solution.neurons, "reason": solution.reason}


def _solution(trial: Trial):
    wrong = [p.cut.wrong_ids for p in trial.learn]
    return solve_rule(trial.lm, trial.targets, trial.keep, RuleSettings(), wrong=wrong)


@contextmanager
def by_random_direction(trial: Trial) -> Iterator[tuple[Writer, dict]]:
    """mint's neuron fires as it does, and writes a random vector of the same norm."""
    change = _solution(trial).change
    with changed(trial.lm, random_direction(trial.lm, change, 0) if isinstance(change, Patch) else None):
        yield trial.write, {}


@contextmanager
def by_random_neuron(trial: Trial) -> Iterator[tuple[Writer, dict]]:
    """mint's weights in another neuron of the layer, drawn at random: how much the choice of the carrier matters."""
    change = _solution(trial).change
    if isinstance(change, Patch):
        draw = torch.Generator().manual_seed(0)
        edits = []
        for edit in change.edits:
            index = int(torch.randint(trial.lm.block(edit.layer).d_ff, (1,), generator=draw))
            edits.append(make_edit(trial.lm, edit.layer, index, edit.after))
        change = replace(change, edits=tuple(edits))
    with changed(trial.lm, change):
        yield trial.write, {}


@contextmanager
def _by_adapter(trial: Trial, config, step_done: Callable = lambda *_: None) -> Iterator[tuple[Writer, dict]]:
    import peft

    lm = trial.lm
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(lm.model, config)
        weights = [p for p in lm.model.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(weights, lr=RATE)
        try:
            targets = trial.targets
            for step in range(1, STEPS + 1):
                optimiser.zero_grad()
                loss = 0.0
                with torch.enable_grad():
                    for one in targets:  # one at a time: the memory of one prompt
                        logits = lm.logits([one.ids], [one.positions])
                        part = torch.nn.functional.cross_entropy(
                            logits, torch.tensor(one.target, device=logits.device)
                        )
                        (part / len(targets)).backward()
                        loss += float(part.detach()) / len(targets)
                optimiser.step()
                step_done(adapted, step)
            yield trial.write, {"numbers": sum(p.numel() for p in weights), "loss": loss}
        finally:
            adapted.unload()
            lm.model.requires_grad_(False)
            lm.model.eval()


def _adapted_modules(lm: LM) -> list[str]:
    return [block.out for block in lm.layout.blocks if block is not None]


@contextmanager
def by_lora(trial: Trial) -> Iterator[tuple[Writer, dict]]:
    import peft

    config = peft.LoraConfig(
        r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=_adapted_modules(trial.lm)
    )
    with _by_adapter(trial, config) as found:
        yield found


@contextmanager
def by_adalora(trial: Trial) -> Iterator[tuple[Writer, dict]]:
    import peft

    config = peft.AdaLoraConfig(
        init_r=RANK + RANK // 2,
        target_r=RANK,
        lora_alpha=32,
        lora_dropout=0.0,
        tinit=STEPS // 6,
        tfinal=STEPS // 3,
        total_step=STEPS,
        target_modules=_adapted_modules(trial.lm),
    )
    with _by_adapter(trial, config, lambda model, step: model.base_model.update_and_allocate(step)) as found:
        yield found


@torch.no_grad()
def _states(lm: LM, layer: int, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """What the layer puts out at the last token of each sequence, [n, width]."""
    found = []

    def look(_module, _args, out):
        found.append((out[0] if isinstance(out, tuple) else out)[0, -1].float())

    handle = lm.layer(layer).register_forward_hook(look)
    try:
        for ids in sequences:
            lm.logits([ids], [[len(ids) - 1]])
    finally:
        handle.remove()
    return torch.stack(found)


@contextmanager
def _steering(lm: LM, layer: int, vector: torch.Tensor, gate) -> Iterator[None]:
    def add(_module, _args, out):
        state = out[0] if isinstance(out, tuple) else out
        moved = state + (gate(state.float()).unsqueeze(-1) * vector).to(state.dtype)
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = lm.layer(layer).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _by_vector(trial: Trial, probe: bool) -> Iterator[tuple[Writer, dict]]:
    """Difference in means, right minus wrong, added to the residual; layer and strength chosen on the learn prompts."""
    lm, best = trial.lm, (-1.0, 0.0, 0, None, None)
    prompts = [p.cut.encoded.prompt for p in trial.learn]
    for layer in sorted({lm.n_layers // 3, lm.n_layers // 2, 2 * lm.n_layers // 3, 5 * lm.n_layers // 6}):
        first = _states(lm, layer, [(*p.cut.encoded.prompt, p.cut.encoded.target[0]) for p in trial.learn])
        second = _states(lm, layer, [(*p.cut.encoded.prompt, p.cut.wrong_ids[0]) for p in trial.learn])
        vector = (first - second).mean(0)
        gate = _gate(lm, layer, prompts, [e.prompt for e in trial.keep]) if probe else _always
        for strength in STRENGTHS:
            with _steering(lm, layer, strength * vector, gate):
                right = trial.right(trial.write, trial.learn) / len(trial.learn)
            if (right, -strength) > best[:2]:
                best = (right, -strength, layer, strength * vector, gate)
    _, strength, layer, vector, gate = best
    with _steering(lm, layer, vector, gate):
        yield trial.write, {"layer": layer, "strength": -strength, "numbers": vector.numel() * (1 + probe)}


def _always(state: torch.Tensor) -> torch.Tensor:
    return torch.ones(state.shape[:-1], device=state.device)


def _gate(lm: LM, layer: int, faults, others):
    """A probe between the means of the last prompt tokens of faults and of what must stay (midpoint as threshold)."""
    yes, no = _states(lm, layer, faults).mean(0), _states(lm, layer, others).mean(0) if others else 0.0
    direction = yes - no
    middle = ((yes + no) / 2) @ direction
    return lambda state: ((state @ direction) > middle).float()


@contextmanager
def by_vector(trial: Trial) -> Iterator[tuple[Writer, dict]]:
    with _by_vector(trial, probe=False) as found:
        yield found


@contextmanager
def by_probed_vector(trial: Trial) -> Iterator[tuple[Writer, dict]]:
    with _by_vector(trial, probe=True) as found:
        yield found


@contextmanager
def by_comment(trial: Trial) -> Iterator[tuple[Writer, dict]]:
    """The rule in words, as a comment above the prompt."""
    wrong, right = RULES.get(trial.rule.name, (trial.learn[0].row.wrong, trial.learn[0].row.target, ""))[:2]
    note = f"# Never write {wrong}, always write {right} instead.\n"

    def writer(rows: Sequence[Prompted]) -> list[str]:
        told = []
        for one in rows:
            ids = tuple(trial.lm.encode_prompt(note + one.row.prompt))
            told.append(replace(one, cut=replace(one.cut, encoded=replace(one.cut.encoded, prompt=ids))))
        return trial.write(told)

    yield writer, {"tokens a prompt": len(trial.lm.tokenizer(note).input_ids), "runtime": True}


@contextmanager
def by_banned_strings(trial: Trial) -> Iterator[tuple[Writer, dict]]:
    """`bad_words_ids` of transformers: the wrong texts' tokens can never follow each other, anywhere."""
    lm = trial.lm
    banned = sorted({p.cut.wrong_ids for p in trial.learn})
    stops = sorted(lm.stop_ids())

    @torch.no_grad()
    def writer(rows: Sequence[Prompted]) -> list[str]:
        texts = []
        for one in rows:
            ask = one.ask
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=ask.tokens,
                eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else 0,
                bad_words_ids=[list(b) for b in banned],
            )
            ids = torch.tensor([ask.prompt], device=lm.device)
            out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            texts.append(text_of(lm, ask.prompt, out[0, len(ask.prompt) :].tolist()))
        return texts

    yield writer, {"runtime": True}


@contextmanager
def by_star(trial: Trial) -> Iterator[tuple[Writer, dict]]:
    """star, one learn prompt after another: it repairs single cases."""
    done = []
    try:
        for one, encoded in zip(trial.learn, trial.targets, strict=True):
            case = Case(one.row.id, one.row.prompt, one.row.target or "")
            solution = star.solve(trial.lm, Problem(case, encoded), Settings())
            if solution.change is not None:
                put_in(trial.lm, solution.change)
                done.append(solution.change)
        yield trial.write, {"solved": len(done)}
    finally:
        for change in reversed(done):
            take_out(trial.lm, change)


METHODS = {
    "mint": by_mint,
    "LoRA r=8": by_lora,
    "AdaLoRA r=8": by_adalora,
    "steering vector": by_vector,
    "steering vector, probe": by_probed_vector,
    "comment in the prompt": by_comment,
    "banned strings": by_banned_strings,
    "star": by_star,
    "random direction": by_random_direction,
    "random neuron": by_random_neuron,
}


# ---------------------------------------------------------------------- measuring


def trial_of(lm: LM, rule: Rule, learn: int) -> Trial:
    """A rule with its clean texts, and the faults to learn from: as the repair picks them, the first of every file first."""
    rows, _ = prepared(lm, rule)
    before, ids = write_all(lm, rows)
    seen: dict[str, int] = {}
    order = []
    for i, p in enumerate(rows):
        if (
            p.row.role == "fault"
            and p.row.split == "learn"
            and not before[i].startswith(p.row.target or "\0")
        ):
            turn = seen.setdefault(p.row.source or p.row.id, 0)
            seen[p.row.source or p.row.id] += 1
            order.append((turn, i))
    return Trial(lm, rule, rows, before, ids, [i for _, i in sorted(order)][:learn])


def measure(trial: Trial, method: str, clean: specificity.CleanOutputs) -> dict:
    """Figures of one method on one rule."""
    started = time.perf_counter()
    with METHODS[method](trial) as (writer, about):
        seconds = time.perf_counter() - started
        after = writer(trial.rows)
        effects = None if about.get("runtime") else specificity.compare(trial.lm, clean)
    lines = lines_of(trial.rows, trial.before, after)
    learnt = set(trial.learnt)
    return {
        "learn": count_faults([x for i, x in enumerate(lines) if i in learnt], {}),
        "unseen": count_faults([x for x in lines if x.row.role == "fault" and x.row.split == "unseen"], {}),
        "near": count_kept([x for x in lines if x.row.role == "near"]),
        "healthy": count_kept([x for x in lines if x.row.role == "healthy"]),
        "changed": None if effects is None else 1 - effects.argmax_unchanged,
        "broken": None if effects is None else effects.argmax_broken,
        "seconds": round(seconds, 2),
        "about": about,
    }


def ordinary(lm: LM) -> list[specificity.Measured]:
    """What side effects are measured on: the lines that ship, and the code that no solver reads."""
    text = (Path(__file__).parents[1] / "mint/data/heldout/code.txt").read_text(encoding="utf-8")
    own = passages(lm, [p.strip("\n") + "\n" for p in text.split("\n---\n")])
    return [*measured_sequences(lm), *map(specificity.of_ids, own)]


def run(args: argparse.Namespace) -> None:
    """Every method on every rule, or mint's learn-curve."""
    lm, ledger = load_lm(args.model, device=args.device, dtype=args.dtype), Ledger(args.out)
    statistics(lm)
    clean = specificity.clean_outputs(lm, ordinary(lm))
    jobs = [("mint", n) for n in COUNTS] if args.curve else [(m, args.learn) for m in args.methods or METHODS]
    for path in args.rules:
        rule = load_rule(path)
        whole = None
        for method, learn in jobs:
            key = f"{rule.name} {method} {learn}"
            if key in ledger:
                continue
            whole = whole or trial_of(lm, rule, max(n for _, n in jobs))
            trial = replace(whole, learnt=whole.learnt[:learn])
            if len(trial.learn) < learn:
                print(f"{key}: only {len(trial.learn)} faults to learn from, left out", flush=True)
                continue
            try:
                found = measure(trial, method, clean)
            except MintError as error:
                found = {"error": str(error)}
            ledger.append({"key": key, "rule": rule.name, "method": method, "n": learn} | found)
            print(f"{key}: {_brief(found)}", flush=True)
    print(table(list(ledger.rows.values())))


def _brief(row: dict) -> str:
    if "error" in row:
        return row["error"]
    unseen, near = row["unseen"], row["near"]
    return (
        f"unseen {unseen['right_after']}/{unseen['cases']}, near kept {near['kept']}/{near['cases']},"
        f" changed {row['changed']}, {row['seconds']} s"
    )


def table(rows: Sequence[dict]) -> str:
    """The results as a Markdown table: means over rules."""
    lines = [
        "| method | learn prompts | rules | learn right | unseen right | worst rule | near kept | healthy kept | changed | broken | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, n in dict.fromkeys((r["method"], r["n"]) for r in rows if "error" not in r):
        mine_ = [r for r in rows if (r["method"], r["n"]) == (method, n) and "error" not in r]

        def mean(values) -> str:
            found = [v for v in values if v is not None]
            return f"{sum(found) / len(found):.3f}" if found else "-"

        def small(values) -> str:
            found = [v for v in values if v is not None]
            return f"{sum(found) / len(found):.3%}" if found else "-"

        shares = [r["unseen"]["share"] for r in mine_ if r["unseen"]["share"] is not None]
        cells = (
            method, n, len(mine_), mean(r["learn"]["share"] for r in mine_), mean(shares),
            f"{min(shares):.2f}" if shares else "-", mean(r["near"]["share"] for r in mine_),
            mean(r["healthy"]["share"] for r in mine_), small(r["changed"] for r in mine_),
            small(r["broken"] for r in mine_), mean(r["seconds"] for r in mine_),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def row(args: argparse.Namespace) -> None:
    """Rules one after another in one session, as `mint repair --rule` does it; at checkpoints all so far are tested again.

    Programs are tasks with tests beside them (`python -m tasks humaneval`): pass@1 before the first rule and after the last,
    and with the same neurons writing random vectors as long as what they write now (`--controls` draws).
    """
    lm, ledger = load_lm(args.model, device=args.device, dtype=args.dtype), Ledger(args.out)
    rules = [load_rule(path) for path in args.rules[: args.limit]]
    done: list[tuple[str, list[Prompted], int]] = []
    refused: dict[str, str] = {}
    programs = [(load_cases(p), judges.load_tests_beside(p) or {}) for p in map(Path, args.programs)]
    if programs and "pass@1 at first" not in ledger:
        scores = [pass_at_1(lm, *one) for one in programs]
        ledger.append({"key": "pass@1 at first", "scores": scores})
        print(f"pass@1 at first: {json.dumps(scores)}", flush=True)

    def after(session: Session, one: RuleRepair) -> None:
        unseen = one.part("fault", "unseen")
        if one.reason is not None:
            refused[one.rule.name] = one.reason
        right = sum(x.right_after if one.success else x.right_before for x in unseen)
        faults = [p for p in prepared(lm, one.rule)[0] if p.row.role == "fault" and p.row.split == "unseen"]
        done.append((one.rule.name, faults, right))
        print(f"{one.rule.name}: {right}/{len(faults)} {one.reason or one.note or ''}", flush=True)
        if len(done) not in args.at and len(done) < len(rules):
            return
        now = {
            name: (
                sum(
                    t.startswith(p.row.target or "\0")
                    for t, p in zip(write_all(lm, rows)[0], rows, strict=True)
                ),
                first,
                len(rows),
            )
            for name, rows, first in done
        }
        effects = session.effects()
        ledger.append(
            {"key": f"row {len(done)}", "rules": len(done), "right now, at first, of": now, "refused": dict(refused),
             "changed": 0.0 if effects is None else 1 - effects.argmax_unchanged,
             "broken": 0.0 if effects is None else effects.argmax_broken}
            | ({"pass@1": [pass_at_1(lm, *one) for one in programs]} if programs and len(done) == len(rules) else {})
        )  # fmt: skip
        print(json.dumps(ledger.rows[f"row {len(done)}"]), flush=True)

    outcome = repair_rules(lm, rules, RuleWishes(learn=args.learn, accept=args.accept), after=after)
    for seed in range(args.controls) if programs and outcome.patch else ():
        if f"random direction {seed}" in ledger:
            continue
        with changed(lm, random_direction(lm, outcome.patch, seed)):
            scores = [pass_at_1(lm, *one) for one in programs]
        ledger.append({"key": f"random direction {seed}", "pass@1": scores})
        print(f"pass@1 with random directions, draw {seed}: {json.dumps(scores)}", flush=True)


def mine_all(args: argparse.Namespace) -> None:
    """One rule file for each of `RULES` that the model has the habit of."""
    lm, out = load_lm(args.model, device=args.device, dtype=args.dtype), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as spare:
        folders = [*args.folders, *([_calls(args.calls, Path(spare))] if args.calls else [])]
        for name in args.names or RULES:
            path = out / f"{name}.jsonl"
            if path.exists():
                continue
            wrong, right, _ = RULES[name]
            search = Search(wrong, right, tuple(folders), name, args.limit, exclude=tuple(args.exclude))
            try:
                mined = mine(lm, search)
            except MintError as error:
                print(f"{name}: {error}", flush=True)
                continue
            write_file(path, dump_rule(mined.rule))
            print(f"{name}: {json.dumps(mined.as_dict())}", flush=True)


def _calls(path: str, folder: Path) -> str:
    """Files of source code from rows with `before` and `line`."""
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
        record = json.loads(text)
        (folder / f"call_{number}.py").write_text(record["before"] + record["line"] + "\n", encoding="utf-8")
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, function in (("mine", mine_all), ("run", run), ("row", row)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--model", default=BUILTIN)
        command.add_argument("--device", default="cpu")
        command.add_argument("--dtype", default="auto")
        command.add_argument("--out", required=True)
        if name == "mine":
            command.add_argument("--from", dest="folders", action="append", required=True)
            command.add_argument("--calls")
            command.add_argument("--names", nargs="*")
            command.add_argument("--limit", type=int, default=60)
            command.add_argument("--exclude", nargs="*", default=["test", "tests"])
            continue
        command.add_argument("rules", nargs="+")
        command.add_argument("--learn", type=int, default=8)
        if name == "row":
            command.add_argument("--limit", type=int, help="only the first so many rules")
            command.add_argument(
                "--programs", action="append", default=[], help="cases with tests beside them"
            )
            command.add_argument(
                "--at",
                type=int,
                nargs="*",
                default=[1, 5, 10, 20],
                help="after how many rules all are tested again",
            )
            command.add_argument("--accept", type=float, default=RuleWishes.accept, help="as in mint repair")
            command.add_argument(
                "--controls",
                type=int,
                default=3,
                help="random directions whose pass@1 is asked, with --programs",
            )
        if name == "run":
            command.add_argument("--methods", nargs="*", choices=METHODS)
            command.add_argument("--curve", action="store_true")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
