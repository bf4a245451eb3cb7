"""Ask the software that really serves a patch: llama.cpp with an adapter, or an OpenAI-compatible server."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from mint.case import Case
from mint.errors import MintError, PatchError
from mint.extras import need
from mint.model.text import Template
from mint.patch.algebra import scale
from mint.patch.edit import Patch
from mint.patch.record import Answer, promised, template_of

LLAMA_SCALES = (1.0, 1.25, 1.5, 2.0)
"""Scales of a patch that are tried in llama.cpp, least first."""
SPARE_TOKENS = 16
"""More tokens than characters of a target are never needed; these few show what comes behind it."""


def _cut(text: str, target: str) -> str:
    """What was written, as far as it says whether the target was: to the target's end, else to the end of the line."""
    if text.startswith(target):
        return target
    lines = target.count("\n") + (0 if target.endswith("\n") else 1)
    return "\n".join(text.split("\n")[:lines]) + ("\n" if target.endswith("\n") else "")


def _messages(template: Template, case: Case) -> list[dict[str, str]]:
    """A prompt as a chat."""
    system = [] if template.system is None else [{"role": "system", "content": template.system}]
    return [*system, {"role": "user", "content": case.prompt}]


def wrote_before(patch: Patch) -> dict[str, str]:
    """Case id -> what the model wrote without the patch, where the patch says so."""
    records = [c for c in patch.info.get("cases") or [] if isinstance(c, dict)]
    wrote = {
        str(c.get("id")): c["generated_before"] for c in records if isinstance(c.get("generated_before"), str)
    }
    rules = [r for r in patch.info.get("rules") or [] if isinstance(r, dict)]
    learnt = [(r.get("name"), row) for r in rules for row in r.get("learn") or [] if isinstance(row, dict)]
    return wrote | {f"{name}: {row.get('id')}": row["wrong"] for name, row in learnt if row.get("wrong")}


# ---------------------------------------------------------------------- llama.cpp


def check_library() -> None:
    """Raise `MintError` where llama.cpp's Python library is not installed."""
    need("generating in llama.cpp", "llama_cpp")


def ask_llama_cpp(model: str | Path, adapter: str | Path, patch: Patch) -> list[Answer]:
    """What llama.cpp writes greedily behind the patch's prompts, with a GGUF model and the exported adapter.

    Raises `MintError` without the `llamacpp` extra, or where llama.cpp cannot load the two files.
    """
    check_library()
    # By name: the package is no part of the development extra, so a type check cannot see it.
    llama_cpp = import_module("llama_cpp")
    if not Path(model).is_file():
        raise PatchError(f"{model}: no such file; give the GGUF file that is served")
    try:
        llama = llama_cpp.Llama(str(model), lora_path=str(adapter), n_ctx=0, logits_all=False, verbose=False)
    except (ValueError, RuntimeError) as error:
        raise PatchError(
            f"llama.cpp cannot load {model} with {adapter} ({' '.join(str(error).split())[:150]}); is the adapter of the same"
            " model?"
        ) from None
    answers, template = [], template_of(patch)
    for case in promised(patch):
        budget = len(llama.tokenize(case.target.encode(), add_bos=False)) + SPARE_TOKENS
        plain = {"max_tokens": budget, "temperature": 0.0, "repeat_penalty": 1.0}
        if template is None:
            text = llama.create_completion(case.prompt, **plain)["choices"][0]["text"]
        else:
            said = llama.create_chat_completion(_messages(template, case), **plain)
            text = said["choices"][0]["message"]["content"]
        answers.append(Answer(case, _cut(text or "", case.target)))
    return answers


def fit_to_llama_cpp(
    model: str | Path, patch: Patch, write: Callable[[Patch], Path]
) -> tuple[float, list[Answer]]:
    """(scale, answers): the least scale of the patch in `LLAMA_SCALES` at which llama.cpp writes every target.

    A quantised file has other margins than the weights that the patch was made on; scaling what the neurons write raises
    the patch's. write: writes the adapter of a patch, over the one before, and returns its path. Where no scale is enough
    the adapter of scale 1 and its answers are what is left. Raises as `ask_llama_cpp`.
    """
    first: list[Answer] = []
    for factor in LLAMA_SCALES:
        scaled = scale(patch, factor)
        answers = ask_llama_cpp(model, write(scaled), scaled)
        if all(a.holds for a in answers):
            return factor, answers
        first = first or answers
    write(patch)
    return 1.0, first


# ---------------------------------------------------------------------- a running server


def ask_server(
    url: str,
    cases: Sequence[Case],
    name: str | None = None,
    timeout: float = 60.0,
    template: Template | None = None,
) -> tuple[str, list[Answer]]:
    """(model name, answers) of an OpenAI-compatible server to the cases' prompts, greedily.

    name: model to ask; default the first that the server lists. timeout: seconds for one answer. template: ask in a chat
    (`/v1/chat/completions`); default plain text (`/v1/completions`). Raises `MintError` where
    nothing answers, or not in that way.
    """
    root = url.rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")):
        raise MintError(f"'{url}' is no address of a server; give one such as http://127.0.0.1:8000")
    if name is None:
        listed = _call(f"{root}/v1/models", None, timeout).get("data")
        if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
            raise MintError(f"{root} lists no models; give --served-model")
        name = str(listed[0].get("id"))
    answers = []
    for case in cases:
        body = {"model": name, "max_tokens": len(case.target.encode()) + SPARE_TOKENS, "temperature": 0}
        body |= {"prompt": case.prompt} if template is None else {"messages": _messages(template, case)}
        address = f"{root}/v1/{'completions' if template is None else 'chat/completions'}"
        found = _call(address, body, timeout)
        try:
            choice = found["choices"][0]
            text = choice["text"] if template is None else choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise MintError(
                f"{root} answers no completion ({json.dumps(found)[:150]}); is it an OpenAI-compatible server?"
            ) from None
        answers.append(Answer(case, _cut(str(text), case.target)))
    return name, answers


def _call(address: str, body: dict | None, timeout: float) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = error.read()[:150].decode("utf-8", "replace")
        raise MintError(
            f"{address} refuses ({error.code} {' '.join(said.split())}); check the address and --served-model"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise MintError(f"{address} does not answer ({reason}); is the server running there?") from None
    if not isinstance(found, dict):
        raise MintError(f"{address} answers no JSON object; is it an OpenAI-compatible server?")
    return found
