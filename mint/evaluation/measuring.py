"""One row of an evaluation: the clean facts of a case, taken before any edit, and the same facts with a change applied.

Knows solutions and how to measure them; knows nothing about files, resuming or other processes.
"""

import hashlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch

from mint import guards
from mint.case import Case, case_from_dict, case_to_dict, read_jsonl
from mint.errors import CaseError, MintError
from mint.guards import Guard
from mint.measure import efficacy, generalization, places, specificity
from mint.measure.efficacy import Forced
from mint.measure.generalization import Rephrasings
from mint.measure.places import Places
from mint.measure.specificity import CleanOutputs
from mint.model.lm import LM, Encoded
from mint.model.stop import Stop
from mint.patch import Patch
from mint.reference import passages
from mint.solver.problem import Change, Problem, Solution, changed


@dataclass(frozen=True)
class Options:
    """What is measured, and how much of it. All of it is part of a row's key: other options, other rows."""

    stop: str = "auto"
    """Stop rule of `LM.encode`."""
    neighbours: int = 24
    """Other cases of the task on which side effects of a repair are measured; drawn per case with the seed."""
    outputs: int = 8
    """Of these, how many have their own greedy output checked for being kept exactly."""
    ordinary_tokens: int = 768
    """Tokens of held-out code on which side effects of a single repair are measured; drift measures all of it."""
    max_tokens: int = 1024
    """Cases whose prompt and target have more tokens are skipped, and listed."""
    max_target_tokens: int = 256
    """Cases whose target has more tokens are skipped, and listed."""
    judges: bool = True
    """Whether the code judges of the cases' tasks look at what is written."""
    contexts: bool = True
    """Whether contexts, wordings and near misses are measured (`mint.measure.places`)."""


# ---------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Skipped:
    """A row of the input that could not be used."""

    where: str
    reason: str


def read_cases(path: str | Path) -> tuple[list[Case], list[Skipped]]:
    """Cases of a JSON Lines file; every line that is none is listed with its reason instead of ending the run.

    Raises `CaseError` where the file itself cannot be read, or not one line of it is a case.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        )
        raise CaseError(f"{path}: {reason}; give a JSON Lines file of cases, one object a line") from None
    cases: list[Case] = []
    skipped: list[Skipped] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8").removeprefix("\ufeff")
            case = case_from_dict(json.loads(text), where)
        except UnicodeDecodeError as error:
            skipped.append(Skipped(where, f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8"))
        except json.JSONDecodeError as error:
            skipped.append(Skipped(where, f"not JSON ({error.msg}, column {error.colno}); one object a line"))
        except RecursionError:
            skipped.append(Skipped(where, "not JSON (nested too deeply); one object a line"))
        except CaseError as error:
            skipped.append(Skipped(where, str(error).removeprefix(f"{where}: ")))
        else:
            if case.id in seen:
                reason = f"id '{case.id}' was used on line {seen[case.id]}; ids must be unique"
                skipped.append(Skipped(where, reason))
                continue
            seen[case.id] = number
            cases.append(case)
    if not cases:
        first = f"; the first: {skipped[0].where}: {skipped[0].reason}" if skipped else ""
        raise CaseError(f"{path}: no usable case among {len(skipped)} lines{first}; mend the file")
    return cases, skipped


def read_skipped(path: str | Path) -> list[Skipped]:
    """Rows that were already skipped when the cases were made (`NAME.skipped.jsonl`: where, reason). Absent is none."""
    if not Path(path).exists():
        return []
    rows = [r for _, r in read_jsonl(path) if isinstance(r, dict)]
    return [Skipped(str(r.get("where")), str(r.get("reason"))) for r in rows]


def usable(lm: LM, cases: Sequence[Case], options: Options) -> tuple[dict[str, Encoded], list[Skipped]]:
    """Encode all cases on the clean model: ids by case id, and the cases that cannot be used, one line each."""
    encoded: dict[str, Encoded] = {}
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            skipped.append(Skipped(case.id, f"id '{case.id}' was used before; ids must be unique"))
            continue
        seen.add(case.id)
        try:
            found = lm.encode(case, options.stop)
        except CaseError as error:
            skipped.append(Skipped(case.id, str(error)))
            continue
        for count, limit, what in (
            (len(found.target), options.max_target_tokens, "target"),
            (len(found.ids), options.max_tokens, "prompt and target"),
        ):
            if count > limit:
                skipped.append(Skipped(case.id, f"{what}: {count} tokens, at most {limit} are measured"))
                break
        else:
            encoded[case.id] = found
    return encoded, skipped


def draw(cases: Sequence[Case], limit: int | None, seed: int) -> list[Case]:
    """`limit` cases drawn with `seed`, in their old order; all for None. Raises `MintError` for a limit below 1."""
    if limit is not None and limit < 1:
        raise MintError(f"the limit must be at least 1, found {limit}; leave it out to use all cases")
    if limit is None or limit >= len(cases):
        return list(cases)
    return [cases[i] for i in sorted(random.Random(seed).sample(range(len(cases)), limit))]


def neighbours(cases: Sequence[Case], case: Case, n: int, seed: int) -> list[Case]:
    """`n` other cases to measure side effects on: the same for the same cases, case, n and seed, on every machine.

    Cases that share the target, the prompt or a rephrasing of `case` are left out: a repair is meant to change those.
    """
    own = {case.prompt, *case.rephrasings}
    others = [c for c in cases if c.id != case.id and c.target != case.target and c.prompt not in own]
    return random.Random(f"{seed}:{case.id}").sample(others, min(n, len(others)))


# ---------------------------------------------------------------------- what side effects are measured on


def shipped_lines() -> list[Case]:
    """The lines that ship with mint for measuring side effects: Python, shell, assembly, running text."""
    text = (resources.files("mint") / "data" / "specificity.jsonl").read_text(encoding="utf-8")
    return [
        case_from_dict(json.loads(t) | {"id": f"line {i}"}) for i, t in enumerate(text.splitlines(), start=1)
    ]


def shipped_code() -> list[str]:
    """The held-out code that ships with mint, no statistic has seen it, passage by passage."""
    folder = resources.files("mint") / "data" / "heldout"
    texts = [
        f.read_text(encoding="utf-8") for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.is_file()
    ]
    return [p.strip("\n") + "\n" for text in texts for p in f"\n{text}\n".split("\n---\n") if p.strip()]


def spread(items: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Passages evenly spread over `items` until they hold about `tokens` tokens; all of them if there are no more."""
    total = sum(map(len, items))
    count = max(1, round(len(items) * tokens / total)) if total else 0
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else list(items)


