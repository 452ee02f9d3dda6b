"""What every task is to the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, get_type_hints

from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from data.encoded import Encoded, Features
from data.errors import UserError
from data.section import Section
from data.source import Rows

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = dict[str, NDArray[Any]]
"""Gathered predictions by name, first dimension: examples. Where the others differed between micro-batches they are
filled up with -100, floats with nan."""

IGNORED: Final = -100
"""The label of a token that is no target, as transformers has it."""

WINDOW = 8  # tokens that decide how the last of them is written: enough for any character made of several

Outputs = dict[str, Any]
"""What metrics take, by name (see `train.metrics`)."""


class Predictor(Protocol):
    """What gives an answer to each row: a task, or what is asked of one without targets. See `Task` for its methods."""

    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def identity(self) -> str: ...
    def problem(self, row: Mapping[str, Any]) -> str | None: ...
    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]: ...
    def collate(self, features: Features) -> dict[str, Tensor]: ...
    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]: ...
    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]: ...


class Task(ABC):
    """Rows → features → tensors → a loss that is a sum over targets, and predictions.

    Everything before the model is a pure function, so that encoded data can be cached and any batch be made again.
    Also a `data.encode.Encoder`.
    """

    kind: Any
    """What sort of predictions it makes (`train.metrics.Kind`): the metrics ask for it."""

    hint: str = ""
    """What a user of the exported model has to know, for its card."""

    library: str = "transformers"
    """The library that serves the exported model, as the Hub names it."""

    @property
    def free(self) -> tuple[str, ...]:
        """Keys of its config that `train.predict` may change: how an answer is read, not what was learned."""
        return ()

    @property
    def usage(self) -> str:
        """The lines of Python that use the exported model; none: those of its pipeline, or of its Auto class."""
        return ""

    @property
    def least(self) -> int:
        """Examples that an update needs for there to be anything to learn."""
        return 1

    @property
    def couples(self) -> bool:
        """Whether the loss of an example depends on others of its batch: `share` and `couple` then go before `loss`."""
        return False

    @classmethod
    @abstractmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> Task:
        """Return the task for these training rows: finds columns, kind and labels; raises `UserError`."""

    @abstractmethod
    def __str__(self) -> str:
        """Say what was found in the data: the kind, the columns, the labels."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns of the rows that `problem` and `encode` read."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Everything about the task that encoded data depends on."""

    @property
    @abstractmethod
    def model_class(self) -> Any:
        """The Auto class of transformers that builds its model, by name; or a class of ours that does as they do."""

    @property
    @abstractmethod
    def model_config(self) -> dict[str, Any]:
        """Keys of the model's config that the task decides, such as the labels."""

    @property
    @abstractmethod
    def pipeline(self) -> str | None:
        """The `transformers.pipeline` that serves the exported model; None where transformers has none."""

    @property
    @abstractmethod
    def default_metrics(self) -> tuple[str, ...]:
        """The metrics computed when the config names none."""

    @abstractmethod
    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Say what makes a row unusable, or None."""

    @abstractmethod
    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Return features of usable rows, among them `input_ids`, `length` (tokens) and `targets` (count).

        Where a row becomes several examples (windows), or several rows become one (packing), `row` gives for each
        example the place in `rows` of the row it comes from, or of the first (and `rows` a list of all of them). See
        `data.encode.Encoder` for `longest` and `unusable`.
        """

    def check_model(self, model: nn.Module) -> None:  # noqa: B027  # most tasks have nothing to check
        """Raise `UserError` for a model that would not compute what this task means, proved by trying it."""

    def informed(self, train: Encoded) -> Task:
        """Return the task with what it needs to know of the whole training set, such as the frequency of labels."""
        return self

    def initialize(self, model: nn.Module, fresh: Collection[str], splits: Mapping[str, Encoded]) -> None:  # noqa: B027
        """Set what the training set tells of the parameters that are new (`fresh`, by name), better than chance.

        `splits` are the encoded rows by role. Raises `UserError` where the model cannot do what they ask of it.
        """

    def reference(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Return what the loss needs of the starting model, first dimension B: it is asked once, before the first
        update, and the answers are among the features, as `reference`. Only where `TaskConfig.refers` is true."""
        raise NotImplementedError

    def tuned(self, found: Arrays, encoded: Encoded) -> Task:
        """Return the task with what it chooses on the validation rows, such as a threshold, after each evaluation.

        The figures and records of these very rows and those of the test rows are made by the task that this returns.
        """
        return self

    def count(self, features: Features) -> int:
        """Return the targets of these examples, as `loss` will count them: known before the model runs."""
        return int(features["targets"].sum())

    @abstractmethod
    def collate(self, features: Features) -> dict[str, Tensor]:
        """Return padded tensors, first dimension B: the model's inputs, and the targets under "labels".

        What is random about an example is drawn from its `key` among the features, (B,) uint64: a function of (seed,
        epoch, example) in training, of the example alone in evaluation.
        """

    @abstractmethod
    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Return the SUM of the loss over all targets, shape ()."""

    def share(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the losses of the batch's other examples depend on, first dimension B. (Where `couples`.)

        Called without gradients, on the same micro-batches in the same order as `loss`, with the same dropout.
        """
        return {}

    def couple(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what `loss` finds among the tensors of each example, first dimension all examples of the batch.

        `shared` are those of `share` of the whole batch, over all processes and in its order. A micro-batch that is the
        whole batch goes to `loss` without, which then has all that it needs.
        """
        return {}

    @abstractmethod
    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return per-example tensors, first dimension B: "loss" (summed over its targets) and what `outputs` needs.

        "targets", if given, are counted instead of the encoded column of that name. "loss" may come with `completed`.
        """

    def completed(self, found: Arrays) -> Arrays:
        """Return the predictions of a whole set, by id, with what only all of them tell, such as a coupled loss."""
        return found

    @abstractmethod
    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """Turn the gathered predictions of all of `encoded`'s examples, by id, into what metrics take."""

    @abstractmethod
    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """Yield one JSON-able record a row, in order: its place (`Encoded.places`), prediction and reference."""

    @abstractmethod
    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Predictor:
        """Return what answers these rows, which need not have targets, with a model that has learned this task."""

    def saved(self) -> dict[str, Any]:
        """Return all that it has found and chosen, as plain values; what comes from the tokenizer is left out."""
        item: Any = self
        found = {each.name: getattr(self, each.name) for each in fields(item) if each.name != "tokenizer"}
        result: dict[str, Any] = to_jsonable_python(found)
        return result

    @classmethod
    def restored(cls, saved: Mapping[str, Any], tokenizer: Any) -> Task:
        """Return the task that was `saved`; raises `UserError` for what another version of it has written."""
        kind: Any = cls
        types, names = get_type_hints(cls), {each.name for each in fields(kind)}
        try:
            values = {name: TypeAdapter(types[name]).validate_python(value) for name, value in saved.items()}
            given = {**values, **({"tokenizer": tokenizer} if "tokenizer" in names else {})}
            return kind(**given)  # type: ignore[no-any-return]
        except (KeyError, TypeError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the task was written by another version of this program: {reason}") from error

    def accompany(self, model: nn.Module, max_length: int, folder: Path) -> None:  # noqa: B027
        """Write to `folder` what the exported model's users need beside transformers' own files."""

    def balance(self, encoded: Encoded) -> dict[str, int]:
        """Return how often each kind of target is there, by name: for people who look at their data."""
        return {}

    def contents(self, features: Features) -> Sequence[NDArray[Any]]:
        """Return the tokens of each text that could be a copy of another: of each example, unless it holds several."""
        found: Sequence[NDArray[Any]] = features["input_ids"]
        return found

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """Return the pieces of text of one collated example (B = 1), each with what is learned there, or None.

        A piece without text stands for the example as a whole.
        """
        return [(piece, None) for piece in pieces(tensors["input_ids"][0], tokenizer)]


def pieces(ids: Tensor, tokenizer: Any) -> list[str]:
    """Return the text of each of the tokens (T,), as it stands in the whole: with the blanks between words."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[max(0, end - WINDOW) : end])
        if end > WINDOW:
            before = tokenizer.decode(ids[end - WINDOW : end - 1])
        texts.append(text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[end - 1 : end]))
        before = text
    return texts


def require_fast(tokenizer: Any, task: str, why: str) -> None:
    """Raise `UserError` for a tokenizer written in Python: only fast ones tell where in the text a token stands."""
    if not tokenizer.is_fast:
        raise UserError(f"{task} needs a fast tokenizer, {why}; {type(tokenizer).__name__} is not")


def inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the model takes: everything but the labels."""
    return {name: tensor for name, tensor in tensors.items() if name != "labels"}


class TaskConfig(Section):
    """Keys that every task has."""

    name: str

    whole: ClassVar[bool] = False
    """Whether the exported model must be one whole model for those who serve it: an adapter is to be merged."""

    @property
    def refers(self) -> bool:
        """Whether the loss needs what the starting model says of each example (see `Task.reference`)."""
        return False

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns of text that the config names: what a tokenizer for this task should know."""
        found = (getattr(self, key, None) for key in ("text", "tokens", "context", "question", "choices"))
        return tuple(name for each in found if each for name in ([each] if isinstance(each, str) else each))
