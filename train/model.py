"""The model: pretrained, from a Hub name, a folder or a package, or from scratch; and back to a folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import package
from data.errors import UserError, blame, nearest
from data.order import derive
from train.adapter import ROWS
from train.adapter_files import whole
from train.hardware import keep_memory
from train.heads import check_labels, refuse_headless, replaced_head
from train.model_config import ModelConfig
from train.scratch import KIND, blank_config
from train.tokenizer import ids, special_ids
from train.weights import ADAPTER, WHOLE, digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALIGNED = 64
"""Bytes: what torch begins its own tensors at."""

EVERYWHERE = ("pad_token_id", "bos_token_id", "eos_token_id")  # in the config of every model


def load_model(
    settings: ModelConfig,
    model_class: Any,
    from_task: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    known: int,
    dtype: torch.dtype,
    seed: int,
    token: str | None,
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model in `dtype` and the names of the parameters that are new in a pretrained one.

    What is new, or all of it, is drawn from `seed` alone. Every id of the tokenizer has its row in the embedding; ids
    from `known` on, and those that had no row, begin as the mean of the others. Only safetensors are read, never
    pickles. Raises `UserError` with the remedy.
    """
    import torch
    import transformers

    decided = {**from_task, **special_ids(tokenizer)}
    for key, value in settings.config.items():
        if key in decided and value != decided[key]:
            raise UserError(
                f"model.config: {key} cannot take effect: task and tokenizer say that it is {decided[key]!r}"
            )
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its report of new layers is ours
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _know_ours()
    builder = getattr(transformers, model_class) if isinstance(model_class, str) else model_class
    torch.manual_seed(derive(seed, "model"))
    if settings.path is None:
        model = _from_scratch(settings.config, builder, from_task, tokenizer)
        _settle(model, tokenizer)
        return model.to(dtype=dtype), []  # type: ignore[call-arg]
    if settings.sha256:
        _check_hash(Path(package.resolve(settings.path)), settings.sha256)
    with whole(settings.path, settings.revision, dtype, token) as place:
        model, new = _pretrained(settings, place, model_class, from_task, tokenizer, dtype=dtype, token=token)
    _settle(model, tokenizer)
    return model, [*new, *_fit_embedding(model, ids(tokenizer), known)]


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model to its device; on a CPU every weight then begins at a multiple of 64 bytes.

    MKL adds up a matrix by a single row in another order where the matrix does not begin at a multiple of 16 bytes.
    Weights of a mapped file begin where its header ends, and `to` copies them for "cpu:0", the device of one process of
    several, not for "cpu": the last bits would hang on both.
    """
    model.to(device)  # type: ignore[arg-type]
    if device.type == "cpu":
        keep_memory(model.get_memory_footprint())  # type: ignore[no-untyped-call]
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.data_ptr() % ALIGNED:
                tensor.data = tensor.data.clone()


def _pretrained(
    settings: ModelConfig,
    path: str,
    model_class: Any,
    from_task: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    token: str | None,
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model that lies at `path`, with the config that settings and task ask for, and what is new in it."""
    import transformers

    assert settings.path is not None
    builder = getattr(transformers, model_class) if isinstance(model_class, str) else model_class
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code, "token": token}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **source)
        check_labels(config, model_class, from_task, settings.path)
        for key, value in {**settings.config, **from_task, "pad_token_id": tokenizer.pad_token_id}.items():
            owner = config if hasattr(config, key) else config.get_text_config()  # of a model made of several parts
            if key in settings.config and not hasattr(owner, key):
                raise UserError(f"model.config: {settings.path} has no such key {key!r}{nearest(key, owner.to_dict())}")
            setattr(owner, key, value)
        model, report = builder.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **source,
        )  # fmt: skip
        replaced = replaced_head(model, report["mismatched_keys"])
    except UserError:
        raise
    except Exception as error:  # a damaged file, a size that does not fit, a config that cannot be: many kinds
        refuse_headless(f"model.path: {settings.path}", error)
        raise _unreachable(settings.path, error) from error
    return model, sorted({*report["missing_keys"], *replaced})


