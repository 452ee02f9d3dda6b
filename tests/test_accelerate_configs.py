"""Where a run happens: every key is one that Accelerate knows (a misspelt one it would pass over in silence)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

FILES = sorted((Path(__file__).parent.parent / "accelerate_configs").glob("*.yaml"))
LEARNING = {"lr", "learning_rate", "gradient_accumulation_steps", "seed", "train_batch_size"}
PREFIXES = {"fsdp_config": "fsdp_", "fp8_config": "fp8_", "dynamo_config": "dynamo_"}


def unknown(content: dict[str, Any]) -> list[str]:
    """Return the keys that do nothing. Those of a section reach the run only as arguments of `accelerate launch`."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    arguments = {action.dest for action in launch_command_parser()._actions}
    found = sorted(set(content) - {field.name for field in dataclasses.fields(ClusterConfig)})
    for section, value in content.items():
        for key in value if isinstance(value, dict) else ():
            prefix = PREFIXES.get(section, "")
            if (key if key.startswith(prefix) else prefix + key) not in arguments:
                found.append(f"{section}.{key}")
    return found


def test_there_are_some() -> None:
    several = {"ddp_multinode", "fsdp2_multinode", "hsdp_multinode"}
    assert {"cpu", "ddp", "single_gpu", "fsdp2", "hsdp", "fp8", *several} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_keys(file: Path) -> None:
    assert unknown(yaml.safe_load(file.read_text())) == []


def test_a_misspelt_key_is_seen() -> None:
    content = {
        "num_process": 1,
        "fp8_config": {"backend": "AO", "fp8_pad_inner_dim": True, "pad_inner_dims": True},
        "fsdp_config": {"fsdp_version": 2, "reshard_after_forward": True, "fsdp_reshard_after_foward": True},
        "deepspeed_config": {"zero_stage": 2, "zero_stag": 2},
        "parallelism_config": {"parallelism_config_dp_shard_size": 2, "dp_shard_size": 2},
    }
    expected = [
        "fp8_config.pad_inner_dims",
        "fsdp_config.fsdp_reshard_after_foward",
        "deepspeed_config.zero_stag",
        "parallelism_config.dp_shard_size",
    ]
    assert unknown(content) == ["num_process", *expected]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_says_when_to_use_it(file: Path) -> None:
    comment = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    assert len(" ".join(comment)) >= 60


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_says_nothing_about_learning(file: Path) -> None:
    def keys(value: Any) -> set[str]:
        if not isinstance(value, dict):
            return set()
        return set(value).union(*(keys(inner) for inner in value.values()))

    assert keys(yaml.safe_load(file.read_text())).isdisjoint(LEARNING)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_loads_it(file: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(file))
    content = yaml.safe_load(file.read_text())
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == content["num_processes"]
    assert str(config.distributed_type).split(".")[-1] == content["distributed_type"]
    assert config.mixed_precision in ("no", "bf16", "fp16", "fp8")


@pytest.mark.parametrize("name", ["fsdp2", "hsdp", "ddp"])
def test_several_machines_differ_in_nothing_else(name: str) -> None:
    one, several = (
        yaml.safe_load((FILES[0].parent / f"{each}.yaml").read_text()) for each in (name, f"{name}_multinode")
    )
    places = {"main_process_ip", "main_process_port", "rdzv_backend", "same_network"}
    assert set(several) - set(one) == places
    parallel = several.pop("parallelism_config", {})
    assert not parallel or parallel["parallelism_config_dp_replicate_size"] == several["num_machines"]
    assert (
        not parallel
        or several["num_processes"]
        == parallel["parallelism_config_dp_replicate_size"] * (parallel["parallelism_config_dp_shard_size"])
    )
    for key in set(one) - {"num_processes", "num_machines", "parallelism_config"}:
        assert several[key] == one[key], key
