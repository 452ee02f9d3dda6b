"""A tokenizer from the training rows: the same bytes for the same rows, on any machine and number of threads."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from data import pulse, unigram
from data.cache import Notes, kept
from data.errors import UserError, nearest
from data.section import Section
from data.source import Rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNK, BOS, EOS, MASK = SPECIALS = ("<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>", "<|mask|>")
"""The first ids of every tokenizer made here. What encoders call cls and sep is the beginning and the end."""

CHUNK = 1_000  # rows read at once
DEFAULT_SIZE = 8_000
BYTES = 256
WORD = re.compile("\n|▁[^▁\n]*|[^▁\n]+")
"""What the pre-tokenizer of kind unigram makes of a text whose spaces are ▁."""

VERSION = 1  # part of the cache key: raise it when what is made changes


class TokenizerTraining(Section):
    """Which kind of tokenizer is made from the training rows, how large, and from which text."""

    kind: Literal["bpe", "wordpiece", "unigram", "char"] = Field(
        description="bpe: of bytes, any text comes back as it was. char: every character that occurs is a token."
    )
    size: int | None = Field(
        None, ge=1, description=f"Tokens, the {len(SPECIALS)} special ones counted. Default: {DEFAULT_SIZE}."
    )
    column: str | None = Field(
        None, description="Default: the columns that the task names, text, or every column of texts or lists of texts."
    )
    lowercase: bool = Field(False, description="Read everything in lower case.")

    @model_validator(mode="after")
    def _size_fits(self) -> TokenizerTraining:
        if self.kind == "char" and self.size is not None:
            raise ValueError("size cannot take effect: kind char has as many tokens as the rows have characters")
        if self.kind == "bpe" and self.size is not None and self.size < BYTES + len(SPECIALS):
            raise ValueError(
                f"size must be at least {BYTES + len(SPECIALS)} for kind bpe: {BYTES} bytes and {len(SPECIALS)} "
                "special tokens"
            )
        return self


def train_tokenizer(
    settings: TokenizerTraining, rows: Sequence[Rows], cache: Path, preferred: Sequence[str] = ()
) -> Tokenizer:
    """Return a tokenizer made from the text of `rows`, or what an earlier run with the same rows has made.

    Where the settings name no column, those `preferred` that hold texts are read.
    It adds no special token to what it encodes. Rows stay on disk; what is held are the different words. With several
    processes one makes it and the others wait for a file lock. Raises `UserError` for columns without text and for a
    size that the characters of the text do not fit in.
    """
    from tokenizers import Tokenizer

    columns = [_columns(part, settings.column, preferred) for part in rows]
    prints = [part.dataset._fingerprint for part in rows]
    key = repr((VERSION, _library_version(), settings.model_dump(), prints, columns))
    target = cache / "tokenizers" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.tokenizer"

    def make(writing: Path) -> Notes:
        made = _train(settings, _Texts(rows, columns))
        writing.write_text(made.to_str(), encoding="utf-8")
        return {"tokens": made.get_vocab_size()}

    kept(target, make)
    return Tokenizer.from_str(target.read_text(encoding="utf-8"))


class _Texts:
    """The texts of some columns, read anew each time: a chunk of rows in memory."""

    def __init__(self, rows: Sequence[Rows], columns: Sequence[Sequence[str]]) -> None:
        self.rows, self.columns = rows, columns

    def __iter__(self) -> Iterator[list[str]]:
        for part, names in zip(self.rows, self.columns, strict=True):
            there = part.dataset.column_names
            fields = [(name, "") if name in there else name.split(".", 1) for name in names]
            dataset = part.dataset.select_columns([*dict.fromkeys(name for name, _ in fields)])
            for first in range(0, len(dataset), CHUNK):
                pulse.beat()
                chunk = dataset[first : first + CHUNK]
                yield [text for name, field in fields for value in chunk[name] for text in _flat(value, field)]


def _flat(value: Any, field: str) -> Iterator[str]:
    """Yield the texts of a value: a text or several; where a field is asked for, of a mapping or several."""
    for part in value if isinstance(value, list) else [value]:
        text = part.get(field) if field and isinstance(part, dict) else None if field else part
        if isinstance(text, str):
            yield text


def _columns(rows: Rows, column: str | None, preferred: Sequence[str]) -> list[str]:
    """Return the columns of a file that are learned from."""
    features = rows.dataset.features
    texts = [name for name, feature in features.items() if not name.startswith("__") and _is_text(feature)]
    texts += [
        f"{name}.{field}"  # as in {"translation": {"en": "...", "de": "..."}} and {"messages": [{"content": "..."}]}
        for name, feature in features.items()
        for field, inner in _inside(feature).items()
        if _is_text(inner)
    ]
    if column is not None and column not in texts:
        shown = ", ".join(texts) or "none"
        raise UserError(
            f"model.tokenizer.train.column: {rows.name} has no column {column!r} of texts; there "
            f"{'are' if texts else 'is'} {shown}{nearest(column, texts)}"
        )
    if not texts:
        raise UserError(f"model.tokenizer.train: {rows.name} has no column of texts to make a tokenizer from")
    usual = [name for name in preferred if name in texts] or (["text"] if "text" in texts else texts)
    return usual if column is None else [column]


def _inside(feature: Any) -> dict[str, Any]:
    from datasets import Value

    if languages := getattr(feature, "languages", None):
        return dict.fromkeys(languages, Value("string"))
    inner = getattr(feature, "feature", feature)
    return inner if isinstance(inner, dict) else {}


def _is_text(feature: Any) -> bool:
    return getattr(getattr(feature, "feature", feature), "dtype", None) in ("string", "large_string")


def _train(settings: TokenizerTraining, texts: _Texts) -> Tokenizer:
    from tokenizers import AddedToken

    size = settings.size or DEFAULT_SIZE
    try:
        made = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram, "char": _char}[settings.kind](
            texts, size, lowercase=settings.lowercase
        )
    except UserError as error:
        raise UserError(f"model.tokenizer.train: {error}; raise size, or take kind bpe, which needs no more") from error
    if made.get_vocab_size() <= len(SPECIALS):
        raise UserError("model.tokenizer.train: the training rows hold no text")
    # In running text a space stands before the mask; where spaces belong to the token after them, it is the mask's
    mask = AddedToken(MASK, special=True, lstrip=settings.kind in ("bpe", "unigram"))
    made.add_special_tokens([*SPECIALS[:-1], mask])
    return made


def _bpe(texts: _Texts, size: int, *, lowercase: bool) -> Tokenizer:
    """Pairs of bytes, merged by frequency: the trainer counts in whole numbers and decides ties by id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = _lowercase() if lowercase else None
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, min_frequency=2, special_tokens=[*SPECIALS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


def _wordpiece(texts: _Texts, size: int, *, lowercase: bool) -> Tokenizer:
    """Pairs of characters, merged by frequency; the parts of a word after its first begin with ##.

    The trainer numbers ##a, ##b, … in the order of a hash table, and decides ties by number: it is told theirs.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def blank(model: Any) -> Tokenizer:
        made = Tokenizer(model)
        made.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return made

    words = blank(models.WordLevel(unk_token=UNK))
    words.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=2**31, show_progress=False))
    letters = set().union(*words.get_vocab())
    inside = sorted({f"##{letter}" for word in words.get_vocab() for letter in word[1:]})
    if len(SPECIALS) + len(letters) + len(inside) > size:
        raise UserError(
            f"size {size} is less than the {len(SPECIALS) + len(letters) + len(inside):,} that the characters of the "
            "text need at the beginning of words and inside"
        )
    pieces = blank(models.WordPiece(unk_token=UNK))
    pieces.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=size, min_frequency=2, special_tokens=[*SPECIALS, *inside], show_progress=False
        ),
    )
    # A new one: in that which was trained, ##a would be found in the text before it is cut into words
    made = blank(models.WordPiece(pieces.get_vocab(), unk_token=UNK))
    made.decoder = decoders.WordPiece()
    return made


def _unigram(texts: _Texts, size: int, *, lowercase: bool) -> Tokenizer:
    """Pieces by probability; a space belongs to the word after it, and a line break stands alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    normalizer, counts = _lowercase() if lowercase else None, Counter[str]()
    for chunk in texts:
        for text in chunk:
            text = normalizer.normalize_str(text) if normalizer else text
            marked = text.replace(" ", "▁")  # and the beginning of a text counts as that of a word
            counts.update(WORD.findall(marked if marked.startswith("▁") else f"▁{marked}") if text else ())
        if len(counts) > 10 * unigram.WORDS:
            counts = unigram.shorten(counts)
    if size <= len(SPECIALS):
        raise UserError(f"size {size} leaves no place beside the {len(SPECIALS)} special tokens")
    pieces = unigram.train(counts, size - len(SPECIALS)) if counts else []
    vocabulary = [*((token, 0.0) for token in SPECIALS), *pieces]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIALS.index(UNK)))
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("\n", "isolated")]
    )
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    return made


def _char(texts: _Texts, size: int, *, lowercase: bool) -> Tokenizer:
    """One token for every character that occurs, in the order of their code points."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    normalizer, letters = _lowercase() if lowercase else None, set[str]()
    for chunk in texts:
        for text in chunk:
            letters.update(normalizer.normalize_str(text) if normalizer else text)
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *sorted(letters)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made


def _lowercase() -> Any:
    from tokenizers.normalizers import Lowercase

    return Lowercase()


def _library_version() -> str:
    import tokenizers

    return str(tokenizers.__version__)
