"""The tokenizer: from where the model is, from elsewhere, or made from the training rows; with tokens of one's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data import package
from data.errors import UserError, blame
from data.source import Rows
from data.tokenizer_training import BOS, EOS, MASK, PAD, SPECIALS, UNK, TokenizerTraining, train_tokenizer
from train.model_config import ModelConfig, TrainedTokenizer
from train.scratch import blank_config, reads_both_ways

if TYPE_CHECKING:
    from tokenizers.processors import PostProcessor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger("train")

NAMES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")


def load_tokenizer(
    settings: ModelConfig, rows: Sequence[Rows], cache: Path, token: str | None, columns: Sequence[str] = ()
) -> tuple[PreTrainedTokenizerBase, int]:
    """Return the tokenizer with `model.add_tokens`, and how many ids there were before them.

    It has a padding token (its end token, where it has none of its own). `rows` are those to train on, `columns` the
    texts that the task names; what is made from them is kept under `cache`.
    """
    if isinstance(settings.tokenizer, TrainedTokenizer):
        tokenizer = _trained(settings.tokenizer.train, blank_config(settings.config), rows, cache, columns)
    else:
        tokenizer = _pretrained(settings, token)
    known = ids(tokenizer)
    tokenizer.add_tokens([*settings.add_tokens])
    return tokenizer, known


def ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the highest id: so many rows an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return {"pad_token_id": 0, …}, as they stand in the configs of models."""
    found = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in NAMES}
    return {name: number for name, number in found.items() if number is not None}


def _pretrained(settings: ModelConfig, token: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    key, path = ("model.tokenizer", settings.tokenizer) if settings.tokenizer else ("model.path", settings.path)
    assert isinstance(path, str)
    try:
        with _larger_than_the_config():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                package.resolve(path),
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
                token=token,
            )
    except UserError:
        raise
    except Exception as error:  # a damaged file, a missing library, no network: many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise blame(error)(
            f"{key}: cannot load the tokenizer {path!r}: {reason} (looked from {Path.cwd()}; a Hub name needs the "
            "network)"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{key}: the tokenizer of {path} has neither a padding nor an end token; give it one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _larger_than_the_config() -> Iterator[None]:
    """Keep back what transformers says of special tokens beyond the vocabulary of the config, which it reads too.

    Beside an adapter that has rows for them that is so: the config is as large as its base.
    """
    told = logging.getLogger("transformers.configuration_utils")

    def other(record: logging.LogRecord) -> bool:
        return "an integer within the vocabulary" not in record.getMessage()

    told.addFilter(other)
    try:
        yield
    finally:
        told.removeFilter(other)


def _trained(
    settings: TokenizerTraining, config: PreTrainedConfig, rows: Sequence[Rows], cache: Path, columns: Sequence[str]
) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    made = train_tokenizer(settings, rows, cache, columns)
    if settings.size and made.get_vocab_size() < settings.size and os.environ.get("RANK", "0") == "0":
        log.warning(
            "model.tokenizer.train.size: the training rows give %d tokens, not %d",
            made.get_vocab_size(), settings.size,
        )  # fmt: skip
    made.post_processor = _frame(bytewise=settings.kind == "bpe", encoder=reads_both_ways(config))
    names = ["input_ids", "attention_mask"]
    if (getattr(config, "type_vocab_size", None) or 0) > 1:  # the model tells the two texts of a pair apart
        names.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, pad_token=PAD, unk_token=UNK, bos_token=BOS, eos_token=EOS, cls_token=BOS,
        sep_token=EOS, mask_token=MASK, model_input_names=names, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _frame(*, bytewise: bool, encoder: bool) -> PostProcessor:
    """Return what is done to encoded text. Encoders get a beginning, an end, and an end between the texts of a pair;
    decoders get the beginning that they learn every document with: where one ends is for the task to say."""
    from tokenizers import processors

    single, pair = f"{BOS}:0 $A:0 {EOS}:0", f"{BOS}:0 $A:0 {EOS}:0 $B:1 {EOS}:1"
    frame = processors.TemplateProcessing(
        single=single if encoder else f"{BOS}:0 $A:0",
        pair=pair if encoder else f"{BOS}:0 $A:0 $B:1",
        special_tokens=[(token, SPECIALS.index(token)) for token in (BOS, EOS)],
    )
    if not bytewise:
        return frame
    return processors.Sequence([processors.ByteLevel(trim_offsets=True), frame])
