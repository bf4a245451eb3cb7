"""Text to ids and back without a lost character, plain greedy generation, and margins that mean what they say."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from mint.case import Case
from mint.errors import CaseError, ModelError
from mint.model.lm import LM, Encoded, Template
from mint.model.margins import margins
from mint.model.stop import Stop
from tests.conftest import byte_tokenizer, tiny_lm, tiny_model

BOS = "Ā"
"""A token that the model has a row for, and no text here needs (byte 0)."""
NEWLINE = byte_tokenizer()("\n").input_ids[0]


def with_bos(lm: LM) -> LM:
    """The same model with a tokenizer that puts a BOS before every text."""
    inner = byte_tokenizer().backend_tokenizer
    bos = inner.token_to_id(BOS)
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token=BOS)
    return replace(lm, tokenizer=tokenizer)


def greedy(lm, ids, n):
    """Generation the slow way: full forwards, argmax, until a stop token."""
    ids, new = list(ids), []
    for _ in range(n):
        with torch.no_grad():
            token = int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())
        new.append(token)
        if token in lm.stop_ids():
            break
        ids.append(token)
    return new


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SHARED = tiny_lm("llama")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXTS, TEXTS)
def test_prompt_and_target_come_back_exactly(prompt, target):
    encoded = SHARED.encode(Case("a", prompt, target), "none")
    assert SHARED.decode(encoded.prompt) == prompt
    assert SHARED.decode(encoded.target) == target
    assert SHARED.continuation(encoded.prompt, encoded.target) == target


def test_positions_are_those_that_predict_the_target(lm):
    encoded = lm.encode(Case("a", "abc", "de"), "none")
    assert len(encoded.prompt) == 3 and encoded.positions == [2, 3]
    assert [encoded.ids[p + 1] for p in encoded.positions] == list(encoded.target)


def test_bos_stands_once(lm):
    bos = with_bos(lm)
    assert bos.encode_prompt("ab")[0] == bos.tokenizer.bos_token_id
    assert bos.encode_prompt("ab").count(bos.tokenizer.bos_token_id) == 1
    assert bos.encode_prompt(f"{BOS}ab") == bos.encode_prompt("ab")
    encoded = bos.encode(Case("a", "ab", "cd"), "none")
    assert bos.tokenizer.bos_token_id not in encoded.target and len(encoded.target) == 2


def test_stop_rules(lm):
    def stops(target, stop):
        encoded = lm.encode(Case("a", "ab", target), stop)
        return encoded.target[len(target) :], encoded.n_stop

    assert stops("x\n", "line") == ((), 0) and stops("x\n", "auto") == ((), 0)
    assert stops("x", "none") == ((), 0)
    assert stops("x", "eos") == ((0,), 1) and stops("x\n", "eos") == ((0,), 1)
    ids, n = stops("x", "line")
    assert n == 1 and (ids[0] in (0, NEWLINE))


def test_a_model_without_end_of_sequence_says_so(lm):
    lm.tokenizer.eos_token = None
    lm.model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="no end-of-sequence token; use --stop none"):
        lm.encode(Case("a", "ab", "x"), "eos")


def test_what_cannot_be_encoded_is_one_line(lm):
    lm.model.config.max_position_embeddings = 16
    for case, message in [
        (Case("a", "x" * 16, "y"), "the prompt has 16 tokens, the context of tiny-llama is 16"),
        (Case("a", "x" * 10, "y" * 9), "prompt and target have 19 tokens"),
        (Case("a", "x", ""), "the target is empty"),
    ]:
        with pytest.raises(CaseError, match=message):
            lm.encode(case, "none")
    with pytest.raises(CaseError, match="exceed the context of 16"):
        lm.generate([[1, 2, 3]], 14)


def test_a_target_the_tokenizer_cannot_make_is_refused(lm):
    """A tokenizer that lower-cases cannot write a capital."""
    from tokenizers import normalizers

    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(CaseError, match="character 2 'C' comes back as 'c'"):
        lm.encode(Case("a", "x", "abCd"), "none")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "opt"])
def test_generation_is_plain_greedy(family):
    lm = tiny_lm(family)
    prompts = [lm.encode_prompt(p) for p in ("a", "some words", "x = ")]
    alone = [lm.generate([p], 12)[0] for p in prompts]
    assert alone == [greedy(lm, p, 12) for p in prompts]
    assert lm.generate(prompts, 12) == alone, "padding on the left must not matter"


def test_the_models_own_generation_settings_do_not_bend_it(lm):
    plain = lm.generate([lm.encode_prompt("some words")], 12)
    for key, value in {
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 2,
        "do_sample": True,
        "num_beams": 3,
    }.items():
        setattr(lm.model.generation_config, key, value)
    assert lm.generate([lm.encode_prompt("some words")], 12) == plain


def test_generation_stops_after_the_asked_lines(lm):
    prompts = [lm.encode_prompt(f"{c} ") for c in "abcdefghijklmnopqrstuvwxyz"]
    free = lm.generate(prompts, 30)
    some = 0
    for prompt, whole in zip(prompts, free, strict=True):
        lined = lm.generate([prompt], 30, [Stop("line")])[0]
        if NEWLINE in whole:
            some += 1
            assert lined == whole[: whole.index(NEWLINE) + 1]
        else:
            assert lined == whole
    assert some


def test_margins_are_positive_exactly_where_greedy_agrees(lm):
    prompt = lm.encode_prompt("some words")
    new = lm.generate([prompt], 6)[0]
    right = Encoded(tuple(prompt), tuple(new))
    assert (margins(lm, right) > 0).all()
    wrong = Encoded(tuple(prompt), (*new[:3], (new[3] + 1) % 257, *new[4:]))
    assert (margins(lm, wrong)[:3] > 0).all() and margins(lm, wrong)[3] < 0


def test_written_equals_target_only_if_the_model_stops(lm):
    prompt = lm.encode_prompt("some words")
    new = lm.generate([prompt], 8)[0]
    text = next((lm.decode(new[:n]) for n in range(1, 8) if "�" not in lm.decode(new[:n])), None)
    assert text is not None and 0 not in new, "choose another prompt"
    case = Case("a", "some words", text)
    assert lm.write(lm.encode(case, "none"), case) == text
    assert lm.write(lm.encode(case, "eos"), case) != text


def test_chat_templates_are_used_and_targets_end_with_the_turn(lm):
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    lm.template = Template("be brief")
    encoded = lm.encode(Case("a", "hi", "ok"))
    assert lm.decode(encoded.prompt) == "<system>be brief<user>hi<a>"
    assert encoded.target == (*lm.tokenizer("ok").input_ids, 0) and encoded.n_stop == 1


def test_a_model_without_chat_template_says_so(lm):
    lm.template = Template()
    with pytest.raises(ModelError, match="no chat template; leave out --chat"):
        lm.encode_prompt("hi")


def test_batched_logits_equal_single_ones(lm):
    sequences = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
    positions = [[0, 2], [0], [4], [1]]
    found = {}
    for indices, logits in lm.batched_logits(sequences, positions, tokens=6):
        found |= dict(zip(indices, logits.split([len(positions[i]) for i in indices]), strict=True))
    for i, (sequence, places) in enumerate(zip(sequences, positions, strict=True)):
        torch.testing.assert_close(found[i], lm.logits([sequence], [places]), atol=1e-5, rtol=1e-5)


def test_fingerprints_tell_models_apart_and_ignore_repairs(lm):
    assert lm.fingerprint == tiny_lm("llama").fingerprint
    others = [tiny_lm("llama", seed=1), tiny_lm("mistral"), tiny_lm("llama", dtype=torch.bfloat16)]
    assert len({lm.fingerprint, *(o.fingerprint for o in others)}) == 4
    edited = tiny_lm("llama")
    with torch.no_grad():
        edited.columns(1)[3].zero_()
    assert edited.fingerprint == lm.fingerprint


def test_the_model_is_frozen_and_in_eval_mode():
    model = tiny_model("llama").train()
    from mint.model.layout import find_layout

    lm = LM(model, byte_tokenizer(), find_layout(model), "x")
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
