"""`attribute`: the neurons behind a fault, and how far to trust the list.

Screening by a linear (or better) estimate, then exact patching of what it brings up, of the neurons that write most
(very large activations linearise badly) and of a random sample of the rest. Every figure a reader needs to doubt the
result is printed: agreement of estimate and exact effect, stability, joint effects, matched controls, a no-op patch.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mint.attribution import methods
from mint.attribution.exact import (
    Run,
    exact_all,
    exact_scores,
    joint_effect,
    leave_one_out,
    noise_scores,
    record_run,
    row_logits,
)
from mint.attribution.faults import Fault, find_faults
from mint.attribution.linear import LinearScores, linear_scores
from mint.attribution.references import Reference, draws, make_reference
from mint.case import Case
from mint.console import quiet
from mint.errors import CaseError, MintError
from mint.model.experts import focused_at
from mint.model.lm import LM, Encoded
from mint.reference import Statistics, statistics

DAMAGE_KL = 1.0
"""KL (nats) of the fault's next-token distribution above which a patch counts as damage rather than explanation."""
ALWAYS_ON = 0.5
"""A neuron with E[n]^2 >= this share of E[n^2] on reference text is always on: a bias, no detector."""
TAIL = 160
"""Most neurons drawn at random from those not screened, to bound what screening missed."""
CONTROLS = 20
"""Matched random neurons of the same layer for each of the guiltiest."""
CONTEXTS = 4
"""Neutral first lines put before the prompt to test stability where a case has no rephrasings."""

Neuron = tuple[int, int]


@dataclass(frozen=True)
class Attribution:
    """Which neurons are behind one fault. Effects are changes of logit(wrong) - logit(desired): guilty is negative."""

    fault: dict
    """position (in prompt + target, its *next* token is wrong), wrong and desired (text and ids), logit_difference."""
    reference: str
    method: str
    neurons: list[dict]
    """Most guilty first."""
    agreement: dict
    """spearman, sign, recall_at_10 and more; see docs/attribution.md."""
    run: Run = field(repr=False, compare=False)
    """The forward up to the fault, from which further patching can restart."""
    used: Reference = field(repr=False, compare=False)
    """The values that neurons were set to."""
    opposing: list[dict] = field(default_factory=list)
    """The neurons that hold the fault back, strongest first: replacing them makes it worse."""
    always_on: list[dict] = field(default_factory=list)
    """layer and index of listed neurons that are on everywhere: biases of the model, listed apart."""
    joint: dict = field(default_factory=dict)
    controls: list[dict] = field(default_factory=list)
    stability: dict = field(default_factory=dict)
    references: dict = field(default_factory=dict)
    """Spearman of the linear scores under this reference with those under others."""
    faults: list[dict] = field(default_factory=list)
    """All faults of the case."""
    checked: int = 0
    """How many neurons were patched exactly."""
    no_op: float = 0.0
    """|metric of a restart that changes nothing - metric of the plain forward|."""
    details: dict = field(default_factory=dict)

    def to_json(self) -> dict:
        """JSON values only: the keys of the contract and the figures behind them."""
        keys = (
            "fault",
            "reference",
            "method",
            "neurons",
            "agreement",
            "opposing",
            "always_on",
            "joint",
            "controls",
            "stability",
            "references",
            "faults",
            "checked",
            "no_op",
            "details",
        )
        return {key: getattr(self, key) for key in keys}


