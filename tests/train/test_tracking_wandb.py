"""Weights & Biases for real: processes that are killed, a server of our own, one that never answers, and none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from train.wandb_files import records, steps

ROOT = Path(__file__).parents[2]
CANARIES = ["canary-in-environment", "canary-in-argv", "ab" * 20]  # the last is the API key

PROGRAM = """
import atexit, json, logging, os, signal, sys, time
atexit.register(lambda: print(time.time()))  # after what libraries register; all modules are freed later, in a second
from pathlib import Path
import psutil
from accelerate import Accelerator
from train.tracking import Tracker, TrackingConfig
from train.wandb_files import records

logging.basicConfig(format="%(message)s", level=logging.WARNING)
output, options = Path(sys.argv[1]), json.loads(sys.argv[2])
ledger = output / "tracking.json"
before = ledger.stat().st_mtime_ns if ledger.exists() else 0
settings = TrackingConfig(trackers=["wandb"], mode=options["mode"], timeout=options["timeout"], tags=["test"])
tracker = Tracker(Accelerator(cpu=True), output, settings, {"seed": 1, "optim": {"lr": 0.1}}, options["start"])

def wait_until_sent(update):
    while not ledger.exists() or json.loads(ledger.read_text())["sent"].get("wandb", -1) < update:
        time.sleep(0.01)
    time.sleep(0.5)

def wait_until_begun():
    # Once the tracker has started, it is written down what had arrived of the runs before.
    while not ledger.exists() or ledger.stat().st_mtime_ns == before or not json.loads(ledger.read_text())["arrived"]:
        time.sleep(0.01)
    while not any(record.HasField("run") for file in output.glob("wandb/*/*.wandb") for record in records(file)):
        time.sleep(0.01)
    time.sleep(0.5)

seconds = []
for update in range(options["start"] + 1, options["stop"] + 1):
    began = time.perf_counter()
    tracker.log(update, {"train/loss": 1 / update})
    seconds.append(time.perf_counter() - began)
    if update % 4 == 0:
        tracker.log(update, {"validation/loss": 2 / update})
    if update == options.get("service_dies"):
        wait_until_sent(update - 1)
        psutil.Process().children()[0].kill()
        time.sleep(0.2)
        import lightgbm  # one of those whose import W&B wants to hear of
    if update == options.get("service_ends"):
        if update > options["start"] + 1:
            wait_until_sent(update - 1)
        else:
            wait_until_begun()
        psutil.Process().children()[0].terminate()
        psutil.Process().children()[0].wait(10)
    if update == options.get("service_hangs"):
        wait_until_sent(update - 1)
        service = psutil.Process().children()[0]
        Path(options["service"]).write_text(str(service.pid))
        service.suspend()
    if update == options.get("server_hangs"):
        wait_until_sent(update - 1)
        Path(options["hang"]).touch()
    if update == options.get("killed"):
        wait_until_sent(update - 1)
        os.kill(os.getpid(), signal.SIGKILL)
