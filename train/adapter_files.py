"""Adapters on disk: what is exported, and an adapter that a run starts from, merged into its base."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from data import package
from data.errors import UserError, blame
from train import notes
from train.adapter import INSIDE, OWN, quiet
from train.adapter_config import AdapterConfig
from train.weights import ADAPTER, ADAPTER_CONFIG, INDEX, PARTS, WHOLE, cached_commit, fingerprint

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""What peft calls the tasks of the adapters that others have made."""

POOLER = "pooler."
"""Where a model without a head keeps the layer that makes one vector of its first token's."""


def frozen(model: nn.Module, names: Mapping[str, Any]) -> set[str]:
    """Return those names of a state dict that belong to parameters which do not learn, quantized ones included."""
    fixed = {name for name, each in model.named_parameters(remove_duplicate=False) if not each.requires_grad}
    found = {name for name in names if name in fixed}
    quantized = tuple(  # what there is beside such a weight is not among the parameters
        f"{name}." for name, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes.")
    )
    return found | {name for name in names if name.startswith(quantized)}


@dataclass(frozen=True)
class Export:
    """An adapter that is saved as models are: what learned, and what is needed to put it on its base again."""

    model: PeftModel
    base_sha256: str | None
    quantized: str | None

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor]) -> None:
        """Write what peft loads, the config and way to write of the model (its labels, its beams), and our notes."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        about: Any = self.model.peft_config[OWN]
        for name in ("target_modules", "modules_to_save"):
            if getattr(about, name):
                setattr(about, name, sorted(getattr(about, name)))  # of a set: in a new order in every process
        about.inference_mode = True
        kind = type(self.model.get_base_model())
        about.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        about.save_pretrained(folder)
        save_file(self._learned(state_dict), folder / ADAPTER, metadata={"format": "pt"})
        config: Any = deepcopy(self.model.config)
        config.architectures = [kind.__name__]
        rows = about.trainable_token_indices
        size = base_vocabulary(about.base_model_name_or_path, about.revision) if rows else None
        if size is not None:
            config.get_text_config().vocab_size = size
        config.save_pretrained(folder)
        own = getattr(self.model, "generation_config", None)
        if own is not None:
            own.save_pretrained(folder)
        base = {"path": about.base_model_name_or_path, "revision": about.revision, "sha256": self.base_sha256}
        notes.note(folder, base={**base, "quantized": self.quantized})

    def _learned(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the adapter by peft's names, and by their own those that learned in place."""
        from peft import get_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        found = dict(get_peft_model_state_dict(self.model, state_dict=state, save_embedding_layers=False))
        kept = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        peft = tuple(f"{name}." for name, module in self.model.named_modules() if isinstance(module, kept))
        fixed = frozen(self.model, state)
        for name, tensor in state.items():
            if name not in fixed and not name.startswith(peft):
                found[name] = tensor
        distinct = {(tensor.data_ptr(), tensor.shape): name for name, tensor in reversed(found.items())}
        names = [name for name in found if name in distinct.values()]  # of tied ones, the first
        return {name: found[name].detach().cpu().contiguous().clone() for name in names}


def finished(
    model: PeftModel, state: dict[str, Tensor], settings: AdapterConfig, base_sha256: str
) -> tuple[Any, dict[str, Tensor]]:
    """Return what is to be saved, with its state: the plain model with the adapter merged into it, or the adapter."""
    if not settings.merge:
        return Export(model, base_sha256 or None, settings.quantize), state
    from train import frozen  # needs torch

    frozen.restore(model)
    whole: Any = model.merge_and_unload()
    return whole, whole.state_dict()


def base_vocabulary(path: str, revision: str | None) -> int | None:
    """Return how many rows the embedding of the model at `path` has; None where its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(package.resolve(path), revision=revision)
    size: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return size


@contextmanager
def whole(
    path: str, revision: str | None, dtype: torch.dtype, token: str | None, *, code: bool = False
) -> Iterator[str]:
    """Yield where the model at `path` is: there, or, of an adapter, in a folder that lasts as long as this context.

    The adapter is merged into its base in `dtype`. Raises `UserError` where the base is gone, or another than it was.
    """
    place = package.resolve(path)
    settings = _settings(place, revision, token)
    if settings is None:
        yield place
        return
    about = json.loads(Path(settings).read_text(encoding="utf-8"))
    noted = notes.read(Path(place)).get("base") or {}
    base, base_revision = about.get("base_model_name_or_path"), about.get("revision")
    with ExitStack() as stack:
        if not base:
            raise UserError(
                f"model.path: {path} is an adapter that does not name its base; merge it, and name the result"
            )
        try:
            there = stack.enter_context(whole(base, base_revision, dtype, token, code=code))
            checked = _check_base(path, base, base_revision, noted.get("sha256"), token)
            model = _merged(place, about, there, {"revision": revision, "token": token}, dtype, checked)
        except UserError:
            raise
        except Exception as error:  # what a foreign adapter may lack, or hold too much of: many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"model.path: the adapter {path} cannot be put on its base {base}: {reason}. Merge it with peft "
                "(merge_and_unload), and name the folder of the whole model"
            ) from error
        folder = stack.enter_context(TemporaryDirectory(prefix="lockstep-"))
        model.save_pretrained(folder)
        del model
        yield folder


def _settings(place: str, revision: str | None, token: str | None) -> str | None:
    """Return the file that says that there is an adapter, here or on the Hub."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found: str | None = find_adapter_config_file(place, revision=revision, token=token)
    except (OSError, ValueError):  # nothing there at all: told by those who load the model
        return None
    return found


