"""The cut lies where the model's own tokens part, for every kind of tokenizer, and every cut round-trips."""

from dataclasses import replace
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mint.case import Case
from mint.model.layout import find_layout
from mint.model.lm import LM, Encoded, Template
from mint.rules.cut import NO_ROUND_TRIP, Cut, Uncuttable, cut, encode_row, settle
from mint.rules.rule import Row
from tests.conftest import tiny_lm

CODE = [
    "import time\nimport logging\n\n\ndef run(self):\n    start = time.time()\n    self.x = 1\n    return time.time() - start\n",
    "def go(a, b):\n    begin = time.perf_counter()\n    logger.warn('slow')\n    logger.warning('very slow')\n",
    "if x == None:\n    pass\nif x is None:\n    y = open(path)\n    z = open(path, encoding='utf-8')\n",
] * 50  # fmt: skip


def wrap(tokenizer, **special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level(pattern=None):
    """Byte-level BPE that merges a dot with the name behind it, as the tokenizers of code models do."""
    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(pattern, "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CODE, trainer)
    return wrap(tokenizer, eos_token="<eos>")


def dotted():
    """`.name` is one token, as for Qwen and GPT-4."""
    from tokenizers import Regex

    return byte_level(Regex(r"[^\r\n\w]?[A-Za-z_]+|\d| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"))


def across_lines():
    """Nothing is split before merging: tokens run across newlines, brackets and blanks."""
    from tokenizers import Regex

    return byte_level(Regex(r"[\s\S]{1,400}"))


def sentencepiece():
    """Pieces with a leading blank, a blank put before the text, BOS in front, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([line for text in CODE for line in text.split("\n")], trainer)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte-level": byte_level,
    "dotted": dotted,
    "across-lines": across_lines,
    "sentencepiece": sentencepiece,
}
SITES = [
    ("def run(self):\n    start = ", "time.time()", "time.perf_counter()"),
    ("def run(self):\n    # näh — ünïcode\n    ", "logger.warn(", "logger.warning("),
    ("    if x ", "== None", "is None"),
    ("x = 1\n    y = ", "open(path)", "open(path, encoding='utf-8')"),
    ("x = 1\n\n\n    ", "print(x)", "logger.info(x)"),
    ("x = 1\n", "start = 1", "begin = 2"),
    ("return ", "await_it()", "go(a)"),
    ("x = '\U0001f600", "\U0001f601'", "\U0001f602'"),
]


@cache
def trained(name) -> PreTrainedTokenizerFast:
    return TOKENIZERS[name]()


def with_tokenizer(name) -> LM:
    """A tiny model, its embedding large enough for the tokenizer."""
    lm = tiny_lm("llama")
    lm.model.resize_token_embeddings(600, mean_resizing=False)
    return LM(lm.model, trained(name), find_layout(lm.model), f"tiny with {name}")


@pytest.fixture(params=sorted(TOKENIZERS))
def tokenized(request) -> LM:
    return with_tokenizer(request.param)


def checked(lm, before, wrong, right) -> Cut | None:
    """The promise: nothing lost, both sides round-trip, the prompt is what the model would see, the first ids differ."""
    try:
        found = cut(lm, before, wrong, right)
    except Uncuttable as error:
        assert error.why
        return None
    assert found.prompt + found.target == before + right
    assert found.prompt + found.wrong == before + wrong
    assert tuple(lm.encode_prompt(found.prompt)) == found.encoded.prompt
    assert found.encoded.ids == lm.encode_prompt(before + right)
    assert [*found.encoded.prompt, *found.wrong_ids] == lm.encode_prompt(before + wrong)
    assert lm.continuation(found.encoded.prompt, found.encoded.target) == found.target
    assert found.encoded.target != found.wrong_ids
    return found


def test_every_cut_round_trips(tokenized):
    found = [checked(tokenized, *site) for site in SITES]
    assert sum(f is not None for f in found) >= len(SITES) - 2


def test_a_name_merged_with_its_dot_is_not_torn_apart():
    found = checked(with_tokenizer("dotted"), *SITES[0])
    assert found.prompt.endswith(" = time") and found.target == ".perf_counter()" and found.wrong == ".time()"


def test_the_cut_may_move_left_into_the_context_across_lines():
    found = checked(with_tokenizer("across-lines"), "x = 1\n    ", "return time.time()", "return x")
    assert found is None or "x = 1\n    return time.time()".startswith(found.prompt)


def test_a_leading_blank_belongs_to_its_piece():
    found = checked(with_tokenizer("sentencepiece"), "    return ", "time.time()", "x")
    assert found.prompt == "    return" and found.target == " x" and found.wrong.startswith(" t")


def test_two_texts_with_the_same_tokens_cannot_be_cut(tokenized):
    with pytest.raises(Uncuttable):
        cut(tokenized, "x = ", "a", "a")


def test_nothing_before_the_difference_is_no_prompt():
    with pytest.raises(Uncuttable, match="nothing stands"):
        cut(with_tokenizer("byte-level"), "", "abc", "xyz")


def row(prompt, target, wrong):
    return Row("r", "fault", prompt, target, wrong, id="1")


def test_a_row_cut_by_characters_is_moved_to_the_last_common_token():
    lm = with_tokenizer("dotted")
    usable, found = encode_row(lm, row("    start = time.", "perf_counter()", "time()"))
    assert (usable.prompt, usable.target, usable.wrong) == ("    start = time", ".perf_counter()", ".time()")
    assert found.encoded.ids == lm.encode_prompt("    start = time.perf_counter()")


def test_mined_rows_are_read_back_with_the_same_ids(tokenized):
    for site in SITES:
        found = checked(tokenized, *site)
        if found is None:
            continue
        usable, again = encode_row(tokenized, row(found.prompt, found.target, found.wrong))
        assert again == found and usable.prompt == found.prompt


def test_a_near_row_without_a_target_keeps_its_prompt(tokenized):
    near = Row("r", "near", "    start = time", None, None, id="1")
    usable, found = encode_row(tokenized, near)
    assert usable == near and found.encoded == Encoded(tuple(tokenized.encode_prompt(near.prompt)), ())


def test_a_row_whose_cut_cannot_round_trip_is_named():
    lm = with_tokenizer("sentencepiece")
    with pytest.raises(Uncuttable) as error:
        encode_row(lm, row("x = 1", "é\r\x00", "\ufeff"))
        encode_row(lm, row("▁", "▁x", "▁y"))  # the piece's own sign is written back as a blank
    assert error.value.why == NO_ROUND_TRIP


def test_in_a_chat_template_the_answer_starts_where_the_template_ends():
    lm = with_tokenizer("dotted")
    lm = replace(lm, tokenizer=dotted())
    lm.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}<eos>{% endfor %}[assistant]\n"
    )
    chat = replace(lm, template=Template())
    usable, found = encode_row(chat, row("time this", "time.perf_counter()", "time.time()"))
    assert found.prompt == "time this" and found.target == "time.perf_counter()"
    assert list(found.encoded.prompt) == chat.encode_prompt("time this")
    assert chat.continuation(found.encoded.prompt, found.encoded.target) == "time.perf_counter()"


def test_the_end_of_a_target_may_run_on_as_the_model_writes_it(lm):
    prompt = lm.encode_prompt("ab = ")
    (written,) = lm.generate([prompt], 3)
    text = lm.continuation(prompt, written)
    longer = Cut("ab = ", text, None, Encoded(tuple(prompt), tuple(written)))
    assert settle(lm, [longer]) == [longer.encoded]
    case = lm.encode(Case("c", "ab = ", "zz"), "none")
    other = Cut("ab = ", "zz", None, case)
    assert settle(lm, [other]) == [case], "another first token is no continuation of the target"


def test_settling_takes_the_models_own_longer_last_token():
    lm = with_tokenizer("dotted")
    ids = lm.encode_prompt("    x = time.time()\n")
    short = lm.encode_prompt("    x = time.time()")
    assert ids[: len(short) - 1] == short[:-1] and ids[-1] != short[-1], (
        "the tokenizer merges `()` and the newline"
    )
    cutting = cut(lm, "    x = ", "time.time()", "time.perf_counter()")

    class Stub:
        def batched_logits(self, sequences, positions):
            import torch

            wanted = lm.encode_prompt("    x = time.perf_counter()\n")[len(cutting.encoded.prompt) :]
            yield [0], torch.nn.functional.one_hot(torch.tensor(wanted), 600).float()

        continuation = staticmethod(lm.continuation)

    (settled,) = settle(Stub(), [cutting])
    assert lm.continuation(settled.prompt, settled.target) == ".perf_counter()\n"
    assert settled.target[:-1] == cutting.encoded.target[:-1]
