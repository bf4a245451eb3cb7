"""Tiny models of every supported family, built in memory; the real model only where a test is marked `real`."""

import signal

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mint.model.layout import find_layout
from mint.model.lm import LM

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = SIZE | {"num_key_value_heads": 2, "intermediate_size": 64}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4}

FAMILIES = {
    "gpt2": lambda **k: T.GPT2Config(**GPT, **k),
    "gpt_bigcode": lambda **k: T.GPTBigCodeConfig(**GPT, **k),
    "gpt_neox": lambda **k: T.GPTNeoXConfig(**SIZE, intermediate_size=64, **k),
    "codegen": lambda **k: T.CodeGenConfig(**GPT, rotary_dim=4, **k),
    "starcoder2": lambda **k: T.Starcoder2Config(**GATED, **k),
    "llama": lambda **k: T.LlamaConfig(**GATED, **k),
    "mistral": lambda **k: T.MistralConfig(**GATED, **k),
    "qwen2": lambda **k: T.Qwen2Config(**GATED, **k),
    "qwen3": lambda **k: T.Qwen3Config(**GATED, head_dim=8, **k),
    "gemma2": lambda **k: T.Gemma2Config(**GATED, head_dim=16, **k),
    "phi3": lambda **k: T.Phi3Config(**GATED, **k),
    "opt": lambda **k: T.OPTConfig(**SIZE, ffn_dim=64, word_embed_proj_dim=32, **k),
    "bloom": lambda **k: T.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **k),
    "falcon": lambda **k: T.FalconConfig(**SIZE, **k),
}

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}
DELTA = {
    "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
FOUR = GATED | {"num_hidden_layers": 4}
EYE = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def _gemma3(**k):
    """A vision-language wrapper whose vision tower is larger than its language model."""
    text = GATED | {"head_dim": 8, "sliding_window": 4} | k
    return T.Gemma3Config(text_config=text, vision_config=EYE, image_token_index=250, boi_token_index=251,
                          eoi_token_index=252)  # fmt: skip


HYBRIDS = {
    "granite_hybrid": lambda **k: T.GraniteMoeHybridConfig(
        **GATED, **MAMBA, num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=64, mamba_n_groups=1,
        layer_types=["mamba", "attention", "mamba"], mamba_expand=2, **k),
    "lfm2": lambda **k: T.Lfm2Config(**GATED, full_attn_idxs=[1], block_auto_adjust_ff_dim=False, **k),
    "falcon_h1": lambda **k: T.FalconH1Config(**GATED, **MAMBA, mamba_d_ssm=64, mlp_multipliers=[0.7, 1.3], **k),
    "qwen3_5": lambda **k: T.Qwen3_5TextConfig(**FOUR, **DELTA, **k),
    "qwen3_next": lambda **k: T.Qwen3NextConfig(**FOUR, **DELTA, mlp_only_layers=[0, 1, 2, 3], num_experts=0, **k),
    "olmo_hybrid": lambda **k: T.OlmoHybridConfig(**FOUR, **{n: v for n, v in DELTA.items() if n != "head_dim"}, **k),
    "jamba": lambda **k: T.JambaConfig(
        **GATED, num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
        use_mamba_kernels=False, **k),
    "recurrent_gemma": lambda **k: T.RecurrentGemmaConfig(
        **(GATED | {"intermediate_size": 128}), lru_width=32, attention_window_size=32, **k),
    "bamba": lambda **k: T.BambaConfig(**GATED, **MAMBA, attn_layer_indices=[1], mamba_n_groups=1, **k),
    "nemotron_h": lambda **k: T.NemotronHConfig(
        **FOUR, head_dim=8, hybrid_override_pattern="-M*-", mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=16,
        **k),
    "apertus": lambda **k: T.ApertusConfig(**GATED, **k),
    "doge": lambda **k: T.DogeConfig(**GATED, **k),
    "glm": lambda **k: T.GlmConfig(**GATED, head_dim=8, **k),
    "gemma3": _gemma3,
}  # fmt: skip
"""Dense models whose layers are not all alike, with activations or wrappers of their own."""


TWO_OF = {"num_experts_per_tok": 2}
SMALL = {"moe_intermediate_size": 24}
MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_shared_experts": 1, "first_k_dense_replace": 1, **TWO_OF, **SMALL, **GATED, "num_key_value_heads": 4,
}  # fmt: skip

