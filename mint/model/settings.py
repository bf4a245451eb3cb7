"""A model's own generation settings: read leniently, kept out of what mint judges, and told to the user.

mint judges plain greedy text. A file of settings may be wrong, may ask for what is not installed, and may bend the text;
so only its end tokens are taken, and the rest can be asked for on purpose (`LM.generate_with_settings`).
"""

from dataclasses import dataclass, field
from typing import TypeGuard

from transformers import GenerationConfig

# Settings that do not change the text that is written from given tokens, only where it ends or what comes with it.
_HARMLESS = frozenset(
    "eos_token_id bos_token_id pad_token_id decoder_start_token_id max_length max_new_tokens use_cache transformers_version"
    " _from_model_config output_attentions output_hidden_states output_scores output_logits return_dict_in_generate"
    " num_return_sequences cache_implementation cache_config return_legacy_cache remove_invalid_values prefill_chunk_size"
    " compile_config disable_compile early_stopping length_penalty num_beam_groups diversity_penalty trust_remote_code"
    " chat_format max_window_size generation_mode forced_bos_token_id".split()
)
# Values that do nothing.
_NEUTRAL = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "assistant_early_exit": None,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
# Settings that matter only where tokens are drawn.
_SAMPLING = frozenset(
    "temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff top_h renormalize_logits".split()
)
# Of the settings kept for `verify`, those that would ask for other outputs, or for many.
_DROPPED = frozenset(
    "transformers_version _from_model_config do_sample num_return_sequences return_dict_in_generate output_attentions"
    " output_hidden_states output_scores output_logits cache_implementation cache_config max_length max_new_tokens max_time"
    " stop_strings compile_config prefill_chunk_size".split()
)


@dataclass(frozen=True)
class Settings:
    """What `generation_config.json` (or config.json) of a model says about generation."""

    ends: frozenset[int] = frozenset()
    """Ids that end a text."""
    changing: dict = field(default_factory=dict)
    """Settings that would make the text another one than the plain greedy one."""

    @classmethod
    def read(cls, raw: dict) -> "Settings":
        """The settings in a decoded JSON object; entries that make no sense are left out, not refused."""
        value = raw.get("eos_token_id")
        known = set(GenerationConfig().to_dict()) | set(_NEUTRAL)
        drawn = raw.get("do_sample") is True
        changing = {
            key: found
            for key, found in sorted(raw.items())
            if key in known
            and key not in _HARMLESS
            and found not in (None, False, [], {}, _NEUTRAL.get(key))
            and (drawn or key not in _SAMPLING)
        }
        ends = value if isinstance(value, list) else [value]
        return cls(frozenset(i for i in ends if _is_id(i)), changing)

    def plain(self) -> GenerationConfig:
        """Settings that keep nothing but the end tokens."""
        return GenerationConfig(eos_token_id=sorted(self.ends) or None)

    def notes(self) -> list[str]:
        """One line for the user where something in them changes the text; else nothing."""
        if not self.changing:
            return []
        return [
            f"the model's generation settings ({self.told}) are left out: mint judges plain greedy text; --verify-settings"
            " generates once more under them"
        ]

    @property
    def told(self) -> str:
        """The settings that change something, in one line."""
        return ", ".join(
            k if v is True or isinstance(v, list | dict) else f"{k} {v}" for k, v in self.changing.items()
        )

    def config(self, **plain) -> GenerationConfig:
        """Settings for one greedy generation under them. plain: what the caller decides (end tokens, length).

        Raises what transformers raises for values that it does not take.
        """
        kept = {k: v for k, v in self.changing.items() if k not in _DROPPED and k not in _SAMPLING}
        return GenerationConfig(**kept | {"do_sample": False} | plain)


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
