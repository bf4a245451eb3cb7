"""The unembedding by itself gives the model's own logits, however few rows of them exist at once."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mint.case import Case
from mint.model import head
from mint.model.head import logit_parts, only_read, unembedding
from mint.model.lm import Encoded
from mint.model.suffix import record_states
from mint.reference import statistics
from mint.solver import in_contexts
from mint.solver.bundle import bundle
from mint.solver.problem import Problem, Settings
from mint.solver.reading import read
from mint.solver.recipe import recipe_of

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


class Widest(TorchDispatchMode):
    """Remembers the most rows of logits that any one tensor held."""

    def __init__(self, lm):
        super().__init__()
        self.vocab, self.rows = lm.embedding.shape[0], 0
        self.weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        for one in found if isinstance(found, tuple | list) else (found,):
            if not isinstance(one, torch.Tensor) or not one.dim() or one.shape[-1] != self.vocab:
                continue
            if one.untyped_storage().data_ptr() not in self.weights:
                self.rows = max(self.rows, one.numel() // self.vocab)
        return found


def test_no_more_rows_of_logits_exist_at_once_than_are_allowed(lm, monkeypatch):
    """What the memory of a repair hangs on with a wide vocabulary: reading contexts, and their columns."""
    case, settings = Case("a", "# sort the first list\n", "x.sort()\n"), Settings()
    layer, recipe, stats = in_contexts.layer_of(lm, settings), recipe_of(settings), statistics(lm)
    problem, vocab, rows = Problem(case, lm.encode(case)), lm.embedding.shape[0], {}
    seen = read(lm, problem, settings, recipe, layer)
    for allowed in (3, 1000):
        monkeypatch.setattr(head, "BYTES", 4.0 * vocab * allowed)
        with Widest(lm) as widest:
            bundle(lm, [problem.encoded] * 4, [layer], exact=True)
            in_contexts.draft(lm, seen, stats, recipe, [0, 1], 2)
        rows[allowed] = widest.rows
    assert rows[3] <= 3 < 4 * len(problem.encoded.target) <= rows[1000]
