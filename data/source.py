"""Where rows come from: Hub names, local files, saved data sets and package data; opened memory-mapped."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from data import package, samples, text_files
from data.errors import UserError, blame, nearest
from data.section import Section, operational

if TYPE_CHECKING:
    from datasets import Dataset

BINARY = (".parquet", ".arrow")
ARROW_FILE = b"ARROW1"  # begins an Arrow file; an Arrow stream, which `datasets` writes, begins otherwise
SUFFIXES = (*text_files.READERS, *BINARY)


class Source(Section):
    """One place that rows come from."""

    path: str = Field(
        description="Hub name, local file or glob (csv tsv json jsonl parquet arrow txt conll conllu), saved data set, "
        "package:NAME/path, or samples:NAME."
    )
    name: str | None = Field(None, description="Configuration of a Hub data set.")
    split: str | None = Field(
        None, description="Split of a Hub or saved data set, or sample; default: the role it is used in."
    )
    revision: str | None = Field(None, description="Revision of a Hub data set.")
    weight: float | None = Field(
        None, gt=0, description="Share in the mixture, relative to the other sources' weights."
    )


def _listed(value: object) -> object:
    """Accept a path, a mapping, or a list of either."""
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


Sources = Annotated[tuple[Source, ...], BeforeValidator(_listed), Field(min_length=1)]


class DataConfig(Section):
    """The rows to train on and to judge on, and how they become tokens."""

    train: Sources = Field(description="One source or a list of them; a list is mixed, by weight if weights are given.")
    validation: Sources | None = Field(None, description="Judged on during training, and at the end.")
    test: Sources | None = Field(None, description="Judged on once, at the end.")
    max_length: int | None = Field(
        None, ge=4, description="Longer examples are cut to so many tokens. Default: what the model takes, 512 at most."
    )
    streaming: bool = Field(
        False,
        description="Read and encode data.train on the way, and keep nothing of it on the disk. Also takes addresses "
        "of fsspec (https:// s3:// gs:// hf:// ...), x-{00..99}.jsonl, and text files that end in .gz, .bz2 or .xz.",
    )
    readers: int = Field(
        16, ge=1, description="Streaming: so many shards of a source are read side by side, on all processes together."
    )
    shuffle_buffer: int = Field(
        1000, ge=1, description="Streaming: so many rows of a shard are read, encoded and shuffled at once."
    )
    grouping: Literal["none", "window"] = Field(
        "none",
        description="window: what a window of updates takes is sorted by length and dealt to them anew, so that the "
        "examples of a batch are of similar length. An epoch takes the same examples, in other company.",
    )
    window: int = Field(16, ge=2, description="Grouping: so many updates are a window.")
    on_bad_row: Literal["error", "skip"] = Field("error", description="What to do with rows that cannot be used.")
    cache: str | None = operational(None, "Folder of encoded data; default: beside the cache of `datasets`.")


@dataclass(frozen=True)
class Rows:
    """The rows of one file or split, memory-mapped. `lines` says that rows carry their place in LINE."""

    dataset: Dataset
    name: str
    lines: bool = False
    skipped: tuple[str, ...] = ()
    first: bool = False
    """Whether these are only the first rows of a stream."""

    def where(self, row: int) -> str:
        """Name a row as the user would look it up: "reviews.jsonl, line 12" or "train.parquet, row 11"."""
        if self.lines:
            return f"{self.name}, {self.dataset[row][text_files.LINE]}"
        return f"{self.name}, row {row} (from 0)"


def named(columns: dict[str, list[Any]], features: Any) -> dict[str, list[Any]]:
    """Return columns of rows with ClassLabel numbers as the names they stand for; a missing label (-1) is None.

    Two files may number the same labels differently: their names are what they agree on.
    """
    result = dict(columns)
    for name in columns:
        feature = features[name]
        known = getattr(getattr(feature, "feature", feature), "names", None)
        if known:
            result[name] = [_named(value, known) for value in columns[name]]
    return result


def _named(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(part, names) for part in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def open_rows(source: Source, role: str, *, skip_bad: bool, cache: Path, token: str | None) -> list[Rows]:
    """Open a source; one `Rows` for each file of a glob, in the order of their names.

    Rows stay on disk. Text files are read once into an Arrow file under `cache`; several processes may call this at
    once: one reads, the others wait for it and map the same file. Raises `UserError` with the file and the remedy.
    """
    if source.path.startswith(samples.SCHEME):
        return [_sample(source, role, cache)]
    path, files = check_there(source, role)
    if path.is_dir():
        opened = [Rows(_saved(path, source, role), source.path)]
    elif path.suffix.lower() in SUFFIXES or files[0].is_file():
        _check_unused(source, role, "name", "split", "revision")
        opened = [_open_file(file, role, skip_bad=skip_bad, cache=cache) for file in files]
    else:
        opened = [Rows(_hub(source, role, token), source.path)]
    return _filled(opened, f"data.{role}: {source.path}")


def check_there(source: Source, role: str) -> tuple[Path, list[Path]]:
    """Return the path of a source, and its files if it is a glob; raise `UserError` for local files that are not there.

    Reads nothing, so that it can be asked before anything else is done. What may be a name of the Hub is left alone.
    """
    path = Path(source.path if source.path.startswith(samples.SCHEME) else package.resolve(source.path)).expanduser()
    files = [path] if path.exists() or not glob.has_magic(str(path)) else _matches(path)
    if not files:
        raise UserError(f"data.{role}: no file matches {source.path!r} (looked from {Path.cwd()})")
    if path.suffix.lower() in SUFFIXES and not files[0].exists():
        raise UserError(f"data.{role}: there is no file {str(path)!r} (looked from {Path.cwd()})")
    return path, files


def check_columns(rows: Sequence[Rows], wanted: Sequence[str], where: str) -> None:
    """Raise `UserError` for a file that lacks a column, naming the columns it has."""
    for part in rows:
        there = [name for name in part.dataset.column_names if not name.startswith("__")]
        for name in wanted:
            if name not in there:
                raise UserError(
                    f"{where}: {part.name} has no column {name!r}; it has {', '.join(there)}{nearest(name, there)}"
                )


def _sample(source: Source, role: str, cache: Path) -> Rows:
    from datasets import Dataset

    _check_unused(source, role, "name", "revision")
    arrow = samples.build(source.path, source.split or role, f"data.{role}", cache)
    return Rows(Dataset.from_file(str(arrow)), source.path, lines=True)


def _matches(pattern: Path) -> list[Path]:
    return [Path(found) for found in sorted(glob.glob(str(pattern), recursive=True)) if Path(found).is_file()]


def _check_unused(source: Source, role: str, *keys: str) -> None:
    for key in keys:
        if getattr(source, key) is not None:
            raise UserError(f"data.{role}: {key} cannot take effect on the local path {source.path!r}; leave it out")


def _filled(opened: list[Rows], where: str) -> list[Rows]:
    """Return the files that hold rows: the others have no columns to be checked. Their skipped rows stay listed."""
    skipped = tuple(note for rows in opened if not len(rows.dataset) for note in rows.skipped)
    filled = [rows for rows in opened if len(rows.dataset)]
    if not filled:
        why = f"; {len(skipped):,} were skipped, the first: {skipped[0]}" if skipped else ""
        raise UserError(f"{where} holds no {'usable ' * bool(skipped)}rows{why}")
    return [replace(filled[0], skipped=skipped + filled[0].skipped), *filled[1:]]


def _open_file(file: Path, role: str, *, skip_bad: bool, cache: Path) -> Rows:
    from datasets import Dataset, load_dataset

    suffix = file.suffix.lower()
    if not file.is_file():
        raise UserError(f"data.{role}: there is no file {str(file)!r} (looked from {Path.cwd()})")
    if suffix in text_files.READERS:
        arrow, skipped = text_files.convert(file, cache, skip_bad=skip_bad)
        return Rows(Dataset.from_file(str(arrow)), file.name, lines=True, skipped=skipped)
    if suffix not in BINARY:
        raise UserError(f"data.{role}: cannot read {file.name!r}: known endings are {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            rows = Dataset.from_parquet(str(file), cache_dir=str(cache / "parquet"))
        elif _begins(file) == ARROW_FILE:
            rows = load_dataset("arrow", data_files=str(file), split="train", cache_dir=str(cache / "arrow"))
        else:
            rows = Dataset.from_file(str(file))
    except Exception as error:  # pyarrow and datasets raise many kinds
        reason = _first_line(error.__cause__ or error)
        raise UserError(f"data.{role}: {file} is not a readable {suffix[1:]} file: {reason}") from error
    return Rows(rows, file.name)


def _saved(path: Path, source: Source, role: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(
            f"data.{role}: the folder {str(path)!r} is no saved data set (`save_to_disk` writes them); "
            f"to read the files in it give a glob such as {source.path}/*.parquet"
        ) from error
    if isinstance(saved, DatasetDict):
        _check_unused(source, role, "name", "revision")
        saved = _split(saved, source, role)
    else:
        _check_unused(source, role, "name", "split", "revision")
    return saved.with_format(None)  # the format it was saved with may turn labels into tensors


def _hub(source: Source, role: str, token: str | None) -> Dataset:
    from datasets import load_dataset

    try:
        loaded = load_dataset(source.path, source.name, revision=source.revision, token=token)
    except Exception as error:  # network, permission and name errors of several libraries
        raise blame(error)(
            f"data.{role}: {source.path!r} is no local file (looked from {Path.cwd()}), and loading it from the Hub "
            f"failed: {_first_line(error)}. Give a local path ({', '.join(SUFFIXES)}), or check name and network"
        ) from error
    return _split(loaded, source, role)


def _split(splits: dict[str, Dataset], source: Source, role: str) -> Dataset:
    wanted = source.split or role
    if wanted not in splits:
        raise UserError(
            f"data.{role}: {source.path} has no split {wanted!r}; it has {', '.join(splits)}. Choose one with "
            f"data.{role}.split"
        )
    return splits[wanted]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _begins(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(len(ARROW_FILE))
