"""Where one repair holds and where it is felt: contexts, wordings and near misses together. By free generation."""

from collections.abc import Sequence
from dataclasses import dataclass

from mint.case import Case
from mint.measure import contexts, near_misses
from mint.measure.contexts import Variant
from mint.measure.near_misses import NearMisses
from mint.model.lm import LM


@dataclass(frozen=True)
class Places:
    """The surroundings of one case. Made by `prepare`, on the model before the repair."""

    contexts: tuple[Variant, ...]
    wordings: tuple[Variant, ...]
    near: NearMisses


def prepare(lm: LM, case: Case, stop: str = "auto", keep: Sequence[str] = (), seed: int = 0) -> Places:
    """Surroundings of a case, and what the present model writes behind the near misses.

    keep: prompts, beyond the case's own `keep`, whose output must not change.
    """
    return Places(
        tuple(contexts.contexts(lm, case, stop, seed)),
        tuple(contexts.wordings(lm, case, stop)),
        near_misses.prepare(lm, case, stop, keep, seed),
    )


def measure(lm: LM, found: Places) -> dict:
    """On the present model: `contexts` and `wordings` {kind: {cases, right}}, `near_misses` {cases, became_target, changed}.

    right: the whole target was generated, exactly.
    """
    variants = (*found.contexts, *found.wordings)
    right = contexts.written_right(lm, variants)
    n = len(found.contexts)
    return {
        "contexts": contexts.by_kind(found.contexts, right[:n]),
        "wordings": contexts.by_kind(found.wordings, right[n:]),
        "near_misses": near_misses.measure(lm, found.near),
    }


def total(parts: Sequence[dict]) -> dict:
    """The counts of several `measure` results, added up."""
    found: dict[str, dict] = {"contexts": {}, "wordings": {}, "near_misses": {}}
    for part in parts:
        for name in ("contexts", "wordings"):
            for kind, counts in part[name].items():
                sums = found[name].setdefault(kind, {"cases": 0, "right": 0})
                for key, count in counts.items():
                    sums[key] += count
        for key, count in part["near_misses"].items():
            found["near_misses"][key] = found["near_misses"].get(key, 0) + count
    return found
