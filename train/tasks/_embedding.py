"""A text's vector: the base model without a head, its tokens' vectors made one, and the files that say so."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

Pooling = Literal["mean", "cls", "last"]

MODES: Final = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
"""What sentence-transformers calls them, in a form that all its versions read."""


class Backbone:
    """The base model, by the interface of an Auto class; without BERT's pooler, which is none of ours: it would be
    new in many models, learn nothing, and have DDP look for it in every update."""

    @classmethod
    def from_pretrained(cls, path: str, *, config: Any, **options: Any) -> Any:
        """Return the model of that folder or Hub name."""
        from transformers import AutoModel

        return AutoModel.from_pretrained(path, config=config, **_without_pooler(config), **options)

    @classmethod
    def from_config(cls, config: Any) -> Any:
        """Return the model with random weights."""
        from transformers import AutoModel

        return AutoModel.from_config(config, **_without_pooler(config))  # type: ignore[no-untyped-call]


def _without_pooler(config: Any) -> dict[str, bool]:
    from transformers import AutoModel

    kind: Any = AutoModel._model_mapping.get(type(config), None)
    there = kind is not None and "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if there else {}


def unit_vectors(model: nn.Module, tensors: dict[str, Tensor], pooling: Pooling) -> Tensor:
    """Return the vectors (N, D), of length 1, of texts input_ids, attention_mask: (N, T), padded on the right.

    Computed in float32 or better from the last layer, whatever the model computes in.
    """
    import torch
    from torch.nn import functional

    hidden = model(**tensors).last_hidden_state
    hidden = hidden.float() if hidden.dtype.itemsize < 4 else hidden
    mask = tensors["attention_mask"]
    if pooling == "mean":
        weights = mask.unsqueeze(2).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
    elif pooling == "cls":
        pooled = hidden[:, 0]
    else:
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return functional.normalize(pooled, dim=1)


def describe(
    folder: Path, width: int, max_length: int, pooling: Pooling, prefixes: tuple[str, str] | None, *, normalize: bool
) -> None:
    """Write what sentence-transformers reads beside the model: its modules, the length of texts, the prefixes.

    The query's prefix is put before every text that is encoded without saying what it is, if both are the same.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 3 if normalize else 2]
    query, document = prefixes or ("", "")
    prompts = {"query": query, "document": document}
    (folder / "1_Pooling").mkdir()
    if normalize:
        (folder / "2_Normalize").mkdir()
    for name, value in (
        (
            "modules.json",
            [
                {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for place, (path, kind) in enumerate(modules)
            ],
        ),
        ("sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False}),
        (
            "1_Pooling/config.json",
            {
                "word_embedding_dimension": width,
                **{f"pooling_mode_{mode}": kind == pooling for kind, mode in MODES.items()},
                "include_prompt": True,
            },
        ),
        *((("2_Normalize/config.json", {}),) if normalize else ()),
        (
            "config_sentence_transformers.json",
            {
                "prompts": prompts,
                "default_prompt_name": "query" if prefixes and query == document else None,
                "similarity_fn_name": "cosine",
            },
        ),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def usage(prefixes: tuple[str, str] | None) -> str:
    """Return the lines of Python that use a folder which `describe` has written to."""
    encode = 'vectors = model.encode(["a text", "another"])'
    if prefixes and prefixes[0] != prefixes[1]:
        encode = 'queries, documents = model.encode_query(["a text"]), model.encode_document(["another"])'
    return (
        "from sentence_transformers import SentenceTransformer\n\n"
        f'model = SentenceTransformer("path/to/this/folder")\n{encode}'
    )
