"""One stop rule for encoding, generating and comparing: what ends a text, and that a model which goes on is found out."""

import pytest
import torch

from mint.case import Case, case_from_dict, case_to_dict
from mint.errors import CaseError, MintError
from mint.model.lm import LM, Encoded, Template
from mint.model.stop import UNENDED, Stop, rule_of
from tests.conftest import tiny_lm

EOS = 0
BODY = "    x = 1\n\n    return x\n"


@pytest.fixture
def lm():
    return tiny_lm("llama")


def says(lm: LM, text: str, prompt: str, then: tuple[int, ...] = (EOS,)) -> LM:
    """The same LM, whose model writes `text` and then `then` behind `prompt`, and x for ever behind that."""
    start = len(lm.encode_prompt(prompt))
    script = [*lm.tokenizer(text, add_special_tokens=False).input_ids, *then]
    filler = lm.tokenizer("x").input_ids[0]

    def forced(_module, _args, kwargs, output):
        cache = output.past_key_values
        end = cache.get_seq_length() if cache is not None else kwargs["input_ids"].shape[1]
        place = end - start
        logits = torch.full_like(output.logits, -10.0)
        logits[:, -1, script[place] if 0 <= place < len(script) else filler] = 10.0
        output.logits = logits
        return output

    lm.model.register_forward_hook(forced, with_kwargs=True)
    return lm


@pytest.mark.parametrize(
    ("text", "stop", "kept", "met"),
    [
        ("a b\nc\n", Stop.of("line", "x\n"), "a b\n", True),
        ("a b", Stop.of("line", "x\n"), "a b", False),
        ("", Stop.of("line", "x\n"), "", False),
        ("\nx", Stop.of("line", "x\n"), "\n", True),
        ("\nb", Stop.of("line", "x"), "", True),
        ("a\nb\n", Stop.of("line", "a"), "a", True),
        ("a\nb\nc", Stop.of("line", "a\nb\n"), "a\nb\n", True),
        (BODY + "\nprint(f())\n", Stop.of("block", BODY), BODY, True),
        (BODY + "\nprint(f())\n", Stop.of("block", BODY.rstrip()), BODY.rstrip(), True),
        (
            "def f():\n    return 1\n\n\n\ndef g():\n",
            Stop.of("block", BODY),
            "def f():\n    return 1\n",
            True,
        ),
        (
            "import re\ndef f():\n  return 1\n",
            Stop.of("block", BODY),
            "import re\ndef f():\n  return 1\n",
            False,
        ),
        ("x = 1\ny = 2\n", Stop.of("block", BODY), "x = 1\ny = 2\n", False),
        ("a\nb", Stop.of("eos", "a"), "a\nb", False),
        ("sorted_by(", Stop.of("none", "sorted"), "sorted", True),
    ],
)
def test_cut_keeps_what_the_stop_rule_says(text, stop, kept, met):
    assert stop.cut(text) == (kept, met)
    assert stop.halt(text) == met or stop.rule == "eos"


def test_the_end_of_a_sequence_ends_every_text():
    assert Stop.of("eos", "a").cut("a", ended=True) == ("a", True)
    assert Stop.of("block", BODY).cut("    return 1", ended=True) == ("    return 1\n", True)
    assert Stop.of("line", "a\n").cut("a", ended=True) == ("a", True), "the newline was not written"


def test_the_case_says_how_it_ends_unless_the_user_does():
    block = Case("a", "p", BODY, stop="block")
    assert case_from_dict(case_to_dict(block)) == block
    assert rule_of(block) == rule_of(block, chat=True) == "block" and rule_of(block, "eos") == "eos"
    plain = Case("a", "p", "t")
    assert rule_of(plain) == "line" and rule_of(plain, chat=True) == "eos"
    with pytest.raises(MintError, match="unknown stop rule 'word'; known are auto, line, block, eos, none"):
        rule_of(plain, "word")
    with pytest.raises(CaseError, match="'stop' must be one of line, block, eos, none, found 'word'"):
        case_from_dict({"id": "a", "prompt": "p", "target": "t", "stop": "word"})


@pytest.mark.parametrize("more", ["\n", "\nand more", " and more", "x"])
def test_a_model_that_writes_the_target_and_more_is_a_fault_where_the_sequence_should_end(lm, more):
    case = Case("a", "some words", "ok")
    says(lm, "ok" + more, case.prompt)
    written = lm.write(lm.encode(case, "eos"), case)
    assert written != case.target and written.startswith("ok" + more[:1])


