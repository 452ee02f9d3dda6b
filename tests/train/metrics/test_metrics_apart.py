"""What only a new process can show: what metrics import, and that they need no network and leave no file."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run(program: str, folder: Path, **environment: str) -> str:
    """Run a program in `folder` in a new process, with a cache of its own, and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # torch makes it when it is imported
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_parsing_imports_nothing_heavy(tmp_path: Path) -> None:
    program = """
        import sys
        from train import metrics
        for name in metrics.names():
            metrics.check(metrics.parse(name), metrics._module(name).KINDS[0])
        heavy = {"torch", "evaluate", "datasets", "transformers", "accelerate", "sklearn", "scipy", "pandas"}
        print(sorted(heavy & set(sys.modules)))
    """
    assert run(program, tmp_path).strip() == "[]"


def test_offline_and_a_metric_of_the_hub(tmp_path: Path) -> None:
    """Without network, sockets or a writable cache; and a script in the place of one that the Hub would send."""
    script = """
        import datasets
        import evaluate

        class Score(evaluate.Metric):
            def _info(self):
                features = datasets.Features({NAMES: datasets.Value("float64")})
                return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

            def _compute(self, predictions, references, scale=1):
                return {"sum": scale * sum(predictions), "of": {"first": references[0]}, "each": predictions}
    """
    for name, features in (
        ("score", '"predictions": datasets.Value("float64"), "references"'),
        ("needy", '"predictions": datasets.Value("float64"), "sources"'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(textwrap.dedent(script).replace("NAMES", features))
    program = """
        import os, socket, sys
        import numpy as np

        def refuse(*_, **__):
            raise AssertionError("network")

        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        from train import metrics
        outputs = {"predictions": np.array([0, 1, 1]), "references": np.array([0, 1, 0]), "scores": np.eye(3)[:, :2]}
        floats = {"predictions": np.array([0.5, 2.0, 1.0]), "references": np.array([1.0, 3.0, 0.5])}
        kinds = [("regression", floats), ("single_label", outputs)]
        done = [
            metrics.compute([metrics.load(metrics.parse(name))], given, kind)
            for kind, given in kinds for name in metrics.names() if kind in metrics._module(name).KINDS
        ]
        written = [file for _, _, files in os.walk(os.environ["HF_HOME"]) for file in files]
        print(len(done), written, os.listdir(os.environ["TMPDIR"]))
        for entry in ({"name": "score", "scale": 2}, "needy", "acuracy"):
            try:
                print(metrics.compute([metrics.load(metrics.parse(entry))], floats, "regression"))
            except metrics.UserError as error:
                print(error)
        try:
            metrics.compute([metrics.load(metrics.parse({"name": "score", "skale": 2}))], floats, "regression")
        except metrics.UserError as error:
            print(error)
    """
    (tmp_path / "tmp").mkdir()
    lines = run(program, tmp_path, HF_HUB_OFFLINE="1", TMPDIR=str(tmp_path / "tmp")).splitlines()
    assert lines[0] == "9 [] []"
    assert lines[1] == "{'sum': 7.0, 'of_first': 1.0}"
    assert (
        lines[2]
        == "metric 'needy' of the Hub needs predictions, sources; it can be given only predictions and references"
    )
    assert "did you mean 'accuracy'" in lines[3] and "could not be loaded from the Hub" in lines[3]
    assert "cannot score this task with options {'skale': 2}" in lines[4]
