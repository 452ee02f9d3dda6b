"""Pairs as tensors, what a model says of them, and the losses that are made of it, each a number a pair."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from data.collate import mask, pad
from data.encoded import Features
from train import documents
from train.tasks import _packed, _proof
from train.tasks._losses import token_losses
from train.tasks.base import IGNORED

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, nn


def check(model: nn.Module) -> None:
    """Prove that an answer's tokens are predicted from those before them only; raise `UserError` if not.

    The model takes shorter ways from here on, as far as it can: logits where they are asked for, and where a kernel
    knows documents no padding. What is proved is proved of these.
    """
    from train import output_layer  # needs torch

    output_layer.enable(model)
    _proof.prove_causal(model)
    _packed.by_documents(model)


def collated(features: Features, padding: int, *, whole: bool) -> dict[str, Tensor]:
    """Return input_ids, attention_mask, labels and answers: (B, 2, T), chosen first; reference: (B, 2), if it is known.

    Labels stand where they are predicted, -100 where nothing is: without `whole` of answers only. `answers` is 1 where
    they are a token of an answer. As if all sequences lay one after the other: the `places` of labels (M,), and
    `tokens`, those of what is no padding (N,).
    """
    import torch

    sequences = _both(features["input_ids"], features["rejected"])
    learned = _both(features["learned"], features["rejected_learned"])
    answers = pad([np.append(marks[1:], 0) for marks in learned], 0)
    labels = pad([np.append(ids[1:], IGNORED) for ids in sequences], IGNORED)
    tensors = {
        "input_ids": pad(sequences, padding),
        "attention_mask": mask(sequences),
        "labels": labels if whole else labels.masked_fill(answers == 0, IGNORED),
        "answers": answers,
    }
    tensors = {name: tensor.view(len(features["input_ids"]), 2, -1) for name, tensor in tensors.items()}
    # found before they go to a GPU, where they would have to be waited for
    tensors["places"] = torch.from_numpy(np.flatnonzero(tensors["labels"].numpy() != IGNORED))
    tensors["tokens"] = torch.from_numpy(np.flatnonzero(tensors["attention_mask"].numpy()))
    if "reference" in features:
        tensors["reference"] = torch.from_numpy(np.array(features["reference"]))
    return tensors


def _both(chosen: Sequence[Any], rejected: Sequence[Any]) -> list[Any]:
    """Return the sequences of pairs one after the other."""
    return [sequence for pair in zip(chosen, rejected, strict=True) for sequence in pair]


def shown(tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
    """Return the prompt of a collated pair (B = 1) and, on lines of their own, what follows it on both sides."""
    answers = tensors["answers"][0].tolist()
    one, other = tensors["input_ids"][0].tolist()
    common = next((place for place, (left, right) in enumerate(zip(one, other, strict=True)) if left != right), 0)
    begin = min(common, *(marks.index(1) + 1 for marks in answers))  # no prompt has a token before whole texts
    found: list[tuple[str, str | None]] = []
    for side, name in enumerate(("chosen", "rejected")):
        ids = tensors["input_ids"][0, side][: int(tensors["attention_mask"][0, side].sum())]
        found += [] if side else [(tokenizer.decode(ids[:begin]), None)]
        found += [("\n", None), (f"{name}: ", None)]
        for counts, places in groupby(range(begin, len(ids)), key=[1, *answers[side]].__getitem__):
            text = tokenizer.decode(ids[list(places)])
            found.append((text, text.strip() if counts else None))
    return found


def likelihoods(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the answers' log-probabilities and numbers of tokens, and the mean loss of a label: (B, 2)."""
    labels, answers = tensors["labels"], tensors["answers"]
    losses = _losses(model, tensors)
    mean = losses.sum(2) / (labels != IGNORED).sum(2)
    return -(losses * answers).sum(2), answers.sum(2), mean


def _losses(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """Return the loss of each label, (B, 2, T); 0 where there is none."""
    from train import output_layer

    labels, places = tensors["labels"], tensors["places"]
    flat = documents.enabled(model)
    inputs, at, apart = _alone(tensors) if flat else (_padded(tensors), places, nullcontext())
    with apart, output_layer.asking(labels.flatten()[places], at, "losses") as question:
        found: Tensor = model(**inputs, use_cache=False).logits  # with a cache packing leaks
    if not question.answered:
        found = token_losses(found.flatten(0, 1)[at][None], labels.flatten()[places][None])[0]
    return found.new_zeros(labels.numel()).index_copy(0, places, found).view_as(labels)


def _padded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sequences as rows. There is no mask: to a causal model padding on the right is what comes later."""
    return {"input_ids": tensors["input_ids"].flatten(0, 1)}


def _alone(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, AbstractContextManager[None]]:
    """Return the sequences as documents of one row, (1, N), where `places` are in it, and what lets them be apart."""
    ids, mask, tokens = tensors["input_ids"], tensors["attention_mask"], tensors["tokens"]
    inputs = {"input_ids": ids.flatten()[tokens][None], "position_ids": (tokens % ids.shape[2])[None]}
    places = mask.flatten().cumsum(0)[tensors["places"]] - 1
    return inputs, places, documents.known(mask.sum(2).view(1, -1), most=ids.shape[2])


def scores(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """Return the only output of the model for both sequences, (B, 2), half precision in fp32."""
    ids, attention = (tensors[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
    found: Tensor = model(input_ids=ids, attention_mask=attention).logits.view(-1, 2)
    return found.float() if found.dtype.itemsize < 4 else found


def dpo(rewards: Tensor, smoothing: float) -> Tensor:
    """Return -log sigmoid of the margin of rewards (B, 2), chosen first: (B,).

    DPO (https://arxiv.org/abs/2305.18290, equation 7) where rewards are beta x (log-probability - the starting
    model's); Bradley-Terry where they are a reward model's scores. `smoothing` is how often a preference may be the
    wrong way round: conservative DPO (https://ericmitchell.ai/cdpo.pdf).
    """
    from torch.nn import functional

    margins = rewards[:, 0] - rewards[:, 1]
    return -(1 - smoothing) * functional.logsigmoid(margins) - smoothing * functional.logsigmoid(-margins)


def ipo(ratios: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """Return the squared distance of the margin from 1 / (2 beta): (B,).

    (https://arxiv.org/abs/2310.12036, equation 17.) The margin is that of the mean over an answer's tokens of its
    log-probability less the starting model's (`ratios`, sums, (B, 2)): as its authors computed it, and TRL does.
    """
    means = ratios / lengths
    return (means[:, 0] - means[:, 1] - 1 / (2 * beta)) ** 2


def odds_ratio(means: Tensor) -> Tensor:
    """Return -log sigmoid of the log odds ratio of two answers with these mean log-probabilities, (B, 2): (B,).

    ORPO (https://arxiv.org/abs/2403.07691, equations 4 and 7).
    """
    from torch.nn import functional

    odds = means - _log1mexp(means)
    return -functional.logsigmoid(odds[:, 0] - odds[:, 1])


def _log1mexp(values: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, exact near 0 and far from it; x = 0 is taken for the nearest number below.

    (https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf)
    """
    import torch

    values = values.clamp(max=-torch.finfo(values.dtype).tiny)
    near = values > -0.6931471805599453
    # each branch gets a harmless number where the other is taken, or its gradient would be nan there
    return torch.where(
        near,
        torch.log(-torch.expm1(values.where(near, values.new_tensor(-0.5)))),
        torch.log1p(-torch.exp(values.where(~near, values.new_tensor(-1.0)))),
    )
