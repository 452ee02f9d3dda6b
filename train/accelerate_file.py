"""What `accelerate launch --config_file FILE` tells a program, for launchers that start it themselves (slurm/).

`python -m train.accelerate_file FILE` prints it, a line NAME=value each; FILE may be the name of one of ours: fsdp2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data.errors import UserError, nearest

FOLDER = Path(__file__).resolve().parent.parent / "accelerate_configs"
OURS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def find(name: str) -> Path:
    """Return the file of that path, from here or from the repository, or of that name in accelerate_configs."""
    for file in (Path(name), FOLDER.parent / name, FOLDER / f"{name}.yaml"):
        if file.is_file():
            return file.resolve()
    known = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    raise UserError(
        f"there is no accelerate config {name!r} (looked from {Path.cwd()}); name a file or one of "
        f"{', '.join(known)}{nearest(name, known)}"
    )


def variables(file: Path, *arguments: str) -> dict[str, str]:
    """Return the variables by which `accelerate launch --config_file FILE ARGUMENTS` tells a program its strategy.

    Nothing is said of processes: whoever starts them does. Variables that are set already are among them.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    asked = launch_command_parser().parse_args(
        ["--config_file", str(file), *arguments, "--main_process_port", "0", "x.py"]
    )
    try:
        chosen, _, _ = _validate_launch_command(asked)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file}: accelerate refuses it: {error}") from error
    chosen.deepspeed_fields_from_accelerate_config = ""
    found = prepare_deepspeed_cmd_env(chosen)[1] if chosen.use_deepspeed else prepare_multi_gpu_env(chosen)
    if chosen.use_cpu:
        found["ACCELERATE_USE_CPU"] = "true"
    return {key: value for key, value in found.items() if key.startswith(OURS)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 0, or 2 for something to mend."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if len(given) != 1:
            raise UserError("name one accelerate config, such as fsdp2")
        found = variables(find(given[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in sorted(found.items()):
        print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
