"""The unembedding by itself gives the model's own logits, however few rows of them exist at once."""

import torch

from mint.model import head
from mint.model.head import logit_parts, only_read, unembedding
from mint.model.lm import Encoded
from mint.model.suffix import record_states
from mint.solver.bundle import bundle

IDS = [3, 7, 11, 2, 9, 4]
ROWS, COLUMNS = torch.tensor([0, 0, 1]), torch.tensor([2, 5, 1])


@torch.no_grad()
def test_reads_and_unembedding_give_the_models_logits(any_lm):
    texts = [IDS, IDS[::-1]]
    wanted = any_lm.logits(texts, [[2, 5], [1]])
    with only_read(any_lm, ROWS, COLUMNS) as reads, record_states(any_lm, [0]) as states:
        any_lm.model(input_ids=any_lm.pad(texts), use_cache=False)
    with unembedding(any_lm, states.as_tuple) as logits:
        both = torch.cat([logits(reads[0][:2]), logits(reads[0][2:])])
    torch.testing.assert_close(both, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(any_lm.logits(texts, [[2, 5], [1]]), wanted, atol=0, rtol=0)


def test_margins_and_gradients_are_the_same_whatever_number_of_rows(any_lm, monkeypatch):
    texts = [Encoded(tuple(IDS[:3]), (5, 6, 7)), Encoded((9, 1), (8, 3))]

    def found():
        one = bundle(any_lm, texts, [0], exact=True)[0]
        write = 0.1 * torch.ones_like(one.inputs)
        return (
            one.clean,
            *one.margins(write),
            *one.soft_margins(write, one.real, torch.full(one.real.shape, 1e9)),
        )

    whole = found()
    monkeypatch.setattr(head, "BYTES", 1.0)
    assert len(logit_parts(any_lm, 7)) == 7
    for one, other in zip(whole, found(), strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=1e-4, rtol=1e-4)
