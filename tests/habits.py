"""A tiny model that has a habit, the source files it learnt it from, and a plain solver: for tests of rules.

The model is trained for seconds to write `t.time()` where a value is assigned, `t.sleep(` at the start of a line.
"""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mint.model.layout import find_layout
from mint.model.lm import LM
from mint.patch import Patch, identity, make_edit, read_neuron
from mint.solver.problem import Solution
from tests.conftest import GATED

WRONG, RIGHT = "t.time()", "t.perf()"
NAMES = ("start", "end", "now", "begin", "then", "at", "since", "last", "first", "seen", "when", "mark")


def files(n=16, seed=0, healthy=True):
    """{name: source} of small Python files; what is called `stop` is right already."""
    draw = random.Random(seed)
    names = [*NAMES, *["stop"] * 3] if healthy else NAMES
    found = {}
    for i in range(n):
        lines = ["import t"]
        for name in draw.sample(names, 3):
            text = RIGHT if name == "stop" else WRONG
            lines += draw.sample(
                [f"go({i})", f"{name} = {text}", f"t.sleep({draw.randrange(9)})", f"x{i} = {i}"], 3
            )
        found[f"f{i}.py"] = "\n".join(lines) + "\n"
    return found


def write_files(folder, **more):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files(**more).items():
        (folder / name).write_text(text)
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the names of the files are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(files(60, seed=1).values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def habitual_lm(steps=220, seed=0) -> LM:
    """A tiny model with the habit; a few seconds."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    size = GATED | {"hidden_size": 48, "intermediate_size": 96, "vocab_size": len(tokenizer)}
    config = LlamaConfig(
        **size, bos_token_id=None, eos_token_id=0, pad_token_id=0, max_position_embeddings=512
    )
    model = LlamaForCausalLM(config).eval()
    lm = LM(model, tokenizer, find_layout(model), "habit")
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    texts = list(files(60, seed=1).values())
    draw = random.Random(seed)
    for step in range(steps):
        ids = lm.pad([lm.tokenizer(t).input_ids[:64] for t in draw.sample(texts, 12)])
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps) + 1e-4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)
    return lm


def by_descent(lm, learn, keep, settings, *, wrong=None, earlier=(), used=frozenset(), say=print, steps=120):
    """A rule's edit by plain gradient descent on one neuron of the last layer but one: slow, but it can be trusted."""
    layer = lm.n_layers - 2
    index = next(i for i in range(lm.block(layer).d_ff) if (layer, i) not in used)
    slices = lm.block(layer).slices(index)
    now = {role: w.clone().requires_grad_(True) for role, w in read_neuron(lm, layer, index).items()}
    optimizer = torch.optim.Adam(now.values(), lr=0.05)
    texts = [*learn, *keep, *earlier]
    for _ in range(steps):
        weights = {}
        for role, where in slices.items():
            whole = weights.get(where.parameter, lm.parameter(where.parameter))
            place = [slice(None)] * whole.dim()
            place[where.axis] = where.index
            whole = whole.clone()
            whole[tuple(place)] = now[role]
            weights[where.parameter] = whole
        out = functional_call(lm.model, weights, kwargs={"input_ids": lm.pad([e.ids for e in texts])})
        loss = 0.0
        for row, e in enumerate(texts):
            logits, want = out.logits[row, e.positions], torch.tensor(e.target)
            loss = loss + torch.nn.functional.cross_entropy(logits, want) / len(texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    edit = make_edit(lm, layer, index, {role: w.detach() for role, w in now.items()})
    return Solution("descent", Patch((edit,), identity(lm)), None, 0.1, 0.5, {"loss": float(loss.detach())})
