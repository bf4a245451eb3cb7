"""Does a patch still do what it says? Its own cases, asked again of any model, by generating."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from mint.case import Case, case_from_dict, case_to_dict
from mint.errors import CaseError
from mint.model.lm import LM
from mint.patch.edit import Patch

_KEYS = tuple(f.name for f in fields(Case))


@dataclass(frozen=True)
class Answer:
    """What a model writes behind the prompt of one recorded case."""

    case: Case
    written: str

    @property
    def holds(self) -> bool:
        return self.written == self.case.target

    def to_json(self) -> dict:
        return {
            "id": self.case.id,
            "prompt": self.case.prompt,
            "target": self.case.target,
            "written": self.written,
            "holds": self.holds,
        }


def cases_of(patch: Patch) -> list[Case]:
    """The cases that a patch records; records that are no cases are left out."""
    found = []
    for record in patch.info.get("cases") or []:
        try:
            found.append(case_from_dict({k: record[k] for k in _KEYS if k in record}))
        except (CaseError, TypeError):
            continue  # the record is for people; a patch without a usable one still applies
    return found


def ask(lm: LM, cases: Iterable[Case], stop: str = "auto") -> list[Answer]:
    """What the model writes behind each case, greedily, up to its stop. Raises `CaseError` as `LM.encode` does."""
    return [Answer(c, lm.write(lm.encode(c, stop), c)) for c in cases]


def contradictions(patches: Iterable[Patch]) -> list[tuple[Case, Case]]:
    """Pairs of recorded cases that want different texts behind the same prompt."""
    seen: dict[str, Case] = {}
    found = []
    for case in (c for p in patches for c in cases_of(p)):
        other = seen.setdefault(case.prompt, case)
        if other.target != case.target:
            found.append((other, case))
    return found


def as_cases(patch: Patch) -> list[dict]:
    """The recorded cases as JSON objects of a case file."""
    return [case_to_dict(c) for c in cases_of(patch)]
