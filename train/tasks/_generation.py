"""Writing texts: as the config says, the same in evaluation, in `train.predict` and from the exported model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data.errors import UserError
from data.order import derive
from data.section import Section
from train import compilation, signals, watch
from train.tasks import _proof
from train.tasks.base import IGNORED, WINDOW

if TYPE_CHECKING:
    from torch import Tensor, nn

KEPT = ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
        "eos_token_id", "bos_token_id")  # fmt: skip
"""Settings of a pretrained model that stay: they say what its texts are made of. All else the config says."""


class Generation(Section):
    """How a text is written: the likeliest token each, with several beams, or drawn."""

    beams: int = Field(1, ge=1, description="Texts followed at the same time; 1: greedily, the likeliest token each.")
    temperature: float | None = Field(
        None,
        gt=0,
        description="Tokens are drawn at this temperature: those of an example from its own number alone, whatever its "
        "company. null: none is.",
    )
    top_k: int | None = Field(None, ge=1, description="Drawn from the so many likeliest only.")
    top_p: float | None = Field(None, gt=0, le=1, description="Drawn from the likeliest that make up this share only.")
    seed: int = Field(0, ge=0, description="Another seed draws other texts.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest text. Default: twice the longest target looked at, or task.max_target_length."
    )
    min_new_tokens: int = Field(0, ge=0, description="Shortest text.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Texts at which writing stops; they are left out."
    )
    length_penalty: float = Field(1.0, description="With beams: above 1 for longer texts, below for shorter ones.")
    no_repeat_ngram: int = Field(0, ge=0, description="No sequence of so many tokens is written twice; 0: any is.")

    @model_validator(mode="after")
    def _between_keys(self) -> Generation:
        if self.temperature is None:
            for key, default in (("top_k", None), ("top_p", None), ("seed", 0)):
                if getattr(self, key) != default:
                    raise ValueError(f"{key} is for texts that are drawn: give temperature too")
        elif self.beams > 1:
            raise ValueError("beams and temperature: give one of them; beams follow the likeliest, nothing is drawn")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens must not be more than max_new_tokens")
        if self.beams == 1 and self.length_penalty != 1.0:
            raise ValueError("length_penalty is for beams: give beams too")
        return self

    def __str__(self) -> str:
        """Say it in words."""
        if self.temperature is not None:
            return f"tokens drawn at temperature {self.temperature:g}"
        return f"{self.beams} beams" if self.beams > 1 else "the likeliest token each"

    def settle(self, model: nn.Module, tokenizer: Any, longest: int, *, inherits: bool) -> None:
        """Make it the model's own way to write, which is exported with it.

        `inherits`: the tokens that a pretrained model forces or suppresses, and its further end tokens, stay.
        """
        from transformers import GenerationConfig

        own: Any = model.generation_config
        known = own.to_diff_dict() if inherits else {}
        settings = {
            **{name: value for name, value in known.items() if name in KEPT},
            "max_new_tokens": self.max_new_tokens or longest,
            "min_new_tokens": self.min_new_tokens or None,
            "num_beams": self.beams,
            "do_sample": self.temperature is not None,
            "length_penalty": self.length_penalty if self.beams > 1 else None,
            "early_stopping": self.beams > 1,
            "no_repeat_ngram_size": self.no_repeat_ngram or None,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": ends(known.get("eos_token_id"), tokenizer.eos_token_id),
            "decoder_start_token_id": getattr(model.config, "decoder_start_token_id", None),
        }
        if self.temperature is not None:
            settings |= {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
        model.generation_config = GenerationConfig(**settings)  # type: ignore[assignment, no-untyped-call]

    def write(self, model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return the tokens that the model writes: (B, W), up to and with the end token, -100 behind it.

        ids, mask: (B, S), read by an encoder, or written on from by a decoder: then padded on the left. keys: (B,)
        int64, which decide what is drawn. The model has settled how it writes. Where the weights are shared out, all
        processes must call this equally often; each goes on until all have ended.
        """
        import copy

        import torch

        owner = getattr(model, "module", model)
        shared_out, lengths = _is_shared_out(owner), mask.sum(1)  # the former may change what `generate` is
        if shared_out and not owner.config.is_encoder_decoder and _proved.get(_base(owner)) is False:
            raise UserError(  # however long these texts are: it must be the same on all processes
                f"task.generation: {type(_base(owner)).__name__} takes no notice of an attention mask, so that texts "
                "of different lengths cannot be written together, as they must be where weights are shared out. Use "
                "ddp.yaml, or leave task.generation out"
            )
        ragged = not shared_out and bool((lengths != lengths[0]).any())
        if not owner.config.is_encoder_decoder and ragged and not _knows_padding(owner):
            return self._write_apart(model, tokenizer, ids, lengths, keys)
        settings, drawn = copy.deepcopy(owner.generation_config), []
        begins = 1 if owner.config.is_encoder_decoder else ids.shape[1]
        if self.temperature is not None:
            assert keys is not None, "nothing to draw from"
            settings.do_sample, settings.temperature, settings.top_k, settings.top_p = False, 1.0, 50, 1.0
            drawn = self._draw(torch.bitwise_xor(keys, derive(self.seed, "generation")))
        with compilation.eager():  # with a cache each token would be a case of its own
            found: Tensor = owner.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=drawn,
                stopping_criteria=[_asked, *([_Stop(self.stop, tokenizer, begins)] if self.stop else [])],
                synced_gpus=shared_out or None,
            )  # fmt: skip
        found = found[:, begins:].clone()
        if settings.eos_token_id is not None:  # without an end all texts are as long as they may be
            over = torch.isin(found, torch.tensor(settings.eos_token_id, device=found.device))
            found[over.long().cumsum(1) - over.long() > 0] = IGNORED
        return found

    def _write_apart(self, model: Any, tokenizer: Any, ids: Tensor, lengths: Tensor, keys: Tensor | None) -> Tensor:
        """Write as `write` does with a model that would read padding: texts of equal length together."""
        parts: list[tuple[Tensor, Tensor]] = []
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero()[:, 0]
            given = ids[rows, ids.shape[1] - length :]
            drawn = None if keys is None else keys[rows]
            parts.append((rows, self.write(model, tokenizer, given, given.new_ones(given.shape), drawn)))
        found = ids.new_full((len(ids), max(part.shape[1] for _, part in parts)), IGNORED)
        for rows, part in parts:
            found[rows, : part.shape[1]] = part
        return found

    def _draw(self, keys: Tensor) -> list[Any]:
        """Return what makes the likeliest token a drawn one (Gumbel's trick, https://arxiv.org/abs/1411.0030)."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        assert self.temperature is not None
        steps: list[Any] = [TemperatureLogitsWarper(self.temperature)]
        steps += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        steps += [TopPLogitsWarper(self.top_p)] if self.top_p else []
        return LogitsProcessorList([*steps, _Noise(keys)])


class _Noise:
    """Adds Gumbel noise to logits (B, V): a function of each example's key, the step and the token."""

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.steps = keys, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        import torch

        self.steps += 1
        step = (self.steps * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
        tokens = torch.arange(1, scores.shape[1] + 1, device=scores.device)
        bits = _mix(_mix(self.keys.to(scores.device)[:, None] + step) + tokens)
        uniform = ((bits >> 11) & (2**53 - 1)).double().add(0.5) * 2.0**-53
        return scores - (-uniform.log()).log().to(scores.dtype)


def _asked(ids: Tensor, scores: Any, **_: Any) -> Tensor:
    """Break all texts off where the process was asked to stop: who asks for texts looks at that before using them."""
    import torch

    watch.beat()
    return torch.full((len(ids),), signals.stopping(), device=ids.device)


class _Stop:
    """Stops where one of some texts has been written. (That of transformers asks more of a tokenizer than some do.)"""

    def __init__(self, signs: Sequence[str], tokenizer: Any, begins: int) -> None:
        self.signs, self.tokenizer, self.begins = signs, tokenizer, begins
        self.looked_at = max(len(sign.encode()) for sign in signs) + WINDOW

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        import torch

        tails = ids[:, max(self.begins, ids.shape[1] - self.looked_at) :].tolist()  # waits for the device
        said = [self.tokenizer.decode(tail, skip_special_tokens=True) for tail in tails]
        return torch.tensor([any(sign in text for sign in self.signs) for text in said], device=ids.device)


def _mix(bits: Tensor) -> Tensor:
    """Return splitmix64's finalizer, as `data.order` has it, of int64, which wraps around as unsigned numbers do."""
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * -4658895280553007687
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * -7723592293110705685
    return bits ^ ((bits >> 31) & (2**33 - 1))


def ends(known: Any, own: int | None) -> int | list[int] | None:
    """Return the tokens that end a text: the tokenizer's, if it has one, and those that the model knows besides."""
    further = known if isinstance(known, list) else []
    return [*dict.fromkeys([token for token in (own, *further) if token is not None])] if further else own


_proved: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def prove_padding(model: Any) -> None:
    """Find out whether the model knows padding on the left for what it is, while this process has it as a whole."""
    training = model.training
    model.eval()
    try:
        _proved[model] = _proof.reads_padded(model)
    finally:
        model.train(training)


def _knows_padding(model: Any) -> bool:
    """Whether the model knows padding on the left for what it is: proved once."""
    base = _base(model)
    if base not in _proved:
        _proved[base] = _proof.reads_padded(model)
    return _proved[base]


def _base(model: Any) -> Any:
    """Return the model inside of an adapter's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_shared_out(model: Any) -> bool:
    """Whether each process holds only a part of each weight; then `generate` is made to bring them together."""
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    if isinstance(model, FSDPModule) and "generate" not in vars(model):  # an encoder is called past the model's forward
        register_fsdp_forward_method(model, "generate")  # type: ignore[arg-type]
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def texts(written: NDArray[np.int64], tokenizer: Any, stop: Sequence[str] = ()) -> list[str]:
    """Return the texts of tokens (n, W), -100 for none, without special tokens, up to the first of `stop`."""
    found = [tokenizer.decode(ids[ids != IGNORED], skip_special_tokens=True) for ids in written]
    stops = [[place for sign in stop if (place := text.find(sign)) >= 0] for text in found]
    return [text[: min(places)] if places else text for text, places in zip(found, stops, strict=True)]
