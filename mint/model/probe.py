"""What mint sees in a model: the facts that decide whether and how a repair works. Looks, changes nothing."""

import time
from collections import Counter
from collections.abc import Callable

import torch

from mint.errors import CaseError, MintError, ModelError
from mint.model.lm import LM
from mint.model.saved import Saved
from mint.model.text import Template, check_read_back, dressed

# Prompt and target of the kinds at which tokenizers differ: behind a line end, a blank, indentation, a point, a bracket.
_BOUNDARIES = (
    ("# sort list l\n", "l.pop()\n"),
    ("x = ", "foo(1)\n"),
    ("def f():\n    ", "return 0\n"),
    ("l.", "pop()\n"),
    ("print(", "'a  b')\n"),
    ("if x:", "\n\ty = 1\n"),
)
_READ_BACK = "def f(a, b):\n    # two  blanks\n\treturn 'x = 1'\n"
REFERENCE_TOKENS = 4_600
"""Reading the reference text once for a model takes about as long as so many tokens of the timed forward (it is read in
large batches)."""
_TIMED_TOKENS = 256
_TIMES = 3
OVERHEAD = 800_000_000
"""Bytes that Python, the libraries and the activations of a repair take besides, about."""
REPAIR_TOKENS = 6_500
"""A repair with its contexts takes about as long as so many: an order of magnitude, it depends on the target."""


def probe(lm: LM) -> dict:
    """JSON values that describe a loaded model. Runs a few forwards of 256 tokens.

    Raises `ModelError` where the tokenizer cannot read an ordinary line of code back: no prompt would be seen as written.
    """
    saved = lm.saved
    return {
        "model": lm.name,
        "class": type(lm.model).__name__,
        "family": saved.family,
        "saved_as": saved.classes,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "tensors": _tensors(saved),
        "dtype": {"saved": _dtypes(saved), "memory": _name(lm.dtype)},
        "tokenizer": _tokenizer(lm),
        "end_tokens": [{"id": i, "text": lm.decode([i])} for i in sorted(lm.stop_ids())],
        "generation_settings_left_out": lm.settings.changing,
        "chat_template": _chat(lm),
        "adapter": str(saved.folder) if saved.adapter is not None else None,
        "tied": lm.layout.tied,
        "context": lm.context if lm.context < 1 << 30 else None,
        "blocks": _blocks(lm),
        "needs": _needs(lm),
        "notes": list(lm.notes),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(saved: Saved) -> dict:
    """How many tensors the files hold and how many the model read; None where the files are not safetensors."""
    headers = saved.headers()
    return {
        "saved": len(headers) or None,
        "read": len(headers) - len(saved.unused) - len(saved.ignored) if headers else None,
        "not_read": [*saved.unused, *saved.ignored],
        "files": list(saved.weights),
        "files_not_read": list(saved.unread),
    }


def _dtypes(saved: Saved) -> dict[str, int]:
    """Numbers of saved tensors by dtype, as safetensors names them."""
    return dict(Counter(t["dtype"] for t in saved.headers().values()).most_common())


def _tokenizer(lm: LM) -> dict:
    tokenizer = lm.tokenizer
    try:
        check_read_back(tokenizer, _READ_BACK, lm.name)
    except CaseError as error:
        raise ModelError(str(error)) from None
    unwritable = []
    template, lm.template = lm.template, None
    try:
        for prompt, target in _BOUNDARIES:
            try:
                lm.encode_target(lm.encode_prompt(prompt), target, prompt)
            except CaseError as error:
                unwritable.append(str(error))
    finally:
        lm.template = template
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab()
    return {
        "class": type(tokenizer).__name__,
        "kind": type(backend.model).__name__ if backend is not None else "SentencePiece",
        "tokens": len(vocabulary),
        "rows_of_the_embedding": lm.n_embedded,
        "tokens_without_a_row": sorted((t for t, i in vocabulary.items() if i >= lm.n_embedded))[:10],
        "adds_in_front": lm.decode(_added(lm)),
        "reads_back": True,
        "boundaries_that_fail": unwritable,
    }


def _added(lm: LM) -> list[int]:
    """Ids that the tokenizer puts in front of a text."""
    ids, bare = (lm.tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    return ids[: ids.index(bare[0])] if bare and bare[0] in ids else []


def _chat(lm: LM) -> str | None:
    """`works`, what it says where it refuses a prompt, or None where there is none."""
    if not getattr(lm.tokenizer, "chat_template", None):
        return None
    try:
        dressed(lm.tokenizer, Template(), "x = 1", lm.name)
    except MintError as error:
        return str(error)
    return "works"


def _blocks(lm: LM) -> dict:
    blocks, experts = lm.layout.blocks, list(lm.layout.experts.values())
    return {
        "layers": getattr(lm.model.config.get_text_config(), "num_hidden_layers", len(blocks)),
        "repairable": sorted({*lm.layout.repairable, *lm.layout.experts}),
        "neurons": lm.layout.n_neurons + sum(e.count * e.d_ff for e in experts),
        "width": lm.layout.width,
        "gated": (blocks or experts)[0].gated,
        "activation": (blocks or experts)[0].activation,
        "experts": {e.layer: e.count for e in experts},
    }


@torch.no_grad()
def _needs(lm: LM) -> dict:
    """About the bytes that a repair takes, and how long it takes here: from the shortest of a few timed forwards."""
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    statistics = 4 * sum(b.d_model**2 + 2 * b.d_ff + b.d_model for b in lm.layout.blocks)
    tokens = min(_TIMED_TOKENS, lm.context - 1)
    ids = [i % lm.n_embedded for i in range(1, tokens + 1)]
    each = min(_seconds(lambda: lm.logits([ids], [[tokens - 1]])) for _ in range(_TIMES)) / tokens
    return {
        "memory_bytes": weights + statistics + OVERHEAD,
        "seconds_reference_once": round(REFERENCE_TOKENS * each, 1),
        "seconds_repair": round(REPAIR_TOKENS * each, 1),
    }


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
