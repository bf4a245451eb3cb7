"""mint repairs a mistake or a habit of a deployed language model by changing one or two of its neurons.

    import mint

    lm = mint.load_lm("smollm2-135m")
    case = mint.Case("sort", "# sort list l in descending order\\n", "l.sort(reverse=True)\\n")
    outcome = mint.repair(lm, [case], mint.Wishes(), mint.SOLVERS["contexts"])
    mint.save_patch(outcome.patch, "fix.safetensors")

Names are imported on first use, so that `import mint` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see of `_HOMES`
    from mint.attribution import Attribution, attribute
    from mint.case import Case, Keep, load_cases
    from mint.errors import MintError
    from mint.evaluation.run import evaluate
    from mint.model.lm import LM
    from mint.model.loading import load_lm
    from mint.patch import NeuronEdit, Patch, applied, apply, compose, revert, scale
    from mint.patch import load as load_patch
    from mint.patch import save as save_patch
    from mint.rules.check import check_rule
    from mint.rules.mine import Search, mine
    from mint.rules.repair import RuleWishes, repair_rules
    from mint.rules.rule import Rule, load_rule
    from mint.session import Outcome, Wishes, repair
    from mint.solver import SOLVERS
    from mint.solver.problem import Settings

__version__ = "0.2.0"

_HOMES = {
    "Attribution": ("mint.attribution", "Attribution"),
    "Case": ("mint.case", "Case"),
    "Keep": ("mint.case", "Keep"),
    "LM": ("mint.model.lm", "LM"),
    "MintError": ("mint.errors", "MintError"),
    "NeuronEdit": ("mint.patch", "NeuronEdit"),
    "Outcome": ("mint.session", "Outcome"),
    "Patch": ("mint.patch", "Patch"),
    "Rule": ("mint.rules.rule", "Rule"),
    "RuleWishes": ("mint.rules.repair", "RuleWishes"),
    "SOLVERS": ("mint.solver", "SOLVERS"),
    "Search": ("mint.rules.mine", "Search"),
    "Settings": ("mint.solver.problem", "Settings"),
    "Wishes": ("mint.session", "Wishes"),
    "applied": ("mint.patch", "applied"),
    "apply": ("mint.patch", "apply"),
    "attribute": ("mint.attribution", "attribute"),
    "check_rule": ("mint.rules.check", "check_rule"),
    "compose": ("mint.patch", "compose"),
    "evaluate": ("mint.evaluation.run", "evaluate"),
    "load_cases": ("mint.case", "load_cases"),
    "load_lm": ("mint.model.loading", "load_lm"),
    "load_patch": ("mint.patch", "load"),
    "load_rule": ("mint.rules.rule", "load_rule"),
    "mine": ("mint.rules.mine", "mine"),
    "repair": ("mint.session", "repair"),
    "repair_rules": ("mint.rules.repair", "repair_rules"),
    "revert": ("mint.patch", "revert"),
    "save_patch": ("mint.patch", "save"),
    "scale": ("mint.patch", "scale"),
}

__all__ = [
    "Attribution",
    "Case",
    "Keep",
    "LM",
    "MintError",
    "NeuronEdit",
    "Outcome",
    "Patch",
    "Rule",
    "RuleWishes",
    "SOLVERS",
    "Search",
    "Settings",
    "Wishes",
    "applied",
    "apply",
    "attribute",
    "check_rule",
    "compose",
    "evaluate",
    "load_cases",
    "load_lm",
    "load_patch",
    "load_rule",
    "mine",
    "repair",
    "repair_rules",
    "revert",
    "save_patch",
    "scale",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mint' has no attribute '{name}'; it has {', '.join(__all__)}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
