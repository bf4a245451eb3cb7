"""What an evaluation is asked for, as one object, and the plan made of it before the first repair.

Knows which rows there will be and what their keys depend on; measures nothing but the yardstick.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mint.case import Case
from mint.errors import MintError
from mint.evaluation import controls as controls_module
from mint.evaluation import measuring
from mint.evaluation.controls import NO_EDIT, Control
from mint.evaluation.drift import Drift
from mint.evaluation.measuring import Options, Skipped, Yardstick
from mint.model.lm import LM
from mint.patch import versions
from mint.reference import reference_digest
from mint.solver import DEFAULT, SOLVERS, named
from mint.solver.problem import Settings, Solver

_FORMAT = 2
"""Part of every key: raised when a row's meaning changes, so that old rows are not taken for new ones."""


@dataclass(frozen=True)
class Request:
    """What is asked of an evaluation, beyond the model and the cases."""

    solvers: Sequence[str] = (DEFAULT,)
    registry: Mapping[str, Solver] | None = None
    """Solvers by name; None: `mint.solver.SOLVERS`."""
    controls: Mapping[str, Control] | None = None
    """Controls by name; None: all that are installed."""
    settings: Settings = field(default_factory=Settings)
    options: Options = field(default_factory=Options)
    drift: Drift | None = None
    """How repairs in a row are measured; None: there are none."""
    seed: int = 0
    limit: int | None = None
    """How many cases to repair, drawn with the seed; None: all."""
    others: Sequence[Case] | None = None
    """Cases of other tasks to measure side effects on; None: the lines that ship."""
    heldout: Sequence[str] | None = None
    """Ordinary code; None: what ships."""
    tests: Mapping[str, dict] | None = None
    """By case id, for tasks judged by running."""
    skipped: Sequence[Skipped] = ()
    """Rows of the input that did not become cases, to be counted."""
    save_patches: bool = True
    retry_errors: bool = False
    """Run rows again that ended in an error."""
    page: bool = True
    heat_maps: int = 3
    """How many cases at the head of the page get an attribution heat map, seconds each on a small model."""


@dataclass(frozen=True)
class Plan:
    """One evaluation, decided before the first repair."""

    chosen: list[Case]
    solvers: dict[str, Solver]
    controls: dict[str, Control]
    settings: Settings
    stick: Yardstick
    out: Path
    key: str
    """Digest of the model, the settings, the options and the texts measured on."""
    clean_weights: str
    save_patches: bool = True

    def row_key(self, case: Case, name: str) -> str:
        """Key of a row; a control's depends on the solver that it imitates."""
        base = next(iter(self.solvers)) if name in self.controls and name != NO_EDIT else None
        return measuring.digest([self.key, measuring.case_digest(case), name, base])


def make(lm: LM, cases: Sequence[Case], out: str | Path, request: Request) -> tuple[Plan, list[Skipped]]:
    """The plan, and the cases that cannot be used. Raises `MintError` for an unknown solver and for no usable case."""
    solvers = named_solvers(request.solvers, request.registry)
    controls = controls_module.installed() if request.controls is None else request.controls
    settings, options, seed = replace(request.settings, seed=request.seed), request.options, request.seed
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MintError(f"{out}: cannot be made ({error.strerror}); give another --out folder") from None
    if not cases:
        raise MintError("expected at least one case to evaluate, found none; give a file of cases")
    encoded, dropped = measuring.usable(lm, cases, options)
    first = {c.id: c for c in reversed(cases)}
    good = [first[i] for i in encoded]
    if not good:
        raise MintError(
            f"no usable case among {len(cases)}; the first: {dropped[0].where}: {dropped[0].reason}"
        )
    stick = measuring.yardstick(
        lm,
        good,
        encoded,
        others=request.others,
        code=request.heldout,
        options=options,
        seed=seed,
        tests=request.tests,
    )
    weights = measuring.weights_digest(lm)
    key = measuring.digest(
        {
            "format": _FORMAT,
            "model": [weights, lm.tokenizer_hash, str(lm.dtype), repr(lm.template)],
            "settings": asdict(replace(settings, reference=())),
            "mint": versions()["mint"],
            "reference": reference_digest(settings.reference),
            "options": asdict(options),
            "seed": seed,
            "pool": [measuring.case_digest(c) for c in good],
            "others": list(stick.other_tasks.sequences) if stick.other_tasks else [],
            "ordinary": list(stick.ordinary.sequences) if stick.ordinary else [],
            "tests": request.tests or {},
        }
    )
    controls = {n: c for n, c in controls.items() if n not in solvers}
    chosen = measuring.draw(good, request.limit, seed)
    return Plan(chosen, solvers, controls, settings, stick, out, key, weights, request.save_patches), dropped


def named_solvers(names: Sequence[str], registry: Mapping[str, Solver] | None = None) -> dict[str, Solver]:
    """Solvers by name, in the order asked for. Raises `MintError` for an unknown name, with the known ones."""
    if not names:
        raise MintError(f"name at least one solver; known are {', '.join(registry or SOLVERS)}")
    if registry is None:
        return {name: named(name) for name in dict.fromkeys(names)}
    for name in names:
        if name not in registry:
            raise MintError(f"unknown solver '{name}'; known are {', '.join(registry)}")
    return {name: registry[name] for name in dict.fromkeys(names)}