def attribute(
    lm: LM,
    case: Case,
    *,
    encoded: Encoded | None = None,
    reference: str = "mean",
    method: str = "linear",
    top: int = 20,
    exact: int | str = 128,
    counterfactual: str | None = None,
    seed: int = 0,
    fault: Fault | None = None,
    stats: Statistics | None = None,
    stability: bool = True,
    say: Callable[[str], None] = quiet,
) -> Attribution:
    """Rank the neurons behind a fault of a case and check the ranking exactly.

    encoded: `lm.encode(case)` if at hand. reference: `mean` (default), `zero`, `resample`, `counterfactual` (needs `counterfactual`, a prompt behind
    which the model is right). method: the estimate that screens, see `methods.METHODS`. top: neurons listed on each
    side. exact: how many of the guiltiest by estimate are patched exactly (half as many of the opposing, and as many of
    those that write most, go with them); `all` patches every neuron (a minute on a 135M model), 0 none. fault: which
    fault; default the first. stats: `statistics(lm)` if at hand. stability: rerun the screen on rephrasings, or behind
    neutral first lines. Raises `CaseError` where there is no fault or the counterfactual fails its checks, `MintError`
    for an unknown name or number.

    `exact=32, stability=False` is the quick form that goes with a repair.
    """
    started = time.perf_counter()
    encoded = encoded or lm.encode(case)
    _check(top, exact, method)
    found = find_faults(lm, encoded)
    if found or fault is not None:
        at = fault or found[0]
        lm = focused_at(lm, encoded.ids[: at.position + 1], at.position)
    if not found and fault is None:
        raise CaseError(
            f"case '{case.id}': expected a target that the model gets wrong, but it already prefers every token of it;"
            " give the target it fails on"
        )
    fault = fault or found[0]
    stats = stats or statistics(lm, say=say)
    say("patching linearly")
    run = record_run(lm, encoded.ids, fault)
    prefix = encoded.ids[len(encoded.prompt) : fault.position + 1]
    used = make_reference(
        lm, reference, run, stats, prefix=prefix, counterfactual=counterfactual, seed=seed, say=say
    )
    linear = linear_scores(lm, run.ids, [fault], used.values)
    flat = _Flat(lm, run, used, linear, stats)
    flat.estimate = (
        flat.linear if method == "linear" else _cat(methods.estimate(lm, run, used.values, method, seed))
    )
    say("patching exactly")
    _check_exactly(lm, flat, exact, top, seed, say)
    rows, opposing = _rows(lm, flat, top)
    result = Attribution(
        fault=_fault_json(lm, fault),
        reference=reference,
        method=method,
        neurons=rows,
        agreement=_agreement(flat),
        opposing=opposing,
        always_on=[{k: r[k] for k in ("layer", "index")} for r in rows + opposing if r["always_on"]],
        joint=_joint(lm, flat, rows) if exact != 0 else {},
        controls=_controls(lm, flat, rows) if exact != 0 else [],
        stability=_stability(lm, flat, encoded, case, say) if stability else {},
        references=_between_references(lm, flat, stats, stability, say),
        faults=[_fault_json(lm, f) for f in found],
        checked=len(flat.checked),
        no_op=run.no_op_error,
        details={
            "scope": "this prompt only; another prompt may have other causes",
            "direction": "denoising: in the faulty run one neuron at a time gets its reference value",
            "prompt_ids": list(encoded.prompt),
            "counterfactual_ids": list(used.prompt_ids) if used.prompt_ids else None,
            "counterfactual_aligned": used.aligned,
            "seed": seed,
            "seconds": round(time.perf_counter() - started, 3),
        },
        run=run,
        used=used,
    )
    _name_experts(lm, result)
    return result


def _name_experts(lm: LM, result: Attribution) -> None:
    """Inside, neurons are numbered through all blocks of a layer; in the result they are named (layer, expert, index)."""
    worst = [result.agreement["worst_miss"]] if result.agreement.get("worst_miss") else []
    for row in [*result.neurons, *result.opposing, *result.always_on, *result.controls, *worst]:
        expert, row["index"] = lm.place(row["layer"], row["index"])
        if expert is not None:
            row["expert"] = expert


def _check(top: int, exact: int | str, method: str) -> None:
    methods.check_method(method)
    if not isinstance(top, int) or top < 1:
        raise MintError(f"expected a number of neurons to list of at least 1, found {top}")
    if exact != "all" and (not isinstance(exact, int) or exact < 0):
        raise MintError(f"expected 'all' or a number of neurons to patch exactly, found {exact!r}")


def _cat(layers: Sequence[Tensor]) -> Tensor:
    return torch.cat([layer.detach().float().cpu() for layer in layers])


