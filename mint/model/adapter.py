"""A PEFT adapter merged into its base model, in memory. Needs `peft`; knows nothing about prompts or edits."""

import json
import warnings
from pathlib import Path

from transformers import PreTrainedModel

from mint.errors import ModelError
from mint.extras import need
from mint.model.saved import ADAPTER, safetensors_header


def check_library() -> None:
    """Raise `MintError` where peft, which merges adapters, is not installed."""
    need("merging an adapter", "peft")


def merge(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The model with the adapter of a directory (or hub id) merged into its weights.

    Raises `MintError` where peft is not installed, and `ModelError` where the adapter is of a kind that has no merged form, or
    does not fit: what peft would fill with random numbers is missing, or saved weights would be passed over.
    """
    check_library()
    from peft import PeftModel

    _check_files(adapter)
    try:
        with warnings.catch_warnings():  # what they say of missing weights is told below
            warnings.simplefilter("ignore")
            with_adapter = PeftModel.from_pretrained(model, adapter)
    except Exception as error:  # peft raises many kinds
        raise _misfit(adapter, model, error) from None
    if not hasattr(with_adapter, "merge_and_unload") or with_adapter.active_peft_config.is_prompt_learning:
        kind = with_adapter.active_peft_config.peft_type
        raise ModelError(
            f"the adapter {adapter} is of the kind {getattr(kind, 'value', kind)}, which puts tokens in"
            " front of the prompt and has no merged form; give a LoRA adapter, or repair the base alone"
        )
    _check_complete(with_adapter, adapter)
    try:
        merged = with_adapter.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise _misfit(adapter, model, error) from None
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    if hasattr(merged, "_hf_peft_config_loaded"):
        merged._hf_peft_config_loaded = False
    return merged


def _misfit(adapter: str, model: PreTrainedModel, error: Exception) -> ModelError:
    said = " ".join(str(error).split()) or type(error).__name__
    return ModelError(
        f"the adapter {adapter} cannot be merged into {type(model).__name__} ({said[:200]}); give the adapter that was"
        " trained on this model"
    )


def _check_files(adapter: str) -> None:
    """Raise `ModelError` where a local directory holds no whole adapter."""
    folder = Path(adapter).expanduser()
    if not folder.exists():
        if adapter.startswith((".", "/", "~")) or adapter.count("/") > 1:
            raise ModelError(f"{adapter}: no such directory; give an adapter's directory or hub id")
        return
    config = folder / ADAPTER
    if not config.is_file():
        raise ModelError(f"{adapter} holds no adapter: {ADAPTER} is missing; give an adapter's directory")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{config} cannot be read as JSON ({' '.join(str(error).split())}); mend it, or copy it from the adapter again"
        ) from None
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        safetensors_header(weights)
    elif not (folder / "adapter_model.bin").is_file():
        raise ModelError(f"{adapter} holds no adapter_model.safetensors; copy the adapter's weights into it")


def _check_complete(with_adapter, adapter: str) -> None:
    """Raise `ModelError` unless the saved weights are those that the adapter's config asks for."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    saved = set(load_peft_weights(adapter, device="cpu"))
    needed = set(get_peft_model_state_dict(with_adapter, save_embedding_layers=False))
    known = needed | set(get_peft_model_state_dict(with_adapter, save_embedding_layers=True))
    for wrong, what in ((needed - saved, "lacks"), (saved - known, "holds")):
        if wrong:
            rest = (
                "that its adapter_config.json asks for"
                if what == "lacks"
                else "that its adapter_config.json leaves out"
            )
            raise ModelError(
                f"the adapter {adapter} {what} {len(wrong)} weights {rest} (first: {min(wrong)}); copy the adapter's files"
                " again, or give the adapter that was trained on this model"
            )
