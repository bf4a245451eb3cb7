"""Situations of real users: each works, or is refused in one true line before anything happens.

Tiny models are built on the spot with the real libraries; nothing is downloaded.
"""

import json
import shlex
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers as T
from safetensors.torch import load_file, save_file

from mint.case import Case
from mint.cli import main
from mint.errors import CaseError, MintError, ModelError
from mint.model.loading import load_lm
from mint.model.settings import Settings
from tests.conftest import GATED, byte_tokenizer, tiny_lm, tiny_model

IDS = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> Path:
    tiny_model(family, dtype=dtype).save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def edit_json(path: Path, **values) -> None:
    """Set keys of a JSON file; None removes one."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record = {k: v for k, v in (record | values).items() if v is not None}
    path.write_text(json.dumps(record))


def greedy(folder: Path, prompt: str, n: int = 12) -> list[int]:
    """What plain transformers writes: forwards and argmax, no generation settings, no mint."""
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    model = T.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, new = tokenizer(prompt).input_ids, []
    for _ in range(n):
        with torch.no_grad():
            new.append(
                int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            )
        if new[-1] == 0:
            break
    return new


def refused(folder: Path | str, match: str, kind: type[MintError] = ModelError, **options) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(kind, match=match) as caught:
        load_lm(str(folder), **options)
    assert "\n" not in str(caught.value) and "internal error" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- the model is not what it seems


def seq2seq(kind: str):
    sizes = dict(vocab_size=257, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                 decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, eos_token_id=0)  # fmt: skip
    if kind == "plbart":
        return T.PLBartForConditionalGeneration(T.PLBartConfig(**sizes))
    if kind == "bart":
        return T.BartForConditionalGeneration(T.BartConfig(**sizes))
    return T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=257, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


@pytest.mark.parametrize("kind", ["plbart", "bart", "t5"])
def test_an_encoder_decoder_is_refused_whatever_class_could_be_made_of_it(tmp_path, kind):
    seq2seq(kind).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, "is an encoder-decoder model .*ForConditionalGeneration.*decoder-only")
    # Old files leave out what the class has by default.
    edit_json(tmp_path / "config.json", is_encoder_decoder=None)
    refused(tmp_path, "is an encoder-decoder model")


@pytest.mark.parametrize("named", [["RobertaForMaskedLM"], ["RobertaModel"], None], ids=str)
def test_an_encoder_is_refused(tmp_path, named):
    config = T.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **IDS
    )
    T.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", architectures=named)
    refused(tmp_path, "no language model that writes text|reads its text in both directions")


def test_a_classifier_is_refused(tmp_path):
    config = T.Qwen2Config(**GATED, **IDS, tie_word_embeddings=True)
    T.Qwen2ForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, "is a Qwen2ForSequenceClassification, no language model")


def test_a_decoder_saved_alone_is_what_it_says(tmp_path):
    config = T.BartConfig(vocab_size=257, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
                          pad_token_id=0, eos_token_id=0, is_encoder_decoder=False, is_decoder=True)  # fmt: skip
    T.BartForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_lm(str(tmp_path)).n_layers == 2


def test_a_quantised_model_is_refused_before_its_library_is_asked_for(tmp_path):
    saved(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(tmp_path, "is quantised .gptq.; load the unquantised model, or a GGUF file")


def gemma3(folder: Path) -> Path:
    text = dict(GATED, head_dim=8, max_position_embeddings=128, **IDS)
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = T.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=200, boi_token_index=201,
        eoi_token_index=202, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    T.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_vision_language_wrapper_loads_and_says_what_it_reads(tmp_path, capsys):
    assert main(["doctor", "-m", str(gemma3(tmp_path / "m")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["class"] == "Gemma3ForConditionalGeneration" and found["blocks"]["repairable"] == [0, 1, 2]
    assert found["tensors"]["read"] == found["tensors"]["saved"] and not found["tensors"]["not_read"]


# ---------------------------------------------------------------------- SentencePiece


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """SentencePiece models of the Llama kind, the Gemma kind, and the kind that tidies blanks up."""
    folder = tmp_path_factory.mktemp("pieces")
    words = "def return print sort list length open file close import json for in x y foo bar pop append self".split()
    lines = [
        f"{a} {b}({c}) = {d}.{a}" for a in words for b, c, d in zip(words, words[3:], words[5:], strict=False)
    ]
    whole = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True)
    kinds = {"llama": dict(model_type="bpe", **whole), "gemma": dict(model_type="bpe", add_dummy_prefix=False, **whole),
             "unigram": dict(model_type="unigram", **whole), "tidy": dict(model_type="unigram")}  # fmt: skip
    for kind, options in kinds.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(folder / kind), minloglevel=2, num_threads=1,
            hard_vocab_limit=False, vocab_size=60 if kind == "tidy" else 330, **options,
        )  # fmt: skip
    return folder


def with_pieces(folder: Path, pieces: Path, kind: str, **config) -> Path:
    """A tiny llama whose tokenizer is a SentencePiece model and nothing else."""
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**GATED, vocab_size=400, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(folder)
    shutil.copyfile(pieces / f"{kind}.model", folder / "tokenizer.model")
    named = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    edit_json(folder / "tokenizer_config.json", **named | {"add_bos_token": True} | config)
    return folder


BOUNDARIES = [
    ("# sort list\n", "x.pop()\n"),
    ("x = ", "foo(1)\n"),
    ("x.", "pop()\n"),
    ("def f():\n    ", "return 0\n"),
    ("print(", ")\n"),
    ("x =", " 3\n"),
    ("x", "  =\ty\n"),
    ("é = ", "'ü😀'\n"),
    ("😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀", "\n"),
]


@pytest.mark.parametrize("kind", ["llama", "gemma", "unigram"])
@pytest.mark.parametrize(
    "config", [{}, {"add_eos_token": True}, {"legacy": False}, {"add_prefix_space": False}], ids=str
)
def test_prompt_and_target_of_sentencepiece_are_the_text_they_form(tmp_path, pieces, kind, config):
    lm = load_lm(str(with_pieces(tmp_path, pieces, kind, **config)))
    for prompt, target in BOUNDARIES:
        encoded = lm.encode(Case("a", prompt, target), "none")
        assert encoded.prompt[0] == 1 and 2 not in encoded.ids
        assert lm.tokenizer.decode(encoded.ids, skip_special_tokens=True).removeprefix(" ") == prompt + target
        server = [i for i in lm.tokenizer(prompt).input_ids if i != 2]
        assert list(encoded.prompt) == server, "the prompt is what a server makes of it"


def test_a_chat_template_with_sentencepiece(tmp_path, pieces):
    lm = load_lm(str(with_pieces(tmp_path, pieces, "llama")))
    lm.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    )
    from mint.model.text import Template

    lm.template = Template()
    for target in ("x.pop()\n", " x.pop()\n"):
        encoded = lm.encode(Case("a", "sort list", target), "none")
        assert encoded.prompt.count(1) == 1 and lm.continuation(encoded.prompt, encoded.target) == target


def test_a_tokenizer_that_loses_line_ends_says_which_character(tmp_path, pieces):
    lm = load_lm(str(with_pieces(tmp_path, pieces, "tidy")))
    with pytest.raises(
        CaseError, match=r"cannot read the prompt back: character 1 '\\n' (is lost|comes back as)"
    ):
        lm.encode_prompt("x\ny")
    with pytest.raises(
        CaseError, match=r"cannot write the target: character 1 '\\n' (is lost|comes back as)"
    ):
        lm.encode_target(lm.encode_prompt("x"), "y\n", "x")


def test_sentencepiece_is_asked_for_where_it_is_missing(tmp_path, pieces, monkeypatch):
    folder = with_pieces(tmp_path, pieces, "llama")
    for module in ("sentencepiece", "google.protobuf"):
        monkeypatch.setitem(sys.modules, module, None)
    refused(
        folder,
        r"needs sentencepiece and protobuf, which are .*; pip install 'mint-repair\[sentencepiece\]'",
        MintError,
    )


# ---------------------------------------------------------------------- generation settings

BENDING = [
    {"stop_strings": ["<|stop|>"]},
    {"return_dict_in_generate": True, "output_scores": True},
    {"num_return_sequences": 2, "do_sample": True},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"cache_implementation": "quantized"},
    {"begin_suppress_tokens": [76], "suppress_tokens": [1, 2]},
    {"bad_words_ids": [[83]], "sequence_bias": [[[5], 10.0]]},
    {"min_new_tokens": 14, "exponential_decay_length_penalty": [2, 1.5]},
    {"repetition_penalty": 1.3, "encoder_repetition_penalty": 2.0, "no_repeat_ngram_size": 2},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "low", "token_healing": True},
    {"max_time": 0.001, "max_new_tokens": 1, "guidance_scale": 3.0},
    {"watermarking_config": {"greenlist_ratio": 0.25}},
    {"temperature": -1, "top_p": "high", "num_beams": "many", "eos_token_id": "none"},
    {"custom_generate": "somebody/code", "assistant_early_exit": 1, "prompt_lookup_num_tokens": 3},
]


def test_generation_settings_neither_bend_nor_crash_plain_greedy_text(tmp_path):
    folder = saved(tmp_path / "m")
    lm = load_lm(str(folder))
    wanted = greedy(folder, "some words")
    prompt = lm.encode_prompt("some words")
    for settings in BENDING:
        edit_json(folder / "generation_config.json", **{"eos_token_id": 0} | settings)
        lm = load_lm(str(folder))
        assert lm.generate([prompt], 12)[0] == wanted, settings
        assert lm.generate([prompt, prompt[:3]], 12)[0] == wanted, settings


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"eos_token_id": {}}'])
def test_a_damaged_file_of_generation_settings_stops_nothing(tmp_path, text):
    folder = saved(tmp_path / "m")
    (folder / "generation_config.json").write_text(text)
    lm = load_lm(str(folder))
    assert 0 in lm.stop_ids() and lm.generate([lm.encode_prompt("ab")], 3)


def test_what_the_settings_would_change_is_told_in_one_line(tmp_path, capsys):
    folder = saved(tmp_path / "m")
    edit_json(folder / "generation_config.json", repetition_penalty=1.1, do_sample=False, top_p=0.8)
    assert main(["generate", "-m", str(folder), "-p", "ab", "--max-new-tokens", "2"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "repetition_penalty 1.1" in told and "--verify-settings" in told and "top_p" not in told
    assert not Settings.read({"repetition_penalty": 1.0, "eos_token_id": [0, 3], "top_p": 0.9}).notes()


def test_text_under_the_models_own_settings_can_be_asked_for(tmp_path):
    folder = saved(tmp_path / "m")
    edit_json(folder / "generation_config.json", repetition_penalty=3.0)
    lm = load_lm(str(folder))
    prompt = lm.encode_prompt("some words")
    own = lm.generate([prompt], 12, own_settings=True)[0]
    model = T.AutoModelForCausalLM.from_pretrained(folder)
    reference = model.generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :].tolist()
    assert own == reference != lm.generate([prompt], 12)[0]
    lm.settings = Settings.read({"penalty_alpha": 0.6, "bad_words_ids": "x"})
    with pytest.raises(
        ModelError, match="generation settings of .* cannot be run .*leave out --verify-settings"
    ):
        lm.generate([prompt], 2, own_settings=True)


def test_settings_that_cannot_be_run_are_refused_before_anything_is_solved():
    from mint import session

    lm = tiny_lm("llama")
    lm.settings = Settings.read({"repetition_penalty": "1.1"})
    wishes = session.Wishes(effects=False, verify_settings=True)
    with pytest.raises(ModelError, match="cannot be run .*leave out --verify-settings"):
        session.repair(
            lm, [Case("a", "some words", "x\n")], wishes, lambda *_: pytest.fail("this was solved")
        )


def test_a_repair_is_held_under_the_models_own_settings_by_a_larger_margin(monkeypatch):
    """A solver whose first answer a repetition penalty bends is asked again; without the wish, it is not."""
    from mint import session
    from mint.solver.problem import Settings as Wanted
    from mint.solver.problem import Solution

    lm = tiny_lm("llama")
    lm.settings = Settings.read({"repetition_penalty": 1.1})
    case, asked = Case("a", "some words", "x\n"), []
    right = lm.encode(case)
    monkeypatch.setattr(lm, "write", lambda e, c, own=False, **k: "y\n" if own_bends(k, own) else wrote())
    state = {"in": False}

    def wrote():
        return "x\n" if state["in"] else "z\n"

    def own_bends(options, own):
        return (own or options.get("own_settings")) and asked[-1] is None

    def solve(lm, problem, settings):
        asked.append(settings.margin)
        state["in"] = True
        from mint.patch import Patch, identity, make_edit

        edit = make_edit(lm, 1, 3, {"out": lm.columns(1)[3] * 2})
        return Solution("test", Patch((edit,), identity(lm)), None, 1.0, 0.1, {})

    def repaired(**wishes):
        asked.clear()
        state["in"] = False
        wanted = session.Wishes(settings=Wanted(), effects=False, **wishes)
        return session.repair(lm, [case], wanted, solve).repairs[0]

    assert repaired().success and asked == [None]
    one = repaired(verify_settings=True)
    assert one.success and asked == [None, 5.0]
    monkeypatch.setattr(session, "SETTINGS_MARGINS", ())
    one = repaired(verify_settings=True)
    assert (
        not one.success and "under the model's own generation settings (repetition_penalty 1.1)" in one.reason
    )
    assert right.target


# ---------------------------------------------------------------------- libraries that are missing


def run_evaluate(folder: Path, out: Path, *more: str) -> int:
    cases = out.parent / "cases.jsonl"
    rows = [
        {"id": str(i), "prompt": f"# list {i}\n", "target": f"ls {i}\n", "task": "nl2bash"} for i in range(2)
    ]
    cases.write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = ["--neighbours", "0", "--no-contexts", "--no-patches", "--solver", "random"]
    return main(["evaluate", "-m", str(folder), "--cases", str(cases), "--out", str(out), *options, *more])


def test_a_missing_judge_is_told_before_anything_is_repaired(tmp_path, capsys, monkeypatch):
    import sys

    from mint.measure import judges

    judges._bash_parser.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter_bash", None)
    assert run_evaluate(tmp_path / "no-model-is-looked-at", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "the bash judge needs" in said and "--no-judges" in said and not (tmp_path / "out").exists()
    assert run_evaluate(saved(tmp_path / "m"), tmp_path / "out", "--no-judges", "--json") == 0, (
        "the advice works"
    )
    judges._bash_parser.cache_clear()


def test_a_run_in_which_every_row_failed_is_no_success(tmp_path, capsys, monkeypatch):
    from mint.solver import SOLVERS

    monkeypatch.setitem(SOLVERS, "random", lambda *_: 1 / 0)
    assert run_evaluate(saved(tmp_path / "m"), tmp_path / "out", "--no-judges") == 1
    assert "every row ended in an error (first: ZeroDivisionError" in capsys.readouterr().err


def test_a_solver_without_its_package_is_told_at_once(monkeypatch):
    from mint import solver

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MintError, match=r"'lora' needs peft, .* pip install 'mint-repair\[baselines\]'"):
        solver.named("lora")


# ---------------------------------------------------------------------- GGUF in parts

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_tensors() -> dict[str, np.ndarray]:
    """The weights of the tiny llama under GGUF's names, in llama.cpp's order of rotary dimensions."""
    out = {}
    for key, value in tiny_model("llama").state_dict().items():
        weight, parts = value.float().numpy(), key.removesuffix(".weight").split(".")
        name = OUTER.get(".".join(parts)) or f"blk.{parts[2]}.{NAMES['.'.join(parts[3:])]}"
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-1])
        if heads:
            rows, width = weight.shape
            weight = weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
        out[f"{name}.weight"] = np.ascontiguousarray(weight)
    return out


def write_gguf(
    path: Path, names: list[str], part: tuple[int, int] | None = None, kind: str | None = None
) -> Path:
    tensors = gguf_tensors()
    writer = gguf.GGUFWriter(path, "llama")
    if part is None or part[0] == 0:
        vocabulary = byte_tokenizer().get_vocab()
        writer.add_context_length(2048)
        writer.add_embedding_length(32)
        writer.add_block_count(3)
        writer.add_feed_forward_length(64)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_dimension_count(8)
        writer.add_vocab_size(257)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
        writer.add_token_types([3] + [1] * 256)
        writer.add_token_merges([])
        writer.add_token_scores([0.0] * 257)
        writer.add_eos_token_id(0)
    if kind:
        writer.add_type(kind)
    if part is not None:
        writer.add_uint16("split.no", part[0])
        writer.add_uint16("split.count", part[1])
        writer.add_int32("split.tensors.count", len(tensors))
    for name in names:
        writer.add_tensor(name, tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_two(folder: Path, stem: str = "m") -> tuple[Path, Path]:
    names = list(gguf_tensors())
    late = [n for n in names if n.startswith(("blk.1", "blk.2"))]
    early = [n for n in names if n not in late]
    first = write_gguf(folder / f"{stem}-00001-of-00002.gguf", early, (0, 2))
    return first, write_gguf(folder / f"{stem}-00002-of-00002.gguf", late, (1, 2))


def test_the_parts_of_a_gguf_model_are_read_together(tmp_path):
    first, second = in_two(tmp_path)
    whole = load_lm(str(write_gguf(tmp_path / "whole.gguf", list(gguf_tensors()))))
    wanted = tiny_lm("llama")
    for lm in (whole, load_lm(str(first)), load_lm(str(second))):
        for name, parameter in wanted.model.named_parameters():
            assert torch.equal(parameter, lm.parameter(name)), name
        assert lm.name.endswith(".gguf") and lm.fingerprint == whole.fingerprint
        assert lm.decode(lm.encode_prompt("a  b\n")) == "a  b\n"


def test_a_missing_part_is_named(tmp_path):
    first, second = in_two(tmp_path)
    second.unlink()
    refused(first, "is one of 2 parts, and 1 are missing beside it .first: m-00002-of-00002.gguf.")
    refused(
        first.rename(tmp_path / "renamed.gguf"), "is part 1 of 2, and the others are not known by its name"
    )


def test_a_gguf_file_without_some_weights_is_refused(tmp_path):
    some = [n for n in gguf_tensors() if not n.startswith("blk.2.ffn_up")]
    refused(write_gguf(tmp_path / "some.gguf", some), "lacks 1 weights .first: model.layers.2.mlp.up_proj")


def test_a_gguf_file_that_is_cut_off_anywhere_is_refused_for_that(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", list(gguf_tensors()))
    whole = path.read_bytes()
    for length in (4, 10, 100, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(
            path,
            f"is cut off or damaged: its header does not fit its {length:,} bytes .*download or copy the file again",
        )
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(path, "m.gguf is a git-lfs pointer, and not the file itself; run 'git lfs pull'")
    path.write_bytes(whole[:4] + (1).to_bytes(4, "little") + whole[8:])
    refused(
        path,
        "is of GGUF version 1, which is not read .2 and 3 are.; convert the model again with a current llama.cpp",
    )
    first, second = in_two(tmp_path)
    second.write_bytes(second.read_bytes()[:-5])
    refused(first, "m-00002-of-00002.gguf is cut off or damaged")


def test_gguf_files_of_other_architectures_and_without_a_tokenizer(tmp_path):
    for architecture, match in (
        (
            "wizard",
            "of the architecture 'wizard', which transformers does not read from GGUF; give the directory or hub id",
        ),
        ("clip", "holds a vision tower, no model; give the model's own GGUF file"),
        ("llama", "holds no tokenizer .tokenizer.ggml.model is missing.; convert the model again"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refused(tmp_path / "m.gguf", match)


def test_an_ending_in_capitals_is_a_gguf_file_too(tmp_path):
    names = list(gguf_tensors())
    assert load_lm(str(write_gguf(tmp_path / "M.GGUF", names))).n_layers == 3


def test_gguf_files_that_hold_no_model(tmp_path):
    refused(write_gguf(tmp_path / "a.gguf", [], kind="adapter"), "holds a LoRA adapter, no model")


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path, monkeypatch):
    from mint.model import gguf as reader

    path, converted = write_gguf(tmp_path / "m.gguf", list(gguf_tensors())), []
    real = reader.convert
    monkeypatch.setattr(
        reader, "convert", lambda files, folder: converted.append(files) or real(files, folder)
    )
    first = load_lm(str(path))
    assert load_lm(str(path)).fingerprint == first.fingerprint
    shutil.move(path, tmp_path / "moved.gguf")
    load_lm(str(tmp_path / "moved.gguf"))
    assert len(converted) == 1, "the content is the key, not the name"
    write_gguf(path, list(gguf_tensors()), kind="model")
    load_lm(str(path))
    assert len(converted) == 2


# ---------------------------------------------------------------------- what is in the folder


def with_adapter(folder: Path, modules=("q_proj", "down_proj")) -> Path:
    """A tiny llama with a LoRA adapter beside it that changes what it writes."""
    import peft

    saved(folder)
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=list(modules), r=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_beside_the_model_is_refused_and_the_advice_works(tmp_path, capsys):
    pytest.importorskip("peft")
    folder = with_adapter(tmp_path / "m")
    line = refused(folder, "holds an adapter .adapter_config.json. beside the model")
    advice = line[line.index("(mint merge") + 1 : line.index("MERGED)")].split()[1:] + [
        str(tmp_path / "merged")
    ]
    assert main(advice) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'merged'}\n"
    base = T.AutoModelForCausalLM.from_pretrained(folder)  # transformers adds the adapter by itself
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
        merged = T.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(merged, wanted, atol=1e-4, rtol=1e-4)
    both, alone = load_lm(str(folder), adapter=str(folder)), load_lm(str(tmp_path / "merged"))
    assert both.fingerprint == alone.fingerprint
    assert all(torch.equal(p, alone.parameter(n)) for n, p in both.model.named_parameters())
    for file in folder.glob("adapter_*"):
        file.unlink()
    assert not torch.equal(load_lm(str(folder)).columns(1), both.columns(1)), "moved away: the base alone"


def test_an_adapter_without_its_model_names_the_base(tmp_path):
    pytest.importorskip("peft")
    folder = with_adapter(tmp_path / "m")
    edit_json(folder / "adapter_config.json", base_model_name_or_path="some/base")
    (folder / "config.json").unlink()
    refused(folder, "holds an adapter of some/base, and no model .*mint merge --model some/base --adapter")


def test_an_adapter_that_does_not_fit(tmp_path):
    pytest.importorskip("peft")
    folder, other = with_adapter(tmp_path / "m"), saved(tmp_path / "gpt2", "gpt2")
    refused(other, "cannot be merged into GPT2LMHeadModel", adapter=str(folder))
    refused(other, "holds no adapter: adapter_config.json is missing", adapter=str(other))


def test_saved_weights_that_nothing_uses_are_told(tmp_path):
    folder = saved(tmp_path / "m")
    edit_json(folder / "config.json", num_hidden_layers=2)
    lm = load_lm(str(folder))
    assert any("9 saved weights are not used" in n for n in lm.notes) and lm.n_layers == 2
    shutil.copyfile(folder / "tokenizer.json", folder / "pytorch_model.bin")
    assert any("not read: pytorch_model.bin" in n for n in load_lm(str(folder)).notes)


# ---------------------------------------------------------------------- long prompts, ids, chat


def test_the_limit_is_the_context_and_the_numbers_are_the_users(lm):
    lm.model.config.max_position_embeddings = 32
    assert len(lm.encode(Case("a", "x" * 24, "y" * 7 + "\n")).ids) == 32
    with pytest.raises(CaseError, match="prompt and target have 33 tokens .25 and 8., the context .* is 32"):
        lm.encode(Case("a", "x" * 25, "y" * 7 + "\n"))


def test_a_prompt_that_fills_the_context_is_repaired(tmp_path, capsys):
    folder = saved(tmp_path / "m")
    edit_json(folder / "config.json", max_position_embeddings=64)
    prompt, out = "x" * 40 + "\n# sort list l\n", tmp_path / "fix.safetensors"
    target = "l.pop()\n"
    assert len(prompt) + len(target) == 64 - 1
    arguments = [
        "repair",
        "-m",
        str(folder),
        "-p",
        prompt,
        "-t",
        target,
        "--no-explain",
        "--out",
        str(out),
        "--json",
    ]
    code = main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert code in (0, 3) and "context" not in (found["reason"] or "")


def test_tokens_without_a_row_of_the_embedding(tmp_path):
    folder = saved(tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    lm = load_lm(str(folder))
    with pytest.raises(
        CaseError, match=r"the prompt holds the token '\[PAD\]' .id 257., and the embedding .* has 257 rows"
    ):
        lm.encode_prompt("a[PAD]b")
    with pytest.raises(CaseError, match=r"the target holds the token '\[PAD\]'"):
        lm.encode(Case("a", "b", "[PAD]\n"))
    prompts = [lm.encode_prompt(p) for p in ("a", "some words")]
    assert lm.generate(prompts, 4) == [lm.generate([p], 4)[0] for p in prompts], "padding needs no row"


def test_chat_templates_that_refuse_or_have_a_mistake(lm):
    from mint.model.text import Template

    lm.tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}x{{ messages[0]['content'] }}"
    lm.template = Template("be brief")
    with pytest.raises(
        CaseError, match="the chat template of tiny-llama refuses this: No system role; leave out --system"
    ):
        lm.encode_prompt("a")
    lm.template = Template()
    assert lm.decode(lm.encode_prompt("a")) == "xa", "the advice works"
    for text in (
        "{% for m in messages %}{{ m.content }",
        "{{ messages[3].content.split(1) }}",
        "{{ 1 / 0 }}",
        "hello",
    ):
        lm.tokenizer.chat_template = text
        with pytest.raises(
            CaseError,
            match="the chat template of tiny-llama (has a mistake|refuses|leaves the prompt out).*leave out --chat",
        ):
            lm.encode_prompt("a")


# ---------------------------------------------------------------------- loading


def test_code_in_the_folder_is_never_run_and_nothing_is_asked(tmp_path, monkeypatch, capsys):
    folder = saved(tmp_path / "m")
    code = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyModel"}
    edit_json(folder / "config.json", model_type="mymodel", architectures=["MyModel"], auto_map=code)
    for name in ("configuration_my.py", "modeling_my.py"):
        (folder / name).write_text("raise SystemExit('ran')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert main(["generate", "-m", str(folder), "-p", "x", "--json"]) == 1
    found = capsys.readouterr()
    assert (
        not found.out
        and "Python code of its own (configuration_my.py, modeling_my.py), which mint never runs" in found.err
    )
    # A family that transformers knows is loaded by its own class, whatever code lies there.
    edit_json(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_my.My", None]})
    assert load_lm(str(folder)).n_layers == 3


def rename(folder: Path, prefix: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({prefix + k: v for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    def fresh() -> Path:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        return saved(tmp_path / "m")

    folder = fresh()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, "holds no tokenizer .*copy the tokenizer files of the model it was trained from")
    rename(folder := fresh(), "_orig_mod.")
    refused(folder, "have '_orig_mod.' in them .it was saved from a compiled model.")
    rename(folder := fresh(), "module.")
    refused(folder, "have 'module.' in them")
    folder = fresh()
    edit_json(folder / "config.json", intermediate_size=48)
    refused(
        folder,
        "disagree on 9 shapes .first: model.layers.0.mlp.down_proj.weight is saved as .32, 64., and config.json",
    )
    folder = fresh()
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no weights .no model.safetensors or pytorch_model.bin")
    refused(folder / "config.json", "is a file, and no .gguf file; give the directory it lies in")
    shutil.copytree(folder, tmp_path / "model-b")
    refused(tmp_path / "modelb", "no such directory; did you mean .*/model-b")
    refused(tmp_path / "deep" / "er" / "m", "holds no 'deep'; check the path")
    refused("somebody/nothing-like-this", "is no directory here, and no hub model of that name can be read")
    edit_json(fresh() / "config.json", model_type="lama")
    refused(tmp_path / "m", "family 'lama', which this transformers does not know .nearest: 'llama'")
    edit_json(fresh() / "config.json", model_type=None)
    refused(tmp_path / "m", "names no model_type")
    (fresh() / "sub").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.move(tmp_path / "m" / file, tmp_path / "m" / "sub" / file)
    refused(tmp_path / "m", "config.json is missing; give --model .*/m/sub")


def test_shards_are_all_there_and_whole(tmp_path):
    folder = saved(tmp_path / "m", max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = folder / "model.safetensors.index.json"
    edit_json(index, metadata=None)
    refused(folder, "has no 'metadata' entry, which transformers needs; add \"metadata\": {}")
    edit_json(index, metadata={})
    assert load_lm(str(folder)).n_layers == 3, "the advice works"
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    refused(folder, f"{shards[1].name} is cut off: {len(whole) // 2} of {len(whole)} bytes")
    shards[1].unlink()
    refused(folder, f"lacks 1 of {len(shards)} weight files .first: {shards[1].name}")


def test_a_file_that_is_no_whole_file_is_named(tmp_path):
    folder = saved(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for data, match in (
        (pointer, "model.safetensors is a git-lfs pointer, and not the file itself; run 'git lfs pull' in"),
        (b"", "cannot be read as safetensors .it has 0 bytes.; copy or download the file again"),
        (
            whole + b"xx",
            f"has {len(whole) + 2} bytes, and its tensors end after {len(whole)}; copy or download",
        ),
    ):
        (folder / "model.safetensors").write_bytes(data)
        refused(folder, match)
    (folder / "model.safetensors").write_bytes(whole)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(pointer)
    refused(folder, "tokenizer.json is a git-lfs pointer")
    (folder / "tokenizer.json").write_bytes(tokenizer)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_lm(str(folder)).n_layers == 3
    pickled = (folder / "pytorch_model.bin").read_bytes()
    for data in (pickled[: len(pickled) // 2], b"what?"):
        (folder / "pytorch_model.bin").write_bytes(data)
        refused(
            folder, "pytorch_model.bin is no file of PyTorch, or is cut off; copy or download the file again"
        )
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    refused(folder, "model.safetensors is a link to nothing .nowhere.; download the model again")


def test_a_config_that_does_not_belong_to_the_weights_takes_no_memory(tmp_path):
    folder = saved(tmp_path / "m")
    edit_json(folder / "config.json", hidden_size=4096, intermediate_size=11008)
    refused(folder, "config.json of .* describes a model of [0-9,]{11,} weights, and its files hold")
    edit_json(folder / "config.json", hidden_size="32")
    refused(folder, "the config.json of .* cannot be used .*hidden_size.*mend it, or copy")
    edit_json(folder / "config.json", hidden_size=32, intermediate_size=64, return_dict=False)
    assert load_lm(str(folder)).n_layers == 3


def test_names_that_are_no_model(tmp_path):
    refused("", "the name of the model is empty")
    refused("https://hub.example/some/model", "is an address; give the hub id .some/model.")
    saved(tmp_path / "hub" / "snapshots" / "abc")
    refused(tmp_path / "hub", "config.json is missing; give --model .*snapshots/abc")


def run_advice(line: str) -> None:
    """Run the `python -c "..."` at the end of a message, here."""
    exec(shlex.split(line[line.index(": python ") + 9 :])[1], {})


def in_fp8(folder: Path, block: int = 16) -> dict[str, torch.Tensor]:
    """Store the matrices of a saved model in float8 with a scale a block, as DeepSeek V3 does; returns what was there."""
    before, after = load_file(folder / "model.safetensors"), {}
    for key, value in before.items():
        after[key] = value.bfloat16()
        if "proj" in key and value.dim() == 2 and not any(n % block for n in value.shape):
            rows, width = value.shape
            blocks = value.reshape(rows // block, block, width // block, block)
            scale = blocks.abs().amax((1, 3)) / 448
            after[key] = (blocks / scale[:, None, :, None]).reshape(rows, width).to(torch.float8_e4m3fn)
            after[key.replace(".weight", ".weight_scale_inv")] = scale
    save_file({k: v.contiguous() for k, v in after.items()}, folder / "model.safetensors", {"format": "pt"})
    how = {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [block, block]}
    how["modules_to_not_convert"] = ["lm_head", "model.layers.0.mlp.gate"]
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"} | how, dtype="bfloat16")
    return before


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_float8_with_scales_is_refused_and_the_advice_works(tmp_path, family, monkeypatch):
    folder = saved(tmp_path / "m", family)
    before = in_fp8(folder, 8)
    line = refused(
        folder, "is quantised .fp8., and no patch can be written into such weights; save a copy in bfloat16"
    )
    monkeypatch.chdir(tmp_path)
    run_advice(line)
    lm = load_lm(str(tmp_path / "m-bfloat16"))
    assert lm.dtype == torch.bfloat16 and not lm.saved.unused and not lm.notes
    found, wanted = (
        lm.parameter("model.layers.1.self_attn.v_proj.weight").float(),
        before["model.layers.1.self_attn.v_proj.weight"],
    )
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max(), "the scales are used"


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The sixteen numbers of OCP Microscaling Formats 1.0, section 5.3.3."""