@dataclass(frozen=True)
class Yardstick:
    """What stays the same for all cases of a run. Made by `yardstick`, on the clean model."""

    cases: tuple[Case, ...]
    """All usable cases: neighbours are drawn from them."""
    encoded: dict[str, Encoded]
    other_tasks: CleanOutputs | None
    ordinary: CleanOutputs | None
    code: tuple[list[int], ...]
    """All passages of held-out code, as ids; `ordinary` measures some of them."""
    options: Options
    seed: int
    tests: Mapping[str, dict] = field(default_factory=dict)


def yardstick(
    lm: LM,
    cases: Sequence[Case],
    encoded: dict[str, Encoded],
    *,
    others: Sequence[Case] | None,
    code: Sequence[str] | None,
    options: Options,
    seed: int,
    tests: Mapping[str, dict] | None = None,
) -> Yardstick:
    """Measure the clean model on what does not depend on the case.

    others: cases of other tasks; None: the lines that ship. code: ordinary code; None: the held-out code that ships.
    """
    others = shipped_lines() if others is None else list(others)
    found, _ = usable(lm, others, options)
    known = [c for c in others if c.id in found] if options.neighbours else []
    chosen = [found[c.id] for c in draw(known, max(1, options.neighbours), seed)]
    texts = passages(lm, shipped_code() if code is None else code)
    ordinary = spread(texts, options.ordinary_tokens)
    return Yardstick(
        tuple(c for c in cases if c.id in encoded),
        encoded,
        clean_outputs(lm, [specificity.of_case(e) for e in chosen]) if chosen else None,
        clean_outputs(lm, [specificity.of_ids(p) for p in ordinary]) if ordinary else None,
        tuple(texts),
        options,
        seed,
        tests or {},
    )


def clean_outputs(lm: LM, sequences: specificity.Sequences) -> CleanOutputs:
    """The clean model on some sequences, with states to restart from: edits of late layers are measured fast."""
    return specificity.clean_outputs(lm, sequences, states=specificity.late_layers(lm))


def first_changed_layer(lm: LM, changes: Sequence[Change | None]) -> int | None:
    """The lowest layer that any of these changes touches; None where a change names no neurons.

    The last layer where nothing changes: that is as far as measuring has to go.
    """
    made = [c for c in changes if c is not None]
    patches = [c for c in made if isinstance(c, Patch)]
    if len(patches) < len(made):
        return None
    return min((e.layer for p in patches for e in p.edits), default=lm.n_layers - 1)


# ---------------------------------------------------------------------- one case


@dataclass(frozen=True)
class CleanFacts:
    """What the clean model does with a case and its surroundings. Made before any solver sees the case."""

    case: Case
    encoded: Encoded
    written: str
    forced: Forced
    rephrasings: Rephrasings
    kept: list[Guard]
    neighbours: tuple[Case, ...]
    same_task: CleanOutputs | None
    outputs: CleanOutputs | None
    """Neighbours' own greedy outputs."""
    places: Places | None
    """Contexts, wordings and near misses."""


def clean_facts(lm: LM, case: Case, stick: Yardstick) -> CleanFacts:
    """Measure the clean model on a case. Raises `CaseError` where one of its `keep` prompts cannot be encoded."""
    options, encoded = stick.options, stick.encoded[case.id]
    near = neighbours(stick.cases, case, options.neighbours, stick.seed)
    near_encoded = [stick.encoded[c.id] for c in near]
    return CleanFacts(
        case,
        encoded,
        lm.write(encoded, case),
        efficacy.forced(lm, [encoded])[0],
        generalization.prepare(lm, case, options.stop),
        guards.collect(lm, case.keep, options.stop),
        tuple(near),
        clean_outputs(lm, [specificity.of_case(e) for e in near_encoded]) if near else None,
        _outputs(lm, near_encoded[: options.outputs], near[: options.outputs]),
        places.prepare(lm, case, options.stop, seed=stick.seed) if options.contexts else None,
    )