class _Flat:
    """All neurons of the model in one row, layer after layer, with what is known about each at the fault. CPU."""

    def __init__(self, lm: LM, run: Run, used: Reference, linear: LinearScores, stats: Statistics):
        self.run, self.used = run, used
        self.sizes = [lm.d_ff(layer) for layer in range(lm.n_layers)]
        self.starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.linear, self.summed = _cat([s[0] for s in linear.at_fault]), _cat([s[0] for s in linear.summed])
        self.estimate = self.linear
        self.value = _cat([n[-1] for n in run.neurons])
        self.reference = _cat([v[len(run.ids) - 1] if v.dim() == 2 else v for v in used.values])
        self.mean, self.square = _cat(stats.neurons_mean), _cat(stats.neurons_square)
        norms = _cat([lm.columns(layer).float().norm(dim=1) for layer in range(lm.n_layers)])
        stream = torch.tensor(
            [float(run.hidden[layer][0, -1].float().norm()) for layer in range(lm.n_layers)]
        )
        self.write = (self.reference - self.value).abs() * norms
        self.share = self.write / stream.repeat_interleave(torch.tensor(self.sizes)).clamp_min(1e-12)
        self.exact = torch.full_like(self.linear, float("nan"))
        self.tail: list[int] = []

    @property
    def checked(self) -> Tensor:
        """Places of the neurons whose exact effect is known."""
        return (~self.exact.isnan()).nonzero()[:, 0]

    def place(self, neuron: Neuron) -> int:
        return self.starts[neuron[0]] + neuron[1]

    def neuron(self, place: int) -> Neuron:
        # A layer without neurons starts where the next one does.
        layer = max(i for i, start in enumerate(self.starts) if start <= place and self.sizes[i])
        return layer, place - self.starts[layer]

    def known(self) -> Tensor:
        """Exact effects where known, else the estimate."""
        return torch.where(self.exact.isnan(), self.estimate, self.exact)


