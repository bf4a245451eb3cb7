"""What a model directory says about the patches in it: `mint_patches.json`, and a section of its model card.

For people and audits; what may be applied or reverted is decided by the weights' bits alone.
"""

import hashlib
import json
import time
from pathlib import Path

from mint.errors import PatchError
from mint.patch.edit import Patch
from mint.patch.file import to_bytes

PROVENANCE = "mint_patches.json"
CARD = "README.md"
_BEGIN, _END = "<!-- mint patches: begin -->\n", "<!-- mint patches: end -->\n"


def patch_id(patch: Patch) -> str:
    """SHA-256 of a patch's file contents."""
    return hashlib.sha256(to_bytes(patch)).hexdigest()


def applied_patches(folder: str | Path) -> list[dict]:
    """What `mint_patches.json` of a directory lists, oldest first; empty without one.

    Raises `PatchError` if it cannot be read.
    """
    path = Path(folder) / PROVENANCE
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["patches"]
        if not all(isinstance(p, dict) for p in listed):
            raise ValueError("not a list of objects")
        return list(listed)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(f"{path} cannot be read ({error}); remove it if it is not mint's") from None


def _entry(patch: Patch) -> dict:
    cases = [c for c in patch.info.get("cases") or [] if isinstance(c, dict)]
    rules = patch.info.get("rules") or patch.info.get("rule")
    keys = ("id", "prompt", "target", "generated_before")
    entry = {
        "sha256": patch_id(patch),
        "applied": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "neurons": [e.named() for e in patch.edits],
        "cases": [{k: c[k] for k in keys if k in c} for c in cases],
    }
    return entry | ({"rule": rules} if rules else {})


def texts_after(folder: Path, patch: Patch, verb: str, card: bool) -> dict[str, str | None]:
    """File name -> its text after `verb` (`apply` or `revert`), None where the file goes; only files that change.

    card: begin a section in the model card if there is none yet; one that is there is kept up to date in any case.
    """
    listed = applied_patches(folder)
    if verb == "apply":
        listed.append(_entry(patch))
    else:
        identity = patch_id(patch)
        last = next((i for i in reversed(range(len(listed))) if listed[i].get("sha256") == identity), None)
        if last is not None:
            del listed[last]
    found: dict[str, str | None] = {
        PROVENANCE: json.dumps({"format": 1, "patches": listed}, indent=2) + "\n" if listed else None
    }
    try:
        old = (folder / CARD).read_bytes().decode("utf-8")
    except FileNotFoundError:
        old = ""
    except (OSError, UnicodeDecodeError):
        return found  # a card that is no text is left alone
    plain, section = _split(old)
    if section or (card and listed):
        found[CARD] = (plain + _section(listed, bool(plain)) if listed else plain) or None
    return found


def named_place(neuron: dict) -> str:
    """A listed neuron for people."""
    owner = f", expert {neuron['expert']}" if "expert" in neuron else ""
    return f"layer {neuron.get('layer')}{owner}, neuron {neuron.get('index')}"


def _split(card: str) -> tuple[str, str]:
    """A model card without mint's section, and the section."""
    begin, end = card.find(_BEGIN), card.find(_END)
    if begin < 0 or end < begin:
        return card, ""
    # The empty line in front of the section belongs to it, so that taking it out gives back the very file.
    start = begin - 1 if card[:begin].endswith("\n") and begin > 0 else begin
    return card[:start] + card[end + len(_END) :], card[start : end + len(_END)]


def _section(listed: list[dict], behind: bool) -> str:
    lines = [
        "## Patches",
        "",
        "Weights of single feed-forward neurons of this model were changed with mint. Each patch can be taken out again"
        f" with `mint revert`; `{PROVENANCE}` lists them.",
        "",
    ]
    for entry in listed:
        neurons = entry.get("neurons")
        neurons = neurons if isinstance(neurons, list) else []
        places = "; ".join(named_place(n) for n in neurons if isinstance(n, dict))
        lines.append(f"- `{str(entry.get('sha256'))[:16]}`: {places}")
        for case in entry.get("cases") or []:
            if isinstance(case, dict) and "target" in case:
                lines.append(
                    f"  - behind `{_inline(case.get('prompt'))}` it writes `{_inline(case['target'])}`"
                )
    return ("\n" if behind else "") + _BEGIN + "\n".join(lines) + "\n" + _END


def _inline(text: object, longest: int = 80) -> str:
    shown = json.dumps(str(text))[1:-1].replace("`", "'").replace("<", "\\u003c")
    return shown if len(shown) <= longest else "…" + shown[-longest:]