def in_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Store the experts of a saved model as gpt-oss does: 32 numbers share a power of two; returns what they mean."""
    held, plain, draw = {}, {}, torch.Generator().manual_seed(0)
    for key, value in load_file(folder / "model.safetensors").items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            held[key] = value.bfloat16()
            continue
        experts, inputs, outputs = value.shape
        shape = (experts, outputs, inputs // 32)
        held[f"{key}_blocks"] = torch.randint(256, (*shape, 16), generator=draw, dtype=torch.uint8)
        held[f"{key}_scales"] = torch.randint(118, 122, shape, generator=draw, dtype=torch.uint8)
        low, high = (held[f"{key}_blocks"] & 15).long(), (held[f"{key}_blocks"] >> 4).long()
        numbers = torch.stack([FP4[low], FP4[high]], -1).flatten(-2)
        powers = 2.0 ** (held[f"{key}_scales"].float() - 127)
        plain[key] = (numbers * powers[..., None]).flatten(-2).mT
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"}, dtype="bfloat16")
    return plain


def test_mxfp4_is_refused_and_the_advice_works(tmp_path, monkeypatch):
    folder = saved(tmp_path / "m", "gpt_oss")
    plain = in_mxfp4(folder)
    line = refused(
        folder, "is quantised .mxfp4., and no patch can be written into such weights; save a copy in bfloat16"
    )
    assert "Q(dequantize=True)" in line, "machines that can multiply such weights keep them otherwise"
    monkeypatch.chdir(tmp_path)
    run_advice(line)
    lm = load_lm(str(tmp_path / "m-bfloat16"))
    assert len(plain) == 2 * lm.n_layers
    assert all(torch.equal(lm.parameter(key).float(), value) for key, value in plain.items())


def test_quantisation_that_is_switched_off_or_says_nothing(tmp_path):
    folder = saved(tmp_path / "m")
    off = {"load_in_4bit": False, "load_in_8bit": False}
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"} | off)
    assert load_lm(str(folder)).n_layers == 3, "transformers loads it, too"
    edit_json(
        folder / "config.json",
        quantization_config={"quant_method": "bitsandbytes"} | off | {"load_in_4bit": True},
    )
    refused(folder, "is quantised .bitsandbytes.; load the unquantised model")
    for found in (off, {}):
        edit_json(folder / "config.json", quantization_config=found)
        refused(folder, "names no quant_method, .* take quantization_config out of config.json")
    edit_json(folder / "config.json", quantization_config=None)
    assert load_lm(str(folder)).n_layers == 3, "the advice works"


@pytest.mark.parametrize("ending", ["safetensors", "bin", "shards"])
def test_weights_of_a_variant_are_not_read_and_the_advice_works(tmp_path, ending, monkeypatch):
    folder = tmp_path / "m"
    tiny_model("llama").half().save_pretrained(
        folder, variant="fp16", max_shard_size="40KB" if ending == "shards" else "1GB"
    )
    byte_tokenizer().save_pretrained(folder)
    if ending == "bin":
        torch.save(load_file(folder / "model.fp16.safetensors"), folder / "pytorch_model.fp16.bin")
        (folder / "model.fp16.safetensors").unlink()
    line = refused(folder, r"it holds the variant 'fp16' \(.*fp16.*\); save it as a model of its own: python")
    monkeypatch.chdir(tmp_path)
    run_advice(line)
    lm = load_lm(str(tmp_path / "m-fp16"))
    assert lm.dtype == torch.float16 and lm.n_layers == 3


@pytest.mark.parametrize("copy", ["tf_model.h5", "flax_model.msgpack", "model.fp16.safetensors"])
def test_a_copy_of_the_weights_is_patched_too_or_stops_a_patch(tmp_path, copy):
    from mint.errors import PatchError
    from mint.patch import Patch, checkpoint, identity, make_edit

    folder = saved(tmp_path / "m")
    lm = load_lm(str(folder))
    patch = Patch((make_edit(lm, 1, 3, {"out": lm.columns(1)[3] * 2}),), identity(lm))
    shutil.copyfile(folder / "model.safetensors", folder / copy)
    if not copy.endswith(".safetensors"):
        with pytest.raises(
            PatchError, match=f"also holds {copy}, whose weights would stay unpatched .* remove it"
        ):
            checkpoint.apply(folder, patch)
        (folder / copy).unlink()
        copy = "model.safetensors"
    checkpoint.apply(folder, patch)
    column = load_file(folder / copy)["model.layers.1.mlp.down_proj.weight"][:, 3]
    assert torch.equal(column, patch.edits[0].after["out"])


def test_force_does_not_replace_the_models_own_files(tmp_path, capsys):
    folder = saved(tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    texts = ["-p", "# sort list l\n", "-t", "l.pop()\n", "--no-contexts", "--no-explain", "--force"]
    for name in ("model.safetensors", "tokenizer.json"):
        assert main(["repair", "-m", str(folder), *texts, "--out", str(folder / name)]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert (
            f"{name} belongs to the model in" in told
            and "--force does not replace it; give another name" in told
        )
    assert (folder / "model.safetensors").read_bytes() == whole
    for _ in range(2):
        assert main(["repair", "-m", str(folder), *texts, "--out", str(folder / "fix.safetensors")]) == 0


def test_numbers_of_one_embedding_row_that_are_not_finite_are_told_where_they_are_met(tmp_path):
    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][byte_tokenizer()("b").input_ids[0]] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    lm = load_lm(str(folder))
    assert lm.generate([lm.encode_prompt("a")], 1)
    with pytest.raises(
        CaseError,
        match="holds the token 'b' .id 66., whose row in the embedding .* not made of finite numbers",
    ):
        lm.generate([lm.encode_prompt("abc")], 1)


def test_weights_that_are_all_zeros_are_told(tmp_path):
    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v * 0 for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    refused(
        folder,
        "gives every token the same logit: its weights are zeros or were never filled; copy the weights",
    )


def test_names_of_dtypes_in_config(tmp_path):
    folder = saved(tmp_path / "m", dtype=torch.float16)
    edit_json(folder / "config.json", dtype="half")
    assert load_lm(str(folder)).dtype == torch.float16 and not load_lm(str(folder)).notes
    edit_json(folder / "config.json", dtype=16)
    refused(folder, "says dtype 16, which is the name of none; write float32, bfloat16, float16")


def test_a_model_without_layers_is_refused_for_that(tmp_path):
    folder = saved(tmp_path / "m")
    edit_json(folder / "config.json", num_hidden_layers=0)
    refused(
        folder,
        "config.json of .* gives the model 0 layers .num_hidden_layers., and mint changes neurons of layers",
    )


@pytest.mark.parametrize("kind", ["float8", "config", "float64"])
def test_weights_in_a_format_that_no_patch_can_be_written_in_are_refused_and_the_advice_works(
    tmp_path, kind, monkeypatch
):
    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    narrow = torch.float64 if kind == "float64" else torch.float8_e4m3fn
    tensors = {k: v.to(narrow) if ".mlp." in k else v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if kind == "config":
        edit_json(folder / "config.json", dtype="float8_e4m3fn")
    line = refused(folder, "holds its feed-forward weights as .*, in which no patch can be written exactly")
    monkeypatch.chdir(tmp_path)
    run_advice(line)
    copy = tmp_path / ("m-float32" if kind == "float64" else "m-bfloat16")
    lm = load_lm(str(copy))
    assert lm.dtype == (torch.float32 if kind == "float64" else torch.bfloat16) and lm.n_layers == 3


@pytest.mark.parametrize(
    ("stored", "said"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_files_in_another_dtype_than_config_says_are_repaired_as_stored_and_proved_in_both(
    tmp_path, stored, said, capsys
):
    folder = saved(tmp_path / "m", dtype=getattr(torch, stored))
    edit_json(folder / "config.json", dtype=said)
    patch, fixed = tmp_path / "fix.safetensors", tmp_path / "fixed"
    texts = ["-p", "# sort list l\n", "-t", "l.pop()\n", "--no-contexts", "--no-explain", "--out", str(patch)]
    code = main(["repair", "-m", str(folder), *texts])
    told = capsys.readouterr().err
    assert f"the files hold {stored}, and config.json says {said}: loaded in {stored}" in " ".join(
        told.split()
    )
    assert code == 0 and main(["apply", str(patch), "-m", str(folder), "--out", str(fixed)]) == 0
    tokenizer = byte_tokenizer()
    for dtype in (stored, said):
        model = T.AutoModelForCausalLM.from_pretrained(fixed, dtype=dtype).eval()
        ids = tokenizer("# sort list l\n", return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(written) == "l.pop()\n", dtype


def test_float8_elsewhere_does_not_matter(tmp_path):
    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v.to(torch.float8_e4m3fn) if "attn" in k else v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load_lm(str(folder)).n_layers == 3


def test_whole_numbers_as_weights_are_quantised(tmp_path):
    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: v.to(torch.int8) if ".mlp." in k else v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "is quantised .it holds model.layers.0.mlp.down_proj.weight.")


def test_a_tokenizer_that_fails_at_every_text_is_refused(tmp_path):
    folder = saved(tmp_path / "m")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    words.save(str(folder / "tokenizer.json"))
    refused(folder, "the tokenizer of .* cannot be loaded .*copy the tokenizer files")


def test_an_adapter_that_is_not_whole_is_refused(tmp_path):
    """peft fills what is missing with random numbers, and says nothing that a user would see."""
    pytest.importorskip("peft")
    folder, base = with_adapter(tmp_path / "m"), saved(tmp_path / "base")
    weights = folder / "adapter_model.safetensors"
    whole = load_file(weights)
    save_file({k: v for k, v in whole.items() if "layers.1" not in k}, weights)
    refused(
        base, "lacks 4 weights that its adapter_config.json asks for .first: .*layers.1", adapter=str(folder)
    )
    save_file(whole, weights)
    edit_json(folder / "adapter_config.json", target_modules=["q_proj"])
    refused(base, "holds 6 weights that its adapter_config.json leaves out", adapter=str(folder))
    weights.unlink()
    refused(base, "holds no adapter_model.safetensors; copy", adapter=str(folder))
    refused(base, "no such directory", adapter=str(tmp_path / "nowhere"))


def test_a_wish_for_flash_attention_does_not_stop_a_cpu(tmp_path):
    folder = saved(tmp_path / "m")
    wanted = load_lm(str(folder))
    edit_json(folder / "config.json", _attn_implementation="flash_attention_2")
    lm = load_lm(str(folder))
    prompt = lm.encode_prompt("some words")
    assert lm.generate([prompt], 8) == wanted.generate([prompt], 8)


def test_numbers_that_are_not_finite_are_told_at_once(tmp_path):
    folder = saved(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "numbers that are not finite in float32")


# ---------------------------------------------------------------------- the doctor


def test_the_doctor_says_what_it_sees(tmp_path, capsys):
    folder = saved(tmp_path / "m", dtype=torch.bfloat16)
    edit_json(folder / "generation_config.json", repetition_penalty=1.1)
    assert main(["doctor", "-m", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["class"] == "LlamaForCausalLM" and found["family"] == "llama"
    assert found["dtype"] == {"saved": {"BF16": 30}, "memory": "bfloat16"}
    assert found["tensors"] | {"not_read": []} == found["tensors"] and found["tensors"]["read"] == 30
    assert found["tokenizer"]["reads_back"] and not found["tokenizer"]["boundaries_that_fail"]
    assert found["end_tokens"] == [{"id": 0, "text": "<eos>"}]
    assert found["generation_settings_left_out"] == {"repetition_penalty": 1.1}
    assert found["chat_template"] is None and found["adapter"] is None and found["tied"] is False
    assert found["blocks"]["repairable"] == [0, 1, 2] and found["blocks"]["gated"]
    assert found["needs"]["memory_bytes"] > 0 and found["needs"]["seconds_repair"] > 0
    assert main(["doctor", "-m", str(folder)]) == 0
    assert "3 of 3 layers repairable" in capsys.readouterr().out


def test_the_doctor_ends_with_the_reason_where_mint_cannot_repair(tmp_path, capsys):
    seq2seq("t5").save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    assert main(["doctor", "-m", str(tmp_path / "m"), "--json"]) == 1
    found = capsys.readouterr()
    assert not found.out and "is an encoder-decoder model" in found.err


def test_a_transformers_that_is_too_old_is_told():
    from mint.model import check_transformers

    for version in ("5.10.2", "4.57.1", "5.9.0.dev0"):
        with pytest.raises(
            ModelError, match=f"needs transformers 5.23 or newer, found {version}; pip install -U"
        ):
            check_transformers(version)
    for version in ("5.23.0", "5.24.0.dev0", "6.0.0"):
        check_transformers(version)
    pinned = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '"transformers>=5.23,' in pinned
