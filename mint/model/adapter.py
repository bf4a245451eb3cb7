"""A PEFT adapter merged into its base model, in memory. Needs `peft`; knows nothing about prompts or edits."""

from pathlib import Path

from transformers import PreTrainedModel

from mint.errors import ModelError
from mint.extras import need


def check_library() -> None:
    """Raise `MintError` where peft, which merges adapters, is not installed."""
    need("merging an adapter", "peft")


def merge(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with the adapter of a directory (or hub id) merged into its weights.

    Raises `MintError` where peft is not installed, and `ModelError` where the adapter is of a kind that has no merged form, or does not fit.
    """
    check_library()
    from peft import PeftModel

    local = Path(adapter).expanduser()
    if local.exists() and not (local / "adapter_config.json").is_file():
        raise ModelError(
            f"{adapter} holds no adapter: adapter_config.json is missing; give an adapter's directory"
        )
    try:
        with_adapter = PeftModel.from_pretrained(model, adapter)
        merged = with_adapter.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises many kinds
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"the adapter {adapter} cannot be merged into {type(model).__name__} ({said[:200]}); give the adapter that was"
            " trained on this model"
        ) from None
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    if hasattr(merged, "_hf_peft_config_loaded"):
        merged._hf_peft_config_loaded = False
    return merged
