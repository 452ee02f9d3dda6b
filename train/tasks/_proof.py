"""Proofs, by trying it, that a model computes what language modelling from left to right takes for granted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from train import documents as packed

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = ((9, 6, 5), (4, 13, 3))
"""Tokens of the documents of two packed rows: two, since some attention kernels know packing only in a batch of one."""

REMEDY = "Set task.packing=none (a document a row, padded) or concatenate (one stream, attention across documents)"


def prove_causal(model: nn.Module) -> None:
    """Raise `UserError` if what comes after a token (padding, the rest of the text) changes its logits."""
    document, rest = _documents(model)[:2]
    size = len(document)
    with _trying(model, "Choose another model, or another precision"):
        alone = _logits(model, [document])
        followed, changed = (_logits(model, [document, after])[:size] for after in (rest, _other(model, rest)))
        effect = _effect(model, document, alone)
    rounding, leak = _tolerance(alone), _difference([followed], [changed])
    difference = _difference([alone, followed], [followed, changed])
    if not (difference <= rounding and leak <= min(rounding, effect / 3)):  # of what is not a number neither is true
        raise UserError(
            f"{_name(model)} is not causal: what comes after a token changes its logits by {difference:.2g}, so it "
            "would learn to read what it should predict. Choose a causal model (one of the BERT family becomes one "
            "with model.config={is_decoder: true}), or the task masked_lm"
        )


def prove_isolated(model: nn.Module, remedy: str = REMEDY) -> None:
    """Raise `UserError` unless documents of one row, told apart by their positions, are as if each were alone.

    Packed logits must equal separate logits, and a change of each row's first document must change nothing in the
    others: on the device, in the precision and the attention that the caller has set. That a leak would be seen is
    proved too: a token must be seen to matter to those after it in its document, and more than another document does.
    """
    documents = _documents(model)
    firsts = [0, len(ROWS[0])]
    changed = [_other(model, document) if place in firsts else document for place, document in enumerate(documents)]
    with _trying(model, remedy):
        alone = [_logits(model, [document]) for document in documents]
        packed, beside = _packed(model, documents), _packed(model, changed)
        effect = _effect(model, documents[0], alone[0])
    others = set(range(len(documents))) - set(firsts)
    apart = _difference(packed, alone)
    leak = _difference([packed[place] for place in others], [beside[place] for place in others])
    allowed = max(map(_tolerance, alone))
    if not (apart <= allowed and leak <= allowed):
        raise UserError(
            f"task.packing=documents: {_name(model)} does not keep the documents of a row apart: packed or alone, "
            f"beside this or that document, their logits differ by {max(apart, leak):.2g} ({allowed:.1g} is rounding). "
            f"{remedy}"
        )
    if not effect > 3 * max(leak, max(_tolerance(one, half=False) for one in alone)):
        raise UserError(
            f"task.packing=documents: with {_name(model)} it cannot be proved that the documents of a row are kept "
            f"apart, because a token changes the logits after it by {effect:.2g} only, and another document by "
            f"{leak:.2g}. {remedy}"
        )


def reads_padded(model: Any) -> bool:
    """Whether the model writes on from a text that is padded on the left as from the text alone: most do, those that
    take no notice of an attention mask do not."""
    import torch
    from transformers import GenerationConfig

    long, short = sorted(_documents(model)[:2], key=len, reverse=True)
    gap = len(long) - len(short)
    padded, mask = long.new_full((2, len(long)), 0), long.new_ones((2, len(long)))
    padded[0], padded[1, gap:], mask[1, :gap] = long, short, 0
    settings = {"max_new_tokens": 1, "min_new_tokens": 0, "do_sample": False, "pad_token_id": 0}
    once = GenerationConfig(**settings)  # type: ignore[no-untyped-call]
    options = {"generation_config": once, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        beside = model.generate(input_ids=padded, attention_mask=mask, **options).logits[0][1]
        alone = model.generate(input_ids=short[None], attention_mask=mask[:1, gap:], **options).logits[0][0]
    return _difference([beside], [alone]) <= _tolerance(alone)


def _documents(model: nn.Module) -> list[Tensor]:
    """Return the documents of ROWS, one after the other: tokens from all over the vocabulary, (length,) each."""
    import torch

    generator = torch.Generator().manual_seed(0)  # its own: training's is left alone
    lengths = [length for row in ROWS for length in row]
    embedding = _embedding(model)
    ids = torch.randint(len(embedding), (sum(lengths),), generator=generator).to(embedding.device)
    return list(torch.split(ids, lengths))


def _other(model: nn.Module, document: Tensor) -> Tensor:
    """Return a document as long, with another token at every place."""
    return (document + 1) % len(_embedding(model))


def _embedding(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def _logits(model: nn.Module, documents: Sequence[Tensor]) -> Tensor:
    """Return the logits (T, V) of documents in one row, as a task without packing computes them."""
    import torch

    logits: Tensor = model(input_ids=torch.cat(list(documents))[None], use_cache=False).logits[0]
    return logits


def _packed(model: nn.Module, documents: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits (length, V) of each document in the company of its row."""
    import torch

    ids = torch.cat(list(documents)).view(len(ROWS), -1)
    positions = torch.cat([torch.arange(len(document)) for document in documents]).view_as(ids).to(ids.device)
    with packed.known(torch.tensor(ROWS, device=ids.device)):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return list(torch.split(logits.flatten(0, 1), [len(document) for document in documents]))


@contextmanager
def _trying(model: nn.Module, remedy: str) -> Iterator[None]:
    """Compute without dropout, gradients or any trace; say so where the model cannot be called as the task does."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    except Exception as error:  # an argument it does not know, a kernel it lacks: many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{_name(model)} could not be tried: {reason}. {remedy}") from error
    finally:
        model.train(training)


def _effect(model: nn.Module, document: Tensor, logits: Tensor) -> float:
    """Return how much the document's first token matters to the logits after it."""
    import torch

    probe = torch.cat([_other(model, document)[:1], document[1:]])
    return _difference([_logits(model, [probe])[1:]], [logits[1:]])


def _difference(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the largest difference; not a number, if one is not."""
    import torch

    return float(torch.stack([(one - other).abs().max() for one, other in zip(ones, others, strict=True)]).max())


def _tolerance(logits: Tensor, *, half: bool = True) -> float:
    """Return what rounding may change in logits of this size: 7e-5 of the largest in fp32, 0.05 in bf16.

    Where nothing but the values of other documents changes, even bf16 changes nothing; where kernels do (packed or
    alone), it does. Rounding itself was 1e-6 in a GPT-2 and 8e-6 in a model of 24 layers. Not less in fp64: norms and
    rotations of many models are fp32 in any dtype.
    """
    import torch

    dtypes = [torch.float32, logits.dtype] if half else [torch.float32]
    if half and torch.is_autocast_enabled(logits.device.type):
        dtypes.append(torch.get_autocast_dtype(logits.device.type))
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.6 * logits.abs().max())


def _name(model: Any) -> str:
    attention = getattr(model.config, "_attn_implementation", None)
    return type(model).__name__ + (f" with attention {attention}" if attention else "")
