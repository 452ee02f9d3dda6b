"""Where a run happens: every key is one that Accelerate knows (a misspelt one it would pass over in silence)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

FILES = sorted((Path(__file__).parent.parent / "accelerate_configs").glob("*.yaml"))
LEARNING = ("lr", "learning_rate", "gradient_accumulation_steps", "gradient_clipping", "seed", "train_batch_size")


def launch_arguments() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    return {action.dest for action in launch_command_parser()._actions}


def fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_there_are_some() -> None:
    assert {"cpu", "ddp", "single_gpu"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_keys(file: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    content = yaml.safe_load(file.read_text())
    plugins = {"fsdp_config": FullyShardedDataParallelPlugin, "deepspeed_config": DeepSpeedPlugin}
    assert set(content) <= fields(ClusterConfig)
    for section, value in content.items():
        if not isinstance(value, dict):
            continue
        known = launch_arguments()
        known |= fields(plugins[section]) if section in plugins else set()
        assert set(value) <= known, section
        if section == "fsdp_config":  # only those with the prefix reach the launched processes
            assert all(key.startswith("fsdp_") for key in value)


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
    assert config.mixed_precision in ("no", "bf16", "fp16")
