"""Does a patch still do what it says? Its own cases and its rules' learn prompts, asked again of any model, by generating."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from mint.case import Case, case_from_dict, case_to_dict
from mint.errors import CaseError
from mint.model.lm import LM, Encoded
from mint.model.text import Template
from mint.patch.edit import Patch

_KEYS = tuple(f.name for f in fields(Case))


@dataclass(frozen=True)
class Answer:
    """What a model writes behind the prompt of one recorded case."""

    case: Case
    written: str

    @property
    def holds(self) -> bool:
        """Whether the target was written; a target without a stop may go on."""
        if self.case.stop == "none":
            return self.written.startswith(self.case.target)
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


def place_of(item: object) -> tuple[int, int, int] | None:
    """The neuron that an entry of a record names, as `NeuronEdit.place` does; None for what names none."""
    if not isinstance(item, dict):
        return None
    layer, expert, index = item.get("layer"), item.get("expert", -1), item.get("index")
    if type(layer) is int and type(expert) is int and type(index) is int:
        return layer, expert, index
    return None


def places_named(record: dict) -> list[tuple[int, int, int]]:
    """The neurons that the record of a case or a rule names; what names none is left out."""
    listed = record.get("neurons")
    places = map(place_of, listed if isinstance(listed, list) else [])
    return [place for place in places if place is not None]


def promised(patch: Patch) -> list[Case]:
    """All that a patch promises: its cases, and the learn prompts of its rules, each a case that ends nowhere."""
    found = cases_of(patch)
    for rule in patch.info.get("rules") or []:
        try:
            found += [
                case_from_dict(
                    {"id": f"{rule['name']}: {row['id']}", "prompt": row["prompt"], "target": row["target"]}
                    | {"stop": "none"}
                )
                for row in rule["learn"]
            ]
        except (CaseError, KeyError, TypeError):
            continue  # as for cases
    return found


def ask(lm: LM, cases: Iterable[Case], stop: str = "auto") -> list[Answer]:
    """What the model writes behind each case, greedily, up to its stop. Raises `CaseError` as `LM.encode` does."""
    return [Answer(c, lm.write(lm.encode(c, stop), c)) for c in cases]


def encoded(lm: LM, patch: Patch) -> list[Encoded]:
    """What a patch promises, as ids, dressed as it was when the patch was made."""
    dressed = _dressed(lm, patch)
    return [dressed.encode(c, patch.info.get("stop") or "auto") for c in promised(patch)]


def ask_patch(lm: LM, patch: Patch) -> list[Answer]:
    """`ask` for all that a patch promises, in the chat template where it was made in one."""
    return ask(_dressed(lm, patch), promised(patch), patch.info.get("stop") or "auto")


def template_of(patch: Patch) -> Template | None:
    """The chat that a patch was made in; None where its prompts are plain text."""
    system = patch.info.get("system")
    return Template(system if isinstance(system, str) else None) if patch.info.get("chat") else None


def _dressed(lm: LM, patch: Patch) -> LM:
    template = template_of(patch)
    return lm if template is None else replace(lm, template=lm.template or template)


def contradictions(patches: Iterable[Patch]) -> list[tuple[Case, Case]]:
    """Pairs of recorded cases that want different texts behind the same prompt."""
    seen: dict[str, Case] = {}
    found = []
    for case in (c for p in patches for c in promised(p)):
        other = seen.setdefault(case.prompt, case)
        if other.target != case.target:
            found.append((other, case))
    return found


def as_cases(patch: Patch) -> list[dict]:
    """The recorded cases as JSON objects of a case file."""
    return [case_to_dict(c) for c in cases_of(patch)]
