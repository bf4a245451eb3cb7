"""What one forward tells about generation is what generation gives, for texts that are written and for others."""

from dataclasses import replace

import pytest
import torch

from mint.case import Case
from mint.measure import contexts, near_misses
from mint.model.foretell import foretold
from mint.model.stop import Stop
from tests.conftest import tiny_lm


def clear_lm(family="llama"):
    """A tiny model that writes readable text, by clear margins."""
    lm = tiny_lm(family)
    head = lm.model.get_output_embeddings().weight
    with torch.no_grad():
        for token in range(257):
            text = lm.decode([token])
            head[token] *= 20.0 if text.isascii() and text.isprintable() else 0.0
    return lm


def cases_around(lm, prompt, tokens=6):
    """The model's own text behind a prompt, and the same with one character changed at each place."""
    text = lm.decode(lm.generate([lm.encode_prompt(prompt)], tokens)[0])
    texts = [text, *(text[:i] + "q" + text[i + 1 :] for i in range(len(text)))]
    return [Case(f"{prompt}{n}", prompt, t) for n, t in enumerate(texts) if t and "\ufffd" not in t]


@pytest.mark.parametrize("stop", ["none", "line", "eos"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_foretold_is_what_is_generated(family, stop):
    lm = clear_lm(family)
    cases = [c for prompt in ("ab c", "x = ", "def f", "# sort", "12 34") for c in cases_around(lm, prompt)]
    encoded = [lm.encode(c, stop) for c in cases]
    told = foretold(lm, encoded, [c.target for c in cases])
    written = [lm.write(e, c) == c.target for e, c in zip(encoded, cases, strict=True)]
    assert all(t is None or t == w for t, w in zip(told, written, strict=True))
    assert sum(t is not None for t in told) > len(cases) / 2
    assert stop != "none" or True in told


def test_another_way_to_write_the_same_text_is_generated(lm, monkeypatch):
    """Where what leads could still give the target's text, by another token or line end, nothing is foretold."""
    case = Case("a", "ab", "xy\r\n")
    encoded = replace(lm.encode(case, "none"), stop=Stop.of("line", case.target))
    logits = torch.full((len(encoded.target), 257), -5.0)
    logits[torch.arange(len(encoded.target)), list(encoded.target)] = 5.0
    leads = lm.tokenizer("\n", add_special_tokens=False).input_ids[0]
    logits[2, leads] = 9.0  # a plain line end where the target has that of Windows
    monkeypatch.setattr(type(lm), "batched_logits", lambda *_: iter([([0], logits)]))
    assert foretold(lm, [encoded], [case.target]) == [None]
    logits[2, lm.tokenizer("z", add_special_tokens=False).input_ids[0]] = 12.0
    assert foretold(lm, [encoded], [case.target]) == [False]
    assert foretold(lm, [replace(encoded, stop=Stop.of("block", case.target))], [case.target]) == [None]


def test_variants_that_cannot_be_right_and_near_misses_that_stay_are_not_generated(monkeypatch):
    lm = clear_lm()
    case = Case("a", "# sort the first list\n", "x.sort()\n")
    variants = contexts.wordings(lm, case)
    near = near_misses.prepare(lm, case)
    asked = []
    generate = lm.generate
    monkeypatch.setattr(
        type(lm), "generate", lambda _, prompts, *a: asked.append(len(prompts)) or generate(prompts, *a)
    )
    assert not any(contexts.written_right(lm, variants))
    assert near_misses.measure(lm, near)["changed"] == 0
    assert sum(asked) < (len(variants) + len(near.cases)) / 2