def test_a_model_that_stops_behind_the_target_is_right(lm):
    for text in ("ok", "ok\n", "two\nlines"):
        model = tiny_lm("llama")
        case = Case("a", "some words", text)
        says(model, text, case.prompt)
        assert model.write(model.encode(case, "eos"), case) == text


def test_chat_verifies_the_stop(lm):
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    lm.template = Template()
    case = Case("a", "hi", "ok")
    says(lm, "ok\nand on", case.prompt)
    assert lm.write(lm.encode(case), case) == "ok\nand on"


def test_a_text_that_never_stops_is_not_the_target(lm):
    """Tokens that decode to nothing, until the budget ends."""
    lm.tokenizer.add_tokens(["<nothing>"])
    case = Case("a", "some words", "ok")
    encoded = lm.encode(case, "eos")
    lm.generate = lambda prompts, n, *_: [list(encoded.target[:2])]
    assert lm.write(encoded, case) == "ok" + UNENDED


def test_a_newline_may_be_an_end_of_sequence_token(lm):
    newline = lm.tokenizer("\n").input_ids[0]
    lm.model.generation_config.eos_token_id = [EOS, newline]
    says(lm, "ok\nmore", "some words")
    for target in ("ok\n", "ok"):
        case = Case("a", "some words", target)
        encoded = lm.encode(case, "line")
        assert encoded.target[-1] == newline
        assert lm.write(encoded, case) == target
    with pytest.raises(CaseError, match=r"ends its text at '\\n', which the target has in the middle"):
        lm.encode(Case("a", "some words", "ok\nmore\n"), "line")


def test_a_newline_may_be_the_only_end_of_sequence_token(lm):
    newline = lm.tokenizer("\n").input_ids[0]
    lm.model.generation_config.eos_token_id = newline
    lm.tokenizer.eos_token = "Ċ"
    assert lm.tokenizer.eos_token_id == newline
    says(lm, "ok\nmore", "some words")
    for target in ("ok\n", "ok"):
        for stop in ("line", "eos"):
            case = Case("a", "some words", target)
            assert lm.write(lm.encode(case, stop), case) == target


def test_a_block_is_judged_whole(lm):
    """A body that begins as the reference does and goes on is not the reference."""
    case = Case("a", "def f():\n", "    return 1\n", stop="block")
    says(lm, "    return 1\n    more()\n\nprint()\n", case.prompt)
    assert lm.write(lm.encode(case), case) == "    return 1\n    more()\n"
    longer = "    x = 1\n" * 20
    other = says(tiny_lm("llama"), longer + "print()\n", case.prompt)
    assert other.write(other.encode(case), case) == longer, "longer than the target and eight tokens"


def test_what_leaves_a_block_is_what_the_model_writes_there(lm):
    case = Case("a", "def f():\n", "    return 1\n", stop="block")
    encoded = says(lm, case.target + "\n\nprint()\n", case.prompt).encode(case)
    assert lm.decode(encoded.target[-encoded.n_stop :]) == "\n\np"
    inside = says(tiny_lm("llama"), case.target + "    more()\n", case.prompt).encode(case)
    assert inside.target[-1] == EOS and inside.n_stop == 1
    ended = says(tiny_lm("llama"), case.target, case.prompt).encode(case)
    assert ended.target[-1] == EOS and ended.n_stop == 1


def test_a_target_that_fills_the_context_can_be_written(lm):
    lm.model.config.max_position_embeddings = 16
    case = Case("a", "x" * 10, "y" * 5)
    says(lm, case.target, case.prompt)
    assert lm.write(lm.encode(case, "eos"), case) == case.target
    short = Case("b", "x", "z" * 12)
    both = [lm.encode(case, "eos"), lm.encode(short, "eos")]
    assert lm.write_all(both, [case, short])[0] == case.target


def test_ids_without_a_stop_are_compared_as_far_as_they_go(lm):
    prompt = lm.encode_prompt("some words")
    says(lm, "ok and more", "some words")
    encoded = Encoded(tuple(prompt), tuple(lm.tokenizer("ok").input_ids))
    assert lm.write(encoded, Case("a", "some words", "ok")) == "ok"
