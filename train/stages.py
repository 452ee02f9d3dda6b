"""Stages: the configs of one command, run in order, each of which may start from the model of the one before."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from data.errors import UserError, nearest
from data.source import check_there
from train import config, hardware, output, signals, together
from train.config import RunConfig
from train.idle import idle_keys

log = logging.getLogger("train")


@dataclass(frozen=True)
class Stage:
    """A config, and the file that it is from."""

    file: str
    config: RunConfig


def read(
    files: Sequence[str], assignments: Sequence[str], *, resume_anyway: bool, world: int | None = None
) -> list[Stage]:
    """Return the stages in `files`, with `key=value` on top of all of them and `NAME:key=value` on top of one.

    `${previous}` in a config is the folder of the model that the stage before exports. Writes nothing, imports nothing
    slow. `world` is how many processes there will be; default: what the launcher says. Raises `UserError` with the
    problems of all stages at once.
    """
    stages: list[Stage] = []
    problems: list[UserError] = []
    previous = invented = None
    for file, changes in zip(files, _addressed(files, assignments), strict=True):
        try:
            settings = config.read(file, changes, previous)
        except UserError as error:
            problems.append(error)
            previous = invented = str(Path(file) / output.MODEL)  # not known, only for the next one to be checked with
            continue
        stages.append(Stage(file, settings))
        from_unknown = invented is not None and invented in str(settings.model.path)
        previous, invented = str(Path(settings.output) / output.MODEL), None
        try:
            _check_world(settings, world)
            # one that begins with what is invented would seem to be another run than before
            if not from_unknown and not output.claim(settings, resume_anyway=resume_anyway):
                _check_files(settings, [stage.config.output for stage in stages])
        except UserError as error:
            problems.append(_in_file(file, error) if len(files) > 1 else error)
    problems += _shared_outputs(stages)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UserError("\n".join(map(str, problems)))
    return stages


def unfinished(stages: Sequence[Stage], *, resume_anyway: bool) -> list[str]:
    """Return the output folders of the stages that are not finished, in order; imports nothing slow."""
    outputs = [stage.config.output for stage in stages]
    done = [output.claim(stage.config, resume_anyway=resume_anyway) for stage in stages]
    return [folder for folder, is_done in zip(outputs, done, strict=True) if not is_done]


def carry_out(stages: Sequence[Stage], run: Callable[[RunConfig], int], *, resume_anyway: bool, speaks: bool) -> int:
    """Run what is left of the stages, in order; return the exit code of the process, which is `run`'s.

    A stage that is finished is not run again. After one that failed or was asked to stop, on any process, no other
    begins. Raises `UserError` for a finished stage whose starting model has changed since, unless `resume_anyway`.
    """
    several = len(stages) > 1
    for number, stage in enumerate(stages, 1):
        if several and speaks:
            print(f"stage {number}/{len(stages)}  {stage.file} → {stage.config.output}", flush=True)
        try:
            if output.claim(stage.config, resume_anyway=resume_anyway):  # may have changed since it was read
                output.check_start(stage.config, resume_anyway=resume_anyway, speaks=speaks)
                if speaks:
                    print(f"this run is finished; its results are in {stage.config.output}", flush=True)
                continue
            for line in idle_keys(stage.config) if speaks else ():
                log.warning("%s%s; it has no effect", f"{stage.file}: " if several else "", line)
            code = run(stage.config)
        except UserError as error:
            raise (_in_file(stage.file, error) if several else error) from error
        if number == len(stages):
            return code
        code, done, stopping = _settle(code, Path(stage.config.output))
        if code or not done:
            return code
        if stopping:
            if speaks:
                print(f"stopped after stage {number}/{len(stages)}; the same command goes on with the next one")
            return 0
    return 0


def _settle(code: int, folder: Path) -> tuple[int, bool, bool]:
    """End a stage on all processes: wait for the one that writes its results, and let go of its model.

    Return the exit code, whether the stage is done and whether any process was asked to stop: the same on all of them.
    """
    from accelerate.utils import gather_object
    from accelerate.utils.memory import clear_device_cache

    together.wait()  # for the one that writes, however long it takes
    answers = gather_object([(code, (folder / output.DONE).exists(), signals.stopping())])
    hardware.forget()  # the next stage makes an Accelerator of its own
    clear_device_cache(garbage_collection=True)  # models and Accelerators are full of cycles
    code, done, _ = answers[0]
    return code, done, any(stopping for _, _, stopping in answers)


def _addressed(files: Sequence[str], assignments: Sequence[str]) -> list[list[str]]:
    """Return the key=value pairs of each file: those for all, then those that begin with its name and a colon."""
    names = [Path(file).stem for file in files]
    common: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in names}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        name, colon, inside = key.partition(":")
        if not colon:
            common.append(assignment)
        elif name not in own:
            raise UserError(f"{key}: there is no stage {name!r}; there are {', '.join(own)}{nearest(name, own)}")
        elif names.count(name) > 1:
            raise UserError(f"{key}: {names.count(name)} stages are called {name!r}; rename their files")
        else:
            own[name].append(f"{inside}{equals}{value}")
    return [[*common, *own[name]] for name in names]


def _check_world(settings: RunConfig, world: int | None) -> None:
    told = os.environ.get("WORLD_SIZE", "1")
    world = world or (int(told) if told.isdecimal() else 1)
    if settings.batch_size < world:
        raise UserError(
            f"batch_size: {settings.batch_size} examples cannot be shared by {world} processes; "
            "raise it, or start fewer"
        )


def _check_files(settings: RunConfig, outputs: Sequence[str]) -> None:
    """Raise `UserError` for a file of rows that is not there; one in a folder of `outputs` may be yet to be written."""
    folders = [Path(os.path.abspath(output)) for output in outputs]
    data = settings.data
    for role, sources in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        for source in sources or ():
            if role == "train" and data.streaming:  # may be anywhere; looked for when the run begins
                continue
            if not any(Path(os.path.abspath(source.path)).is_relative_to(folder) for folder in folders):
                check_there(source, role)


def _shared_outputs(stages: Sequence[Stage]) -> list[UserError]:
    """Return a problem for every two stages that would write into one folder."""
    problems = []
    for one, other in combinations(stages, 2):
        first, second = (Path(os.path.realpath(stage.config.output)) for stage in (one, other))
        if first.is_relative_to(second) or second.is_relative_to(first):
            name = Path(other.file).stem
            problems.append(
                UserError(
                    f"{other.file}: output: {other.config.output} is not its own: {one.file} writes to "
                    f"{one.config.output}; name another folder, as in {name}:output=runs/{name}"
                )
            )
    return problems


def _in_file(file: str, error: UserError) -> UserError:
    return type(error)(f"{file}: {error}")