MIXTURES = {
    "mixtral": lambda **k: T.MixtralConfig(**GATED, **TWO_OF, num_local_experts=4, **k),
    "qwen2_moe": lambda **k: T.Qwen2MoeConfig(
        **GATED, **TWO_OF, **SMALL, num_experts=4, shared_expert_intermediate_size=48, mlp_only_layers=[1], **k),
    "qwen3_moe": lambda **k: T.Qwen3MoeConfig(**GATED, **TWO_OF, **SMALL, head_dim=8, num_experts=4, **k),
    "olmoe": lambda **k: T.OlmoeConfig(**GATED, **TWO_OF, num_experts=4, **k),
    "deepseek_v2": lambda **k: T.DeepseekV2Config(**MLA, n_routed_experts=4, **k),
    "deepseek_v3": lambda **k: T.DeepseekV3Config(**MLA, n_routed_experts=8, n_group=2, topk_group=1, **k),
    "granitemoe": lambda **k: T.GraniteMoeConfig(**GATED, **TWO_OF, num_local_experts=4, **k),
    "gpt_oss": lambda **k: T.GptOssConfig(**GATED, **TWO_OF, head_dim=8, num_local_experts=4, **({"sliding_window": 16} | k)),
    "lfm2_moe": lambda **k: T.Lfm2MoeConfig(
        **GATED, **TWO_OF, **SMALL, num_experts=4, num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv"], **k),
    "nemotron_h_moe": lambda **k: T.NemotronHConfig(
        **FOUR, **TWO_OF, **SMALL, head_dim=8, hybrid_override_pattern="-E*E", mamba_num_heads=8, mamba_head_dim=8,
        ssm_state_size=16, n_routed_experts=4, moe_shared_expert_intermediate_size=24, **k),
}  # fmt: skip
"""Mixtures of experts: routed only, with shared experts, with dense layers, with and without gates and biases."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, an end-of-sequence token and nothing to download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> torch.nn.Module:
    """A random model of a family: 3 layers, width 32, bytes as vocabulary. settings: of its config, beside the table's."""
    torch.manual_seed(seed)
    config = (FAMILIES | HYBRIDS | MIXTURES)[family](
        vocab_size=257, bos_token_id=None, eos_token_id=0, pad_token_id=0, **settings
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # Freshly initialised models are nearly linear and nearly silent; larger weights make them behave.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            elif parameter.numel() > 1 and not parameter.any():
                parameter.normal_(0, 0.1)
    return model.to(dtype)


def tiny_lm(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **settings) -> LM:
    model = tiny_model(family, seed, dtype, **settings)
    return LM(model, byte_tokenizer(), find_layout(model), f"tiny-{family}")


@pytest.fixture(params=sorted(FAMILIES))
def any_lm(request) -> LM:
    """One tiny model of every supported family in turn."""
    return tiny_lm(request.param)


@pytest.fixture
def lm() -> LM:
    """A tiny gated model (llama)."""
    return tiny_lm("llama")


@pytest.fixture
def plain_lm() -> LM:
    """A tiny plain model (gpt2: Conv1D, biases, tied embeddings)."""
    return tiny_lm("gpt2")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_us():
    """A shell starts background jobs with Ctrl-C ignored, and children inherit that: the tests of Ctrl-C need it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(autouse=True)
def _quiet_home(tmp_path, monkeypatch, request):
    """Caches go to a temporary folder, except for tests on the real model, which share one download."""
    if "real" not in request.keywords:
        monkeypatch.setenv("MINT_CACHE", str(tmp_path / "cache"))


def weights_of(lm: LM) -> dict[str, torch.Tensor]:
    """A copy of every weight, to compare bits with."""
    return {n: p.detach().clone() for n, p in lm.model.named_parameters()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8)) for n in a
    )


@pytest.fixture(scope="session")
def real_lm() -> LM:
    """The built-in model. Read-only: leave it as you found it."""
    from mint.model.loading import BUILTIN, load_lm

    return load_lm(BUILTIN)


@pytest.fixture(scope="session")
def habit_lm() -> LM:
    """A tiny trained model with a habit (tests/habits.py). Read-only: leave it as you found it."""
    from tests.habits import habitual_lm

    return habitual_lm()
