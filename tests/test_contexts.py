"""Contexts, wordings and near misses, by generation, on tiny models."""

from dataclasses import replace

from mint.batches import alike
from mint.case import Case, Keep
from mint.evaluation import summary
from mint.measure import contexts, near_misses, places
from mint.measure.contexts import Variant

CASE = Case("a", "# sort the first list\n", "x.sort()\n", rephrasings=("# order it\n",))


def test_every_kind_of_context_is_made_where_it_fits(lm):
    roomy = replace_context(lm, 4096)
    found = contexts.contexts(roomy, CASE)
    assert [v.kind for v in found] == list(contexts.CONTEXTS)
    deep = next(v for v in found if v.kind == "deep")
    assert len(deep.encoded.prompt) >= contexts.DEEP_TOKENS
    tight = replace_context(lm, 200)
    assert "deep" not in {v.kind for v in contexts.contexts(tight, CASE)}


def replace_context(lm, length):
    lm.model.config.max_position_embeddings = length
    return lm


def test_wordings_are_made(lm):
    kinds = [v.kind for v in contexts.wordings(lm, CASE)]
    assert kinds == ["case", "full_stop", *["comment_style"] * 3, "rephrasings"]


def test_right_is_decided_by_generating(lm):
    prompts = [f"{a}{b} = " for a in "abcdefgh" for b in "klmnopqrst"]
    texts = [lm.decode(g) for g in lm.generate([lm.encode_prompt(p) for p in prompts], 3)]
    prompt, text = next(
        (p, t) for p, t in zip(prompts, texts, strict=True) if t.isprintable() and t.isascii()
    )
    cases = [Case("a", prompt, text), Case("b", prompt, text[:-1] + chr(ord(text[-1]) ^ 1))]
    variants = [Variant("blank", c, lm.encode(c, "none")) for c in cases]
    assert contexts.written_right(lm, variants) == [True, False]
    assert contexts.by_kind(variants, [True, False]) == {"blank": {"cases": 2, "right": 1}}


def test_near_misses_count_what_changed(lm):
    case = replace(CASE, keep=(Keep("# keep this\n"),))
    near = near_misses.prepare(lm, case, keep=["# and this\n"])
    assert near.cases[0].prompt == "# keep this\n" and near.cases[1].prompt == "# and this\n"
    counts = near_misses.measure(lm, near)
    assert counts == {"cases": len(near.cases), "became_target": 0, "changed": 0}
    moved = replace(near, clean=tuple(t + "?" for t in near.clean))
    assert near_misses.measure(lm, moved)["changed"] == len(near.cases)
    taken = replace(
        near, cases=tuple(replace(c, target=t) for c, t in zip(near.cases, near.clean, strict=True))
    )
    taken = replace(taken, clean=tuple("something else" for _ in near.clean))
    assert near_misses.measure(lm, taken)["became_target"] == len(near.cases)


def test_places_are_measured_and_added_up(lm):
    found = places.measure(lm, places.prepare(lm, CASE))
    assert found["near_misses"]["changed"] == 0
    twice = places.total([found, found])
    assert twice["near_misses"]["cases"] == 2 * found["near_misses"]["cases"]
    assert twice["contexts"]["imports"]["cases"] == 2


def test_batches_hold_each_index_once():
    sequences = [[0] * n for n in (1, 700, 3, 2000, 900, 5000)]
    found = list(alike([len(s) for s in sequences], contexts.BATCH_TOKENS))
    assert sorted(i for batch in found for i in batch) == list(range(len(sequences)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(len(sequences[i]) for i in batch) <= contexts.BATCH_TOKENS


def test_clustered_interval_is_wider_than_one_over_prompts():
    clusters = [[(10, 10)], [(0, 10)]] * 5
    low, high = summary.clustered_interval(clusters)
    assert low < 0.3 and high > 0.7
    assert summary.clustered_interval([[(3, 3)], [(1, 1)]]) == [1.0, 1.0]
