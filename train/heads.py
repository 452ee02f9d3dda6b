"""The head of a pretrained model: kept where it is for this task, new where it is not, refused where it misleads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("Bert", "Roberta", "DebertaV2", "ModernBert", "GPT2", "Llama", "Qwen3", "T5", "Bart")  # to name a few


def check_labels(config: Any, model_class: Any, from_task: dict[str, Any], path: str) -> None:
    """Raise `UserError` for a head that has learned the task's labels in another order: it would take each for another.

    Other labels than the task's are no such case: their head is a beginning like any, or has another size.
    """
    head = (model_class if isinstance(model_class, str) else model_class.__name__).rpartition("For")[2]
    both = config.id2label, from_task.get("id2label")
    known, wanted = ([name for _, name in sorted((found or {}).items())] for found in both)  # files put 10 before 2
    trained = any(name.endswith(f"For{head}") for name in config.architectures or ())
    if trained and known != wanted and sorted(known) == sorted(wanted):
        raise UserError(
            f"model.path: {path} has learned the labels in the order {', '.join(known)}, the task has "
            f"{', '.join(wanted)}; set task.labels to the model's order"
        )


def replaced_head(model: PreTrainedModel, mismatched: Any) -> list[str]:
    """Return the parameters that were drawn anew because the head in the file is for other labels; raise `ValueError`
    where anything else has not the size that the config says."""
    names = [name for name, *_ in mismatched]
    for name, there, here in mismatched:
        if name.startswith(f"{model.base_model_prefix}.") or tuple(there)[1:] != tuple(here)[1:]:
            raise ValueError(f"{name} is {tuple(there)} in the file and {tuple(here)} by the config")
    return names


def refuse_headless(where: str, error: Exception) -> None:
    """Raise `UserError` where transformers has no such head for this kind: its own message lists dozens that have."""
    said = str(error)
    if said.startswith("Unrecognized configuration class"):
        there = [name for name in FAMILIES if f"{name}Config" in said.partition("Model type should be")[2]]
        wanted = said.partition("AutoModel: ")[2].split(".")[0]
        raise UserError(
            f"{where}: transformers has no {wanted} for this kind of model; there is one for "
            f"{', '.join(there)} and others"
        ) from error