if len(seconds) >= 50:  # of a few, half may be those at which a thread that imports a library held the interpreter
    assert sorted(seconds)[len(seconds) // 2] < 1e-3
tracker.summary({"test/loss": 3.0})
began = time.perf_counter()
tracker.finish(complete=options.get("complete", True))
print(time.perf_counter() - began, time.time())
"""


@dataclass
class Ended:
    code: int
    errors: list[str]
    finish_seconds: float
    exit_seconds: float


def run(
    output: Path, *, start: int, stop: int, mode: str = "online", timeout: float = 20, server: str = "", **options: Any
) -> Ended:
    """Run a process that logs updates start + 1 to stop."""
    output.mkdir(exist_ok=True)
    home = output.with_name("home")
    home.mkdir(exist_ok=True)
    (home / "lightgbm.py").write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{home}",
        "SECRET": CANARIES[0],
        "WANDB_API_KEY": CANARIES[2],
        "WANDB_BASE_URL": server or "https://127.0.0.1:9",
    }
    if options.pop("no_key", False):
        del environment["WANDB_API_KEY"]
    options |= {"start": start, "stop": stop, "mode": mode, "timeout": timeout}
    printed, errors = home / "printed", home / "errors"
    with printed.open("w") as stdout, errors.open("w") as stderr:  # no pipes: an orphan could keep those open
        command = [sys.executable, "-c", PROGRAM, str(output), json.dumps(options), f"--password={CANARIES[1]}"]
        process = subprocess.run(command, env=environment, cwd=output, stdout=stdout, stderr=stderr, timeout=100)
    finish, end, exited = map(float, (3 * ["0"] + printed.read_text().split())[-3:])  # nothing if it is killed
    return Ended(process.returncode, errors.read_text().splitlines(), finish, exited - end)


class Server:
    """Answers like a W&B server as far as one run needs it. `history` is what it would show of the run."""

    def __init__(self, hang: Path) -> None:
        self.history: list[str] = []
        self.requests: list[bytes] = []
        self.exists = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                while hang.exists():
                    time.sleep(0.1)
                server.requests.append(self.path.encode() + b" " + body)
                answer = json.dumps(server.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_PUT = do_POST

            def log_message(self, *_: Any) -> None: ...

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None: ...  # clients that are killed hang up

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if "file_stream" in path:
            if lines := json.loads(body).get("files", {}).get("wandb-history.jsonl"):
                self.history[lines["offset"] : lines["offset"] + len(lines["content"])] = lines["content"]
            return {}
        if path != "/graphql":
            return {}
        query = json.loads(body)
        entity = {"id": "e", "name": "entity"}
        run = {
            "id": "r", "name": query["variables"].get("name"), "displayName": "r", "config": "{}",
            "wandbConfig": '{"t": 1}', "summaryMetrics": "{}",
            "historyLineCount": len(self.history), "historyTail": json.dumps(self.history[-1:]), "eventsTail": "[]",
            "logLineCount": 0, "eventsLineCount": 0, "project": {"id": "p", "name": "lockstep", "entity": entity},
        }  # fmt: skip
        match query["operationName"]:
            case "RunResumeStatus":
                found = run if self.exists else None
                return {"data": {"model": {"id": "p", "name": "lockstep", "entity": entity, "bucket": found}}}
            case "UpsertBucket":
                new, self.exists = not self.exists, True
                return {"data": {"upsertBucket": {"bucket": run, "inserted": new}}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/put"} for name in query["variables"]["files"]]
                return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}
        return {"data": {}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "hang")
    thread = threading.Thread(target=server.http.serve_forever)
    thread.start()
    yield server
    (tmp_path / "hang").unlink(missing_ok=True)
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def assert_no_leak(output: Path) -> None:
    files = [file for file in output.rglob("*") if file.is_file()]
    assert len(files) > 5 and not [path for path in output.rglob("*") if path.is_symlink()]
    for file in files:
        content = file.read_bytes()
        assert not [canary for canary in CANARIES if canary.encode() in content], file


@pytest.mark.whole_run
def test_one_offline_run_over_kill_and_stop(tmp_path: Path) -> None:
    output = tmp_path / "run"
    killed = run(output, start=0, stop=12, mode="offline", killed=12)
    assert killed.code == -9
    stopped = run(output, start=6, stop=16, mode="offline", complete=False)  # back to 6: the checkpoint was there
    ended = run(output, start=16, stop=20, mode="offline")
    assert (stopped.code, stopped.errors, ended.code, ended.errors) == (0, [], 0, [])
    files = sorted((output / "wandb").glob("*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 3
    ids, steps, exits = set(), [], []
    for file in files:
        for record in records(file):
            match record.WhichOneof("record_type"):
                case "run":
                    ids.add(record.run.run_id)
                    assert record.run.host == "" and record.run.display_name == "run" and record.run.tags == ["test"]
                case "history":
                    figures = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                    step = int(figures["_step"])
                    steps.append(step)
                    assert float(figures["train/loss"]) == 1 / step
                    assert ("validation/loss" in figures) == (step % 4 == 0)
                case "config":
                    config = {item.key: json.loads(item.value_json) for item in record.config.update}
                    assert config == {"seed": 1, "optim": {"lr": 0.1}}
                case "exit":
                    exits.append(record.exit.exit_code)
    assert ids == {json.loads((output / "tracking.json").read_text())["id"]}
    assert steps == list(range(1, 21))
    assert exits == [1, 0]  # preempted, finished
    assert_no_leak(output)


@pytest.mark.whole_run
def test_the_server_gets_every_update_once_and_nothing_else(tmp_path: Path, server: Server) -> None:
    output = tmp_path / "run"
    assert run(output, start=0, stop=12, killed=12, server=server.url).code == -9  # before the upload is through
    ended = run(output, start=6, stop=20, server=server.url)
    assert (ended.code, ended.errors) == (0, [])
    assert [json.loads(line)["_step"] for line in server.history] == list(range(1, 21))
    everything = b"\n".join(server.requests)
    assert b'\\"lr\\":0.1' in everything and b"test/loss" in everything
    for leak in [*CANARIES, sys.prefix, str(tmp_path)]:
        assert leak.encode() not in everything
    assert not [text for text in server.requests if b'"host":"' in text or b'"program":"' in text]
    assert_no_leak(output)


def assert_at_most(ended: Ended, finish_seconds: float, warning: str) -> None:
    assert ended.code == 0
    assert ended.finish_seconds < finish_seconds
    assert ended.exit_seconds < 3
    assert len(ended.errors) == 1 and ended.errors[0].startswith("wandb: ") and warning in ended.errors[0]


@pytest.mark.whole_run
def test_a_server_that_stops_answering_costs_the_timeout_and_one_warning(tmp_path: Path, server: Server) -> None:
    hang = str(tmp_path / "hang")
    ended = run(tmp_path / "run", start=0, stop=50, timeout=4, server_hangs=25, hang=hang, server=server.url)
    assert_at_most(ended, 6, "wandb sync")


@pytest.fixture
def hole() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_never_answers_costs_the_timeout_and_one_warning(tmp_path: Path, hole: str) -> None:
    ended = run(tmp_path / "run", start=0, stop=50, timeout=6, server=hole)  # on a busy machine imports take 3 s
    assert_at_most(ended, 8, "did not start")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 62


def test_no_api_key_costs_one_warning(tmp_path: Path, hole: str) -> None:
    ended = run(tmp_path / "run", start=0, stop=50, no_key=True, server=hole)
    assert_at_most(ended, 5, "No API key configured")


def test_when_the_service_of_wandb_dies_the_run_does_not(tmp_path: Path) -> None:
    ended = run(tmp_path / "run", start=0, stop=50, mode="offline", service_dies=25)
    assert_at_most(ended, 5, "given up: ")


def test_what_a_service_of_wandb_that_ends_did_not_get_is_sent_when_the_run_goes_on(tmp_path: Path) -> None:
    """A scheduler may ask all processes of a job to end, children of the run's own with them."""
    output = tmp_path / "run"
    ended = run(output, start=0, stop=9, mode="offline", service_ends=6, complete=False)
    assert_at_most(ended, 5, "given up: ")
    assert run(output, start=9, stop=12, mode="offline").code == 0
    files = sorted((output / "wandb").glob("*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert [step for file in files for step in steps(file)] == [*range(1, 13)]


def test_what_a_service_of_wandb_that_ends_before_it_wrote_any_did_not_get_is_sent_too(tmp_path: Path) -> None:
    """Preempted right after its start, a run has figures handed over and a file that holds none of them."""
    output = tmp_path / "run"
    assert_at_most(run(output, start=0, stop=3, mode="offline", service_ends=1, complete=False), 5, "given up: ")
    assert run(output, start=3, stop=6, mode="offline").code == 0
    files = {file: list(steps(file)) for file in (output / "wandb").glob("*/*.wandb")}
    assert sorted(files.values()) == [[], [*range(1, 7)]]
    for file in files:  # uploaded, and cleaned away
        file.unlink()
    assert_at_most(run(output, start=6, stop=9, mode="offline", service_ends=7, complete=False), 5, "given up: ")
    assert run(output, start=9, stop=12, mode="offline").code == 0
    files = {file: list(steps(file)) for file in (output / "wandb").glob("*/*.wandb")}
    assert sorted(files.values()) == [[], [*range(7, 13)]]


@pytest.mark.whole_run
def test_a_service_of_wandb_that_hangs_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    file = tmp_path / "service"
    try:
        ended = run(tmp_path / "run", start=0, stop=50, timeout=3, mode="offline", service_hangs=25, service=str(file))
    finally:
        os.kill(int(file.read_text()), signal.SIGKILL)
    assert_at_most(ended, 6, "still busy")