def _from_scratch(
    settings: dict[str, Any], builder: Any, from_task: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Return a model with random weights, drawn in float32 whatever it is to compute in: the same for every precision.

    An embedding may be larger than the tokenizer needs (`model.config.vocab_size`), never smaller.
    """
    needed, special = ids(tokenizer), special_ids(tokenizer)
    size = settings.get("vocab_size", needed)
    if not isinstance(size, int) or size < needed:
        raise UserError(
            f"model.config.vocab_size: must be at least {needed:,}, the tokens of the tokenizer, not {size!r}; leave "
            "it out, and it is that"
        )
    blank = blank_config(settings)
    special = {name: number for name, number in special.items() if name in EVERYWHERE or hasattr(blank, name)}
    config = blank_config(settings, {"vocab_size": size, **special, **from_task})
    try:
        return builder.from_config(config)  # type: ignore[no-any-return]
    except Exception as error:  # a kind without such a head, sizes that do not go together
        refuse_headless(f"model.config: {settings[KIND]}", error)
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.config: no {builder.__name__} from scratch ({settings[KIND]}): {reason}") from error


def _settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Switch off two habits of transformers that would change what is learned, or saved."""
    _let_ends_learn(model, tokenizer)
    _keep_scale(model)


def _let_ends_learn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a token that begins or ends documents learn as an input, where it stands for padding too.

    transformers keeps the embedding of the padding token from learning, in Llama and its kin. Padding itself has no
    part in any loss, so nothing else changes.
    """
    table: Any = model.get_input_embeddings()
    if getattr(table, "padding_idx", None) in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        table.padding_idx = None


def _keep_scale(model: PreTrainedModel) -> None:
    """Let evaluation leave the weights alone: RWKV halves those of every sixth block in place, to keep fp16 from
    overflowing, and what is saved then is wrong when it is loaded. Without that it computes the same."""
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0


def _fit_embedding(model: PreTrainedModel, needed: int, known: int) -> list[str]:
    """Give every id below `needed` its row, and let those that mean nothing yet begin as the mean of the others.

    The mean of output rows and biases gives a new token the mean of all logits: neither likely nor unlikely. Returns
    what is new. An embedding with rows to spare stays as it is.
    """
    size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    first = min(known, size)
    if needed > size:
        try:
            model.resize_token_embeddings(needed, mean_resizing=False)
        except (TypeError, NotImplementedError) as error:  # a few kinds have a way of their own, or none
            raise UserError(
                f"the tokenizer has {needed:,} tokens, the model's embedding {size:,}, and that of a "
                f"{model.config.model_type} cannot be made larger"
            ) from error
        _part_biases(model)
    if needed == first:
        return []
    for tensor in _vocabulary_tensors(model):
        values = tensor.detach().numpy()  # the same memory
        mean = np.add.reduce(values[:first], axis=0, dtype=np.float64) / first  # row by row: one order on any machine
        values[first:needed] = mean
    return [f"{needed - first}{ROWS}"]


def _part_biases(model: PreTrainedModel) -> None:
    """Give an untied head of BERT's kin its second bias back, which nothing reads but every file holds: `resize` leaves
    it at its old length, or makes it the first one, which then would not be saved."""
    import torch

    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    bias = getattr(output, "bias", None)
    if bias is None or model.config.tie_word_embeddings:
        return
    for module in model.modules():
        if getattr(module, "decoder", None) is output and isinstance(getattr(module, "bias", None), torch.nn.Parameter):
            module.bias = torch.nn.Parameter(bias.detach().clone())


def _vocabulary_tensors(model: PreTrainedModel) -> Iterator[Any]:
    """Yield what has a row for each token: input embedding, output embedding and its bias; tied ones once."""
    table, output = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    yield table.weight
    if output is not None and output.weight is not table.weight:
        yield output.weight
    if getattr(output, "bias", None) is not None:
        yield output.bias


def _know_ours() -> None:
    """Let transformers load the models of our own that were exported: here it need not trust what lies beside them."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from train.concat_pooling import ConcatPoolingConfig, ConcatPoolingForSequenceClassification

    AutoConfig.register(ConcatPoolingConfig.model_type, ConcatPoolingConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(
        ConcatPoolingConfig, ConcatPoolingForSequenceClassification, exist_ok=True
    )


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    state: Any,
    beside: Callable[[Path], None],
) -> None:
    """Write model, tokenizer, card, and what `beside` adds, to `folder`: whole, or not at all; one there is replaced.

    The tokenizer is written without the truncation and padding of its last call: that depends on whether this process
    encoded the rows or found them in the cache, and whoever loads it would get the side that was cut.
    """
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    model.save_pretrained(writing, state_dict=state)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(writing)
    (writing / "README.md").write_text(card, encoding="utf-8")
    beside(writing)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(writing, folder)


def _check_hash(folder: Path, expected: str) -> None:
    weights = folder / (ADAPTER if (folder / ADAPTER).is_file() else WHOLE)
    if not weights.is_file():
        raise UserError(
            f"model.sha256 is given, but {weights} is no local file; leave the key out for models of the Hub"
        )
    if (found := digest(weights)) != expected:
        raise UserError(f"{weights} is not the model that the config names: its sha256 is {found}, not {expected}")


def _unreachable(path: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return blame(error)(
        f"model.path: cannot load the model {path!r}: {reason} (looked from {Path.cwd()}; a Hub name needs the "
        "network; weights must be safetensors)"
    )
