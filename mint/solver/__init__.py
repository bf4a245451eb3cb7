"""Solvers by name: the minimal-edit solver and the baselines beside it."""

import difflib

from mint.errors import MintError
from mint.solver import in_contexts
from mint.solver import solve as minimal
from mint.solver.baselines import finetune, lora, mint_paper, random_controls, rank_one, star
from mint.solver.problem import Solver

SOLVERS: dict[str, Solver] = {
    in_contexts.NAME: in_contexts.solve,
    minimal.NAME: minimal.solve,
    "mint-paper": mint_paper.solve,
    "star": star.solve,
    "rank-one": rank_one.solve,
    "finetune": finetune.solve,
    "lora": lora.solve,
    "random": random_controls.solve,
}
DEFAULT = in_contexts.NAME


def named(name: str) -> Solver:
    """A solver of `SOLVERS`. Raises `MintError` for an unknown name, with the nearest and all known ones, and for one whose package is missing."""
    if name not in SOLVERS:
        near = difflib.get_close_matches(name, SOLVERS, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise MintError(f"unknown solver '{name}'; known are {', '.join(SOLVERS)}{hint}")
    if name == "lora":
        lora.check_library()
    return SOLVERS[name]
