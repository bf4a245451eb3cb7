"""What `mint repair` plugs into a session: the quick attribution, the verdict, the statistics measured beforehand."""

from mint.attribution import Attribution, attribute, verdict
from mint.attribution.verdict import Verdict
from mint.console import Say
from mint.errors import CaseError
from mint.model.lm import LM
from mint.patch import Patch
from mint.reference import Statistics, sample_layers, statistics
from mint.session import Attribute, GiveVerdict, Prepare, Wishes
from mint.solver import in_contexts
from mint.solver.problem import Problem


def preparation(wishes: Wishes, say: Say, explained: bool = False) -> Prepare:
    """The model's statistics on reference text, measured once and cached: what solvers and attribution ask for.

    explained: whether attribution follows, which asks for the neurons of all layers.
    """

    def prepare(lm: LM) -> Statistics:
        layers = wishes.settings.layers or sample_layers(lm)
        found = statistics(lm, wishes.settings.reference, say)
        in_files = wishes.solver == in_contexts.NAME and sample_layers(lm)
        beyond = [in_contexts.layer_of(lm, wishes.settings)] if in_files else []
        found.measure(layers, None if explained else layers, beyond)
        return found

    return prepare


def quick_attribution(wishes: Wishes, exact: int = 32) -> Attribute:
    """`mint.attribution.attribute` against the healthy mean, the best few neurons checked exactly."""

    def quick(lm: LM, problem: Problem) -> Attribution | None:
        try:
            case, encoded, seed = problem.case, problem.encoded, wishes.settings.seed
            return attribute(lm, case, encoded=encoded, exact=exact, stability=False, seed=seed)
        except CaseError:
            return None  # every token is right with the answer fed in: there is no fault to explain

    return quick


def cause_or_carrier() -> GiveVerdict:
    """`mint.attribution.verdict`: were the edited neurons the cause of the fault, or do they carry the repair?"""

    def give(lm: LM, problem: Problem, patch: Patch) -> Verdict | None:
        if any(edit.expert is not None for edit in patch.edits):
            return None  # the tests of the verdict compare with neurons that every token passes
        try:
            return verdict(lm, problem.case, patch, encoded=problem.encoded)
        except CaseError:
            return None  # no fault with the answer fed in: nothing to test

    return give