def _check_base(path: str, base: str, revision: str | None, then: str | None, token: str | None) -> str | None:
    """Return the revision to be loaded: of a base on the Hub the commit that was checked, whatever is there later.

    Raises `UserError` unless the base is there, and the one that the adapter was trained on. One on the Hub is fetched,
    unless the cache has it as it was.
    """
    now, reason, kind = fingerprint(base, revision), "", UserError
    if not then:
        return revision
    if now != then and not Path(package.resolve(base)).is_dir():
        try:
            _fetch(base, revision, token)
        except Exception as error:  # no name of the Hub, no such model, not allowed, no network: many kinds
            reason, kind = (str(error).strip() or type(error).__name__).splitlines()[0], blame(error)
        now = fingerprint(base, revision)
    if now is None:
        raise kind(
            f"model.path: {path} is an adapter on {base}, which is not there (no folder, looked from {Path.cwd()}; "
            f"neither in the Hub's cache nor reachable: {reason or 'it has no safetensors'}). Bring it back, or "
            f"correct base_model_name_or_path in {path}/{ADAPTER_CONFIG}"
        )
    if now != then:
        raise UserError(
            f"model.path: {path} is an adapter on {base}, whose weights have changed: their sha256 is {now}, when the "
            f"adapter was trained it was {then}. Bring them back: on others it means nothing"
        )
    return cached_commit(base, revision) or revision


def _fetch(base: str, revision: str | None, token: str | None) -> None:
    """Bring the weights of a model of the Hub into the cache, all that its fingerprint is made of."""
    from huggingface_hub import snapshot_download

    snapshot_download(base, revision=revision, token=token, allow_patterns=[WHOLE, INDEX, PARTS])


def _merged(
    place: str, about: Mapping[str, Any], base: str, source: dict[str, Any], dtype: torch.dtype, revision: str | None
) -> PreTrainedModel:
    """Return the base with the adapter merged into it, of the class that it was trained in."""
    import transformers
    from peft import PeftModel
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    name = (about.get("auto_mapping") or {}).get("base_model_class") or CLASSES.get(str(about.get("task_type")), "")
    builder = getattr(transformers, name, None)
    if builder is None:
        raise ValueError(f"its class is {name or 'not named'}, which transformers does not have")
    file: Any = cached_file(place, ADAPTER, **source)  # safetensors, or nothing: raises OSError
    own = cached_file(place, "config.json", **source, _raise_exceptions_for_missing_entries=False)
    below = {"token": source["token"], **({} if Path(base).is_dir() else {"revision": revision})}
    config = transformers.AutoConfig.from_pretrained(place if own else base, **(source if own else below))
    model, report = builder.from_pretrained(
        base, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
        **below,
    )  # fmt: skip
    with safe_open(file, "pt") as stored:
        given = {key.removeprefix(INSIDE) for key in stored.keys()}  # noqa: SIM118  # no mapping
    lost = _lost(model, report, given)
    if _pooler_is_none_of_its_own(model, lost, given):
        model.pooler = None  # as it is in a model that was built without
        lost = [name for name in lost if not name.startswith(POOLER)]
    if lost:
        raise ValueError(f"neither the base nor the adapter has {lost[0]}")
    rows = about.get("trainable_token_indices") or []
    needed = 1 + max((row for each in (rows.values() if isinstance(rows, dict) else [rows]) for row in each), default=0)
    if needed > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(needed, mean_resizing=False)
    with quiet():
        adapted = PeftModel.from_pretrained(model, place, autocast_adapter_dtype=False, **source)
        plain: Any = adapted.merge_and_unload()
    return plain  # type: ignore[no-any-return]


def _lost(model: nn.Module, report: Mapping[str, Any], given: set[str]) -> list[str]:
    """Return the names of the tensors that neither base nor adapter has, under any of their names where they are tied.

    `report` is what transformers says of loading the base, `given` the names of what the adapter holds.
    """
    missing, mismatched = set(report["missing_keys"]), {key for key, *_ in report["mismatched_keys"]}
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    of = {name: names for names in tied.values() for name in names}
    return [
        name
        for name in sorted(missing | mismatched)
        if given.isdisjoint(names := of.get(name, [name])) and (missing.issuperset(names) or mismatched & {*names})
    ]


def _pooler_is_none_of_its_own(model: nn.Module, lost: Collection[str], given: Collection[str]) -> bool:
    """Whether a model without a head has a pooler only because its class builds one: its vectors do not need it."""
    optional = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    return (
        optional
        and any(name.startswith(POOLER) for name in lost)
        and not any(name.startswith(POOLER) for name in given)
    )