def screened(estimate: Tensor, share: Tensor, count: int) -> list[int]:
    """Places worth patching exactly: the guiltiest, half as many opposing, and as many of the largest writes.

    estimate: scores of all neurons; share: size of each neuron's change against the residual stream it enters. Neurons
    that write a tenth of the stream or more are where linear patching is wrong, in either direction.
    """
    order = estimate.argsort()
    large = share.argsort(descending=True)
    half = max(1, count // 2)
    return sorted({*order[:count].tolist(), *order[-half:].tolist(), *large[:count].tolist()})


def _check_exactly(lm: LM, flat: _Flat, exact: int | str, top: int, seed: int, say: Callable) -> None:
    if exact == 0:
        return
    if exact == "all":
        flat.exact = _cat(exact_all(lm, flat.run, flat.used.values, say))
        return
    places = screened(flat.estimate, flat.share, max(int(exact), top))
    generator = torch.Generator().manual_seed(seed)
    rest = torch.ones(len(flat.estimate), dtype=torch.bool)
    rest[places] = False
    rest = rest.nonzero()[:, 0]
    count = min(TAIL, int(exact) + 32)
    flat.tail = rest[torch.randperm(len(rest), generator=generator)[:count]].tolist()
    places = places + flat.tail
    effects = exact_scores(lm, flat.run, [flat.neuron(p) for p in places], flat.used.values)
    flat.exact[torch.tensor(places)] = effects


# ---------------------------------------------------------------------- rows


def _token(lm: LM, token: int) -> str:
    return lm.decode([token])


def _fault_json(lm: LM, fault: Fault) -> dict:
    return {
        "position": fault.position,
        "wrong": _token(lm, fault.wrong),
        "desired": _token(lm, fault.desired),
        "wrong_id": fault.wrong,
        "desired_id": fault.desired,
        "logit_difference": fault.logit_difference,
    }


def _rows(lm: LM, flat: _Flat, top: int) -> tuple[list[dict], list[dict]]:
    """Rows of the `top` guiltiest neurons, and of the `top` most opposing."""
    known = flat.known()
    pool = flat.checked if len(flat.checked) else torch.arange(len(known))
    order = pool[known[pool].argsort()].tolist()
    guilty = [p for p in order if known[p] < 0][:top] or order[:1]
    opposing = [p for p in reversed(order) if known[p] > 0 and p not in guilty][:top]
    rows = [_row(flat, p) for p in guilty + opposing]
    if len(flat.checked):
        _add_halves(lm, flat, rows)
        _add_noise(lm, flat, rows[: len(guilty)])
    _add_reading(lm, flat, rows)
    return rows[: len(guilty)], rows[len(guilty) :]


def _row(flat: _Flat, place: int) -> dict:
    layer, index = flat.neuron(place)
    value, square = float(flat.value[place]), float(flat.square[place])
    exact = None if flat.exact[place].isnan() else float(flat.exact[place])
    known = float(flat.known()[place])
    # What a value edit of this neuron costs elsewhere, per logit it could gain here (ROME's damage, one neuron).
    damage = square / value**2 if value else None
    return {
        "layer": layer,
        "index": index,
        "position": flat.run.fault.position,
        "linear": float(flat.linear[place]),
        "exact": exact,
        "linear_summed": float(flat.summed[place]),
        "estimate": float(flat.estimate[place]),
        "value": value,
        "reference_value": float(flat.reference[place]),
        "mean_square": square,
        "damage": damage,
        "specificity": None if not damage else known / damage,
        "write_share": float(flat.share[place]),
        "always_on": bool(flat.mean[place] ** 2 >= ALWAYS_ON * flat.square[place]) and square > 0,
    }


def _add_halves(lm: LM, flat: _Flat, rows: list[dict]) -> None:
    """Both halves of the metric, and what else the patch does to the next token (rule R2: damage looks like repair)."""
    fault = flat.run.fault
    members = [(r["layer"], r["index"], r["reference_value"]) for r in rows]
    logits = row_logits(lm, flat.run, members).cpu()
    base, logs = logits[-1], logits.log_softmax(1)
    before = logs[-1]
    for row, after, log in zip(rows, logits[:-1], logs[:-1], strict=True):
        kl = float((before.exp() * (before - log)).sum())
        desired = float(after[fault.desired] - base[fault.desired])
        row |= {
            "wrong_change": float(after[fault.wrong] - base[fault.wrong]),
            "desired_change": desired,
            "desired_logprob_change": float(log[fault.desired] - before[fault.desired]),
            "desired_rank": int((after > after[fault.desired]).sum()),
            "kl": kl,
            "entropy_change": float((before.exp() * before).sum() - (log.exp() * log).sum()),
        }
        row["damage_flag"] = (row["exact"] or 0) < 0 and (
            row["desired_logprob_change"] <= 0 or kl > DAMAGE_KL
        )


def _add_noise(lm: LM, flat: _Flat, rows: list[dict]) -> None:
    """The other direction: the faulty value put into a healthy run."""
    members = [(r["layer"], r["index"], r["reference_value"]) for r in rows]
    if flat.used.healthy is not None:
        effects = noise_scores(lm, flat.used.healthy, flat.run, [m[:2] for m in members])
    else:
        effects = leave_one_out(lm, flat.run, members)
    for row, effect in zip(rows, effects.tolist(), strict=True):
        row["noise"] = effect


def _add_reading(lm: LM, flat: _Flat, rows: list[dict]) -> None:
    """How much of the effect is read off directly, and which tokens the neuron's write promotes and suppresses."""
    if lm.layout.final_norm is None:
        return
    reads = methods.direct_gradient(lm, flat.run).cpu()
    for row in rows:
        column = lm.columns(row["layer"])[row["index"]].detach().float().cpu()
        row["direct"] = (row["reference_value"] - row["value"]) * float(column @ reads)
    for row, (promotes, suppresses) in zip(rows, logit_lens(lm, rows), strict=True):
        row["promotes"], row["suppresses"] = promotes, suppresses


@torch.no_grad()
def logit_lens(lm: LM, rows: Sequence[dict], count: int = 5) -> list[tuple[list[str], list[str]]]:
    """Tokens that each neuron's write at the fault pushes up and down most, through the final norm's weights."""
    head = lm.parameter(f"{lm.layout.unembedding}.weight")
    norm = lm.module(lm.layout.final_norm) if lm.layout.final_norm else None
    columns = torch.stack([lm.columns(r["layer"])[r["index"]].float().cpu() * r["value"] for r in rows])
    weight = getattr(norm, "weight", None)
    if weight is not None:
        columns = columns * weight.detach().float().cpu()
    pushed = columns.to(head.device, head.dtype) @ head.T  # [rows, vocab]
    up, down = pushed.float().topk(count).indices.tolist(), (-pushed.float()).topk(count).indices.tolist()
    return [([_token(lm, t) for t in a], [_token(lm, t) for t in b]) for a, b in zip(up, down, strict=True)]


# ---------------------------------------------------------------------- how far to trust it


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Rank correlation (ties share their mean rank); None where one side is constant or there are fewer than 3."""
    from scipy.stats import spearmanr  # slow to import

    return _correlation(spearmanr, a, b)


def pearson(a: Tensor, b: Tensor) -> float | None:
    """Linear correlation; None where one side is constant or there are fewer than 3."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, a, b)


def _correlation(of: Callable, a: Tensor, b: Tensor) -> float | None:
    x, y = a.cpu().double().numpy(), b.cpu().double().numpy()
    if len(x) < 3 or (x == x[0]).all() or (y == y[0]).all():
        return None
    return float(of(x, y).statistic)


def sign_agreement(a: Tensor, b: Tensor) -> float:
    """Share of entries with the same sign."""
    return float((a.sign() == b.sign()).float().mean())


def recall_at(estimate: Tensor, exact: Tensor, k: int) -> float:
    """Share of the k guiltiest by exact effect among the k guiltiest by estimate."""
    k = min(k, len(exact))
    return len({*estimate.argsort()[:k].tolist()} & {*exact.argsort()[:k].tolist()}) / max(k, 1)


def _agreement(flat: _Flat) -> dict:
    """Estimate against exact effect over all neurons patched exactly, and a bound on what screening missed.

    recall_at_10: share of the ten guiltiest by exact effect that are among the estimate's own first ten; None where no
    more than ten were patched exactly, since it could not fail. screen_recall_at_10: share of them that the screen sent to
    the exact check; None where nothing else was patched.
    """
    at = flat.checked
    if not len(at):
        return {"spearman": None, "sign": None, "recall_at_10": None, "over": 0}
    estimate, exact = flat.estimate[at], flat.exact[at]
    sent = set(screened(flat.estimate, flat.share, 128)) if not flat.tail else None
    best = at[exact.argsort()[:10]].tolist()
    found = [p in sent if sent is not None else p not in set(flat.tail) for p in best]
    all_sent = sent is not None and sent >= set(at.tolist())
    deviation = (estimate - exact).abs()
    worst = int(at[deviation.argmax()])
    slope = float(estimate @ exact) / max(float(estimate.square().sum()), 1e-30)
    return {
        "spearman": spearman(estimate, exact),
        "sign": sign_agreement(estimate, exact),
        "recall_at_10": recall_at(estimate, exact, 10) if len(at) > 10 else None,
        "screen_recall_at_10": None if all_sent else sum(found) / len(found),
        "pearson": pearson(estimate, exact),
        "slope": slope,
        "worst_miss": dict(zip(("layer", "index"), flat.neuron(worst), strict=True))
        | {"estimate": float(flat.estimate[worst]), "exact": float(flat.exact[worst])},
        "over": len(at),
        "tail": _tail(flat),
    }


def _tail(flat: _Flat) -> dict | None:
    """The random sample of neurons that were not screened."""
    if not flat.tail:
        return None
    effects = flat.exact[torch.tensor(flat.tail)]
    return {
        "sampled": len(flat.tail),
        "of": len(flat.exact) - len(flat.checked) + len(flat.tail),
        "largest": float(effects.abs().max()),
        # No sampled neuron exceeds `largest`, so at most this share of the rest does (rule of three).
        "share_above_at_most": 3 / len(flat.tail),
    }


def _joint(lm: LM, flat: _Flat, rows: list[dict]) -> dict:
    """Joint effect of the first two, and of all listed, against the sum of their single effects (self-repair)."""
    out = {}
    for name, chosen in (("pair", rows[:2]), ("listed", rows)):
        members = [(r["layer"], r["index"], r["reference_value"]) for r in chosen]
        singles = sum(r["exact"] for r in chosen)
        joint = joint_effect(lm, flat.run, members)
        out[name] = {
            "neurons": [[m[0], m[1]] for m in members],
            "joint": joint,
            "sum_of_singles": singles,
            "ratio": joint / singles if singles else None,
        }
    return out


def _controls(lm: LM, flat: _Flat, rows: list[dict]) -> list[dict]:
    """For the first two: exact effects of the 20 neurons of the same layer whose change writes most nearly as much."""
    out = []
    for row in rows[:2]:
        layer, place = row["layer"], flat.place((row["layer"], row["index"]))
        inside = torch.arange(flat.starts[layer], flat.starts[layer] + flat.sizes[layer])
        near = (flat.write[inside] - flat.write[place]).abs()
        near[row["index"]] = float("inf")
        chosen = inside[near.argsort()[: min(CONTROLS, len(inside) - 1)]].tolist()
        effects = exact_scores(lm, flat.run, [flat.neuron(p) for p in chosen], flat.used.values)
        out.append(
            {
                "layer": layer,
                "index": row["index"],
                "matched": len(chosen),
                "mean_abs_effect": float(effects.abs().mean()) if len(chosen) else None,
                "percentile": float((effects.abs() < abs(row["exact"])).float().mean())
                if len(chosen)
                else None,
            }
        )
    return out


def jaccard(a: Sequence[int], b: Sequence[int]) -> float:
    """Size of the intersection over size of the union."""
    return len({*a} & {*b}) / max(1, len({*a} | {*b}))


def _stability(lm: LM, flat: _Flat, encoded: Encoded, case: Case, say: Callable) -> dict:
    """Jaccard@10 of the guiltiest by linear score here and under other wordings: rephrasings, or neutral first lines."""
    say("testing stability")
    if case.rephrasings:
        kind, prompts = "rephrasings", list(case.rephrasings)[:CONTEXTS]
    else:
        kind = "first lines"
        lines = ("\n", "# -*- coding: utf-8 -*-\n", "# Example\n", "\n\n")
        prompts = [line + case.prompt for line in lines[:CONTEXTS]]
    prefix = flat.run.ids[len(encoded.prompt) :]
    own = flat.linear.argsort()[:10].tolist()
    overlaps, same_fault = [], 0
    reference = flat.used.values if flat.used.healthy is None else None
    if reference is None:  # a counterfactual has the length of this prompt only
        reference = list(flat.reference.split(flat.sizes))
    for prompt in prompts:
        ids = [*lm.encode_prompt(prompt), *prefix]
        if len(ids) >= lm.context:
            continue
        fault = Fault(len(ids) - 1, flat.run.fault.wrong, flat.run.fault.desired, 0.0)
        scores = _cat([s[0] for s in linear_scores(lm, ids, [fault], reference).at_fault])
        overlaps.append(jaccard(own, scores.argsort()[:10].tolist()))
        same_fault += int(lm.logits([ids], [[len(ids) - 1]])[0].argmax()) == fault.wrong
    if not overlaps:
        return {}
    return {
        "kind": kind,
        "runs": len(overlaps),
        "jaccard_at_10": sum(overlaps) / len(overlaps),
        "jaccard_each": overlaps,
        "same_wrong_token": same_fault,
    }


def _between_references(lm: LM, flat: _Flat, stats: Statistics, resample: bool, say: Callable) -> dict:
    """Spearman of this reference's linear scores with those of the others; the gradient is the same, so it is free."""
    change = flat.reference - flat.value
    gradient = torch.where(change != 0, flat.linear / change, torch.zeros_like(change))
    others = {"mean": flat.mean, "zero": torch.zeros_like(flat.mean)}
    if resample:
        others["resample"] = _cat([layer[0] for layer in draws(lm, stats.key, say=say)])
    return {
        name: spearman(flat.linear, gradient * (value - flat.value))
        for name, value in others.items()
        if name != flat.used.name
    }
