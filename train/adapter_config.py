"""What the config says of adapters: how little of a pretrained model learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from data.section import Section

Name = Annotated[str, Field(min_length=1)]


class AdapterConfig(Section):
    """Small matrices beside the layers of a frozen model: only they learn, and what is new, such as a head."""

    kind: Literal["lora", "dora", "rslora"] = Field(
        "lora", description="dora: direction and length of the weights apart; rslora: scaled by the root of the rank."
    )
    rank: int = Field(8, ge=1, description="Inner size of the two matrices beside each layer.")
    alpha: float = Field(16.0, gt=0, description="What they add is scaled by alpha / rank; rslora: alpha / root of it.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Of the adapters' inputs, in training.")
    target_modules: Literal["auto"] | Annotated[tuple[Name, ...], Field(min_length=1)] = Field(
        "auto", description="Ends of the names of layers that get one; auto: every linear layer but the output layer."
    )
    also_train: tuple[Name, ...] = Field(
        (), description="Ends of the names of modules that learn as a whole. What is new always does."
    )
    merge: bool = Field(
        False, description="Export one whole model, the adapter merged into it; false: the adapter beside its base."
    )
    quantize: Literal["4bit", "8bit"] | None = Field(
        None, description="Hold the frozen linear layers in so many bits (QLoRA), with bitsandbytes."
    )

    def __str__(self) -> str:
        """Say it in words."""
        name = {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}[self.kind]
        return f"{name} of rank {self.rank}{f' on {self.quantize} weights' if self.quantize else ''}"


def between_task(task: str, whole: bool, adapter: AdapterConfig | None) -> Iterator[str]:
    """Yield what is wrong between the adapter and the task, which exports nothing but `whole` models, or any."""
    if not whole or adapter is None or adapter.merge:
        return
    if adapter.quantize:
        yield (
            f"adapter.quantize: cannot go with the task {task}: others load what it exports as one whole model, and "
            "what is held in so few bits cannot be merged. Leave it out, and give adapter.merge=true"
        )
    else:
        yield (
            f"adapter.merge: must be true with the task {task}: others load what it exports as one whole model, not as "
            "an adapter beside its base. Give adapter.merge=true"
        )


def between_adapter(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong between the adapter and the rest of a config. Anything may be in it: it is not checked."""
    adapter, model = content.get("adapter"), content.get("model")
    if not isinstance(adapter, Mapping):
        return
    if isinstance(model, Mapping) and model.get("path") is None:
        yield "adapter: there is nothing to adapt in a model from scratch; leave it out, or give model.path"
    if adapter.get("quantize") is None:
        return
    if adapter.get("merge") is True:
        yield (
            "adapter.merge: cannot go with adapter.quantize: what is merged would be rounded to so few bits again. "
            "Export the adapter; a run with it as model.path merges it into the weights as they were"
        )
    if content.get("compile") is True:
        yield "adapter.quantize: has not been tried with compile; leave one of them out"
    if content.get("precision") == "fp64":
        yield "adapter.quantize: there are no kernels for it in precision fp64; choose another precision"
