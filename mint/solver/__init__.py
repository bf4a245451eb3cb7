"""Solvers by name: the minimal-edit solver and the baselines beside it."""

from mint.solver import solve as minimal
from mint.solver.baselines import finetune, lora, mint_paper, random_controls, rank_one, star
from mint.solver.problem import Solver

SOLVERS: dict[str, Solver] = {
    "mint": minimal.solve,
    "mint-paper": mint_paper.solve,
    "star": star.solve,
    "rank-one": rank_one.solve,
    "finetune": finetune.solve,
    "lora": lora.solve,
    "random": random_controls.solve,
}
