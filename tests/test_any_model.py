"""Random small models of all families, from the command line: repaired or refused, never a traceback, never a changed
byte that was not meant; plain transformers reads the result and writes the target."""

import json
import struct
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers as T
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from mint.cli import main
from tests.conftest import DELTA, FAMILIES, FOUR, GATED, HYBRIDS, MIXTURES, byte_tokenizer

PROMPT = "# sort list l\n"
FIXED = {"gpt2", "gpt_bigcode", "codegen", "bloom", "falcon", "gpt_neox", "opt", *HYBRIDS, *MIXTURES}
"""Families whose number of layers is left as it is; the others draw it."""
EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip


def _qwen3_5(**k):
    eye = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    return T.Qwen3_5Config(text_config=FOUR | DELTA | k, vision_config=eye, image_token_id=250, video_token_id=251,
                           vision_start_token_id=252, vision_end_token_id=253, tie_word_embeddings=False)  # fmt: skip


def _llava(**k):
    text, eye = T.LlamaConfig(**GATED, **k), T.CLIPVisionConfig(**EYE)
    return T.LlavaConfig(
        text_config=text, vision_config=eye, image_token_index=250, tie_word_embeddings=False
    )


def _qwen2_vl(**k):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    eye = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    return T.Qwen2VLConfig(text_config=GATED | {"rope_parameters": rope} | k, vision_config=eye, image_token_id=250,
                           video_token_id=251, vision_start_token_id=252, vision_end_token_id=253)  # fmt: skip


WRAPPERS = {"qwen3_5_vl": _qwen3_5, "llava": _llava, "qwen2_vl": _qwen2_vl}
"""Models for images and text: their text layers are repaired, the rest stays as it is."""
LIKE_ANOTHER = {
    "mistral",
    "qwen2",
    "olmo_hybrid",
    "bamba",
    "falcon_h1",
    "olmoe",
    "deepseek_v2",
    "qwen3_next",
    "lfm2_moe",
    "glm",
}
"""Built like others here: drawn only."""
ALL = FAMILIES | HYBRIDS | MIXTURES | WRAPPERS


def draw_model(
    family: str, seed: int, dtype: torch.dtype, tied: bool, layers: int, scale: float
) -> T.PreTrainedModel:
    """A random model of a family; scale: of its weights, from nearly silent to far from linear."""
    torch.manual_seed(seed)
    options = dict(
        vocab_size=257, bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=tied
    )
    config = ALL[family](**options)
    if family not in FIXED and family not in WRAPPERS:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * layers)[:layers]
    auto = T.AutoModelForImageTextToText if family in WRAPPERS else T.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.to(dtype)


def mint(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


def plain(folder: Path, prompt: str, n: int) -> str:
    """What plain transformers writes: forwards and argmax, without mint, caches and generation settings."""
    tokenizer = T.AutoTokenizer.from_pretrained(folder)
    config = T.AutoConfig.from_pretrained(folder)
    text = type(config) in T.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = T.AutoModelForCausalLM if text else T.AutoModelForImageTextToText
    model = auto.from_pretrained(folder, dtype="auto").eval()
    ids = tokenizer(prompt).input_ids
    start = len(ids)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:])


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def tensors(data: bytes) -> dict[str, bytes]:
    """The bytes of every tensor of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {k: data[8 + length :][slice(*v["data_offsets"])] for k, v in header.items()}


def check(
    family: str, seed: int, dtype: torch.dtype, tied: bool, layers: int, scale: float, target: str
) -> int:
    """Repair, apply into a copy, revert in place; returns the exit code of the repair."""
    with TemporaryDirectory() as temporary:
        folder, fixed = Path(temporary) / "m", Path(temporary) / "fixed"
        patch = Path(temporary) / "fix.safetensors"
        draw_model(family, seed, dtype, tied, layers, scale).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        before = files(folder)
        code, out, err = mint(
            "repair",
            "-m",
            folder,
            "-p",
            PROMPT,
            "-t",
            target,
            "--no-explain",
            "--no-contexts",
            "--out",
            patch,
            "--json",
        )
        assert code in (0, 1, 3) and "internal error" not in err and "Traceback" not in err, err
        assert files(folder) == before, "a repair changes nothing on disk"
        if code == 0 and json.loads(out)["patch"]:
            found = json.loads(out)
            assert found["success"] and found["generated_after"] == target
            code_apply, _, err = mint("apply", patch, "-m", folder, "--out", fixed)
            assert code_apply == 0, err
            assert files(folder) == before
            after = files(fixed)
            assert plain(fixed, PROMPT, len(target.encode())) == target  # a token a byte
            changed = {k for k, v in before.items() if after.get(k) != v}
            assert changed == {"model.safetensors"} and set(after) - set(before) <= {
                "mint_patches.json",
                "README.md",
            }
            old, new = tensors(before["model.safetensors"]), tensors(after["model.safetensors"])
            touched = {k for k in old if old[k] != new[k]}
            layers_touched = {n["layer"] for n in found["neurons"]}
            assert old.keys() == new.keys() and all(
                any(f".{n}." in k for n in layers_touched) for k in touched
            )
            assert len(touched) <= 5 * len(layers_touched)
            assert not any("vision" in k or "visual" in k for k in touched)
            code_revert, _, err = mint("revert", patch, "-m", fixed, "--in-place")
            assert code_revert == 0, err
            assert files(fixed) == before, "a revert gives back every byte"
        else:
            assert not patch.exists() or code == 0
            assert code != 1 or err.strip().count("\n") == 0, "one line"
        return code


@pytest.mark.parametrize("family", sorted(ALL.keys() - LIKE_ANOTHER))
def test_every_family_is_repaired_or_refused(family):
    check(family, 0, torch.float32, False, 3, 4.0, "l.pop()\n")


@settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
@given(
    family=st.sampled_from(sorted(ALL)),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tied=st.booleans(),
    layers=st.integers(1, 4),
    scale=st.sampled_from([1.0, 3.0, 8.0]),
    target=st.sampled_from(["l.pop()\n", "x", "é = 'ü'\n", "    return 0\n", "\n"]),
)
@example("llama", 0, torch.bfloat16, True, 1, 4.0, "l.pop()\n")
def test_any_model_is_repaired_or_refused(family, seed, dtype, tied, layers, scale, target):
    check(family, seed, dtype, tied, layers, scale, target)
