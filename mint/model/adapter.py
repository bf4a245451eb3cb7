"""A PEFT adapter merged into its base model, in memory. Needs `peft`; knows nothing about prompts or edits."""

from pathlib import Path

from transformers import PreTrainedModel

from mint.errors import ModelError


def merge(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with the adapter of a directory (or hub id) merged into its weights.

    Raises `ModelError` where peft is not installed, or the adapter is of a kind that has no merged form, or does not fit.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError("merging an adapter needs peft, which is not installed; pip install peft") from None
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