def _outputs(lm: LM, encoded: Sequence[Encoded], cases: Sequence[Case]) -> CleanOutputs | None:
    if not encoded:
        return None
    longest = max(len(e.target) for e in encoded) + 8
    stops = [Stop("line", lines=max(1, c.target.count("\n"))) for c in cases]
    written = lm.generate([e.prompt for e in encoded], longest, stops)
    return clean_outputs(
        lm, [specificity.of_output(e.prompt, w) for e, w in zip(encoded, written, strict=True)]
    )


def problem_of(clean: CleanFacts) -> Problem:
    """What a solver is given: the case, and the `keep` outputs that the clean model really writes."""
    return Problem(
        clean.case, clean.encoded, tuple(k.encoded for k in clean.kept if k.holds and k.encoded.target)
    )


def measure(lm: LM, clean: CleanFacts, solution: Solution, stick: Yardstick) -> dict:
    """All facts of one solved case, as JSON values, with the change applied meanwhile and taken out afterwards."""
    case, since = clean.case, first_changed_layer(lm, [solution.change])
    with changed(lm, solution.change):
        written = lm.write(clean.encoded, case)
        after = efficacy.forced(lm, [clean.encoded])[0]
        wider = generalization.measure(lm, clean.rephrasings)
        effects = {
            "same_task": _side_effects(lm, clean.same_task, since),
            "other_tasks": _side_effects(lm, stick.other_tasks, since),
            "ordinary_code": _side_effects(lm, stick.ordinary, since),
        }
        outputs = (
            specificity.compare(lm, clean.outputs, 0, since).sequences_unchanged if clean.outputs else None
        )
        kept = guards.still_hold(lm, clean.kept)
        around = places.measure(lm, clean.places) if clean.places else None
    return {
        "written_before": clean.written,
        "written_after": written,
        "efficacy": {
            "exact_match_generated": written == case.target,
            "exact_match_before": clean.written == case.target,
            "exact_match_forced": after.exact,
            "token_accuracy_before": clean.forced.token_accuracy,
            "token_accuracy_after": after.token_accuracy,
            "before": efficacy.scores(clean.written, case.target),
            "after": efficacy.scores(written, case.target),
        },
        "judge": {
            side: efficacy.judged(case, text, stick.tests) if stick.options.judges else None
            for side, text in (("before", clean.written), ("after", written))
        },
        "tokens": [lm.decode([t]) for t in clean.encoded.target],
        "margins_before": [round(m, 4) for m in clean.forced.margins],
        "margins_after": [round(m, 4) for m in after.margins],
        "generalization": wider,
        "specificity": effects,
        "outputs_kept": outputs,
        "neighbours": [c.id for c in clean.neighbours],
        "keep": {
            "asked": len(kept),
            "right_before": sum(k.holds for k in clean.kept),
            "kept": sum(kept),
            "broken": sum(k.holds and not now for k, now in zip(clean.kept, kept, strict=True)),
        },
        "edit": describe_change(solution.change),
        "places": around,
    }


def _side_effects(lm: LM, clean: CleanOutputs | None, since: int | None) -> dict | None:
    if clean is None or clean.tokens == 0:
        return None
    return specificity.compare(lm, clean, since=since).as_dict()


def describe_change(change: Change | None) -> dict:
    """Size of a change: neurons (None where whole matrices change), places, and the Frobenius norm of all of it."""
    if change is None:
        return {"neurons": 0, "places": [], "norm": 0.0}
    if isinstance(change, Patch):
        places = [e.named() for e in change.edits]
        pairs = [(e.before[r], e.after[r]) for e in change.edits for r in e.after]
        return {"neurons": len(change.edits), "places": places, "norm": _norm(pairs)}
    pairs = [(change.before[n], change.after[n]) for n in sorted(change.after)]
    return {"neurons": None, "places": [], "parameters": sorted(change.after), "norm": _norm(pairs)}


def _norm(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return sum((a.float() - b.float()).cpu().double().square().sum().item() for b, a in pairs) ** 0.5


# ---------------------------------------------------------------------- identity


def weights_digest(lm: LM) -> str:
    """A digest of all weights, bit for bit up to order within a tensor; fast enough to take after every repair."""
    sums = []
    for parameter in lm.model.parameters():
        raw = parameter.detach()
        whole = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.int8}[raw.element_size()]
        bits = raw.contiguous().view(whole)
        sums.append(bits.sum(dtype=torch.int64))
    values = torch.stack([s.cpu() for s in sums]).tolist()
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def digest(value: object) -> str:
    """SHA-256 (first 24 hex digits) of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def case_digest(case: Case) -> str:
    """Digest of a case's whole content: an edited case is another case."""
    return digest(case_to_dict(case))


def timed(function, *arguments):
    """(result, seconds) of a call."""
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started
