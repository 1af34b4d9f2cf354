"""A small matrix, stopped in the middle of a run and gone on with: real runs through the product's own launch."""

import json
import signal
import subprocess
import time

import pytest
import yaml

from megacpp_stp.runs.metrics import read_metrics
from tests.e2e.conftest import SHORT, command, environment

CELLS = ("spans=1,gate=open", "spans=3,gate=open")


def files_of(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and "lock" not in path.name}


@pytest.mark.slow
def test_a_matrix_that_was_stopped_goes_on_and_is_judged(cli, dataset, tmp_path):
    content = {
        "schema_version": 1,
        "recipe": "nam56r-tiny",
        "set": [*SHORT, f"data.path={dataset}", "training.checkpoint.interval=2", "training.iterations=15"],
        "factors": {
            "spans": {"1": ["stp.n_spans=1"], "3": ["stp.n_spans=3"]},
            "gate": {"open": ["stp.weight=0.5"]},
        },
        "seeds": [1, 2],
        "baseline": {"spans": "1", "gate": "open"},
        "metric": "lm_loss",
        "window": None,
    }
    file, place = tmp_path / "matrix.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    arguments = ("ablate", str(file), "--run-dir", str(place))
    dry = cli(*arguments, "--device", "cpu", "--dry-run", "--format", "json")
    assert dry.returncode == 0, dry.stderr
    assert not place.exists()

    # Ctrl-C in the second run, after its first checkpoint.
    second = place / CELLS[1] / "1"
    with (tmp_path / "log").open("w") as output:
        child = subprocess.Popen(
            command(*arguments, "--device", "cpu"), stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
        deadline = time.monotonic() + 400
        try:
            while child.poll() is None and not (second / "checkpoints" / "latest_checkpointed_iteration.txt").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            child.send_signal(signal.SIGINT)
            status = child.wait(timeout=120)
        finally:
            child.kill()
    assert status == 130, (tmp_path / "log").read_text()[-3000:]
    assert json.loads((second / "receipt.json").read_text())["reason"] == "ended by SIGINT"
    told = json.loads((place / "ablation.json").read_text())
    assert [run["status"] for run in told["runs"]] == ["complete", "incomplete", "not run", "not run"]
    assert told["status"] == "incomplete"
    first = files_of(place / CELLS[0] / "1")

    refused = cli(*arguments, "--device", "cpu")
    assert refused.returncode == 2 and "exists already" in refused.stderr
    done = cli(*arguments, "--resume", "--format", "json", timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert files_of(place / CELLS[0] / "1") == first
    assert found == json.loads((place / "ablation.json").read_text())
    assert [run["status"] for run in found["runs"]] == ["complete"] * 4
    assert [run["plan_digest"] for run in found["runs"]] == [
        run["plan_digest"] for run in json.loads(dry.stdout)["runs"]
    ]
    for cell in CELLS:
        for seed in (1, 2):
            records = read_metrics(place / cell / str(seed) / "metrics.jsonl")
            assert [record["iteration"] for record in records] == list(range(1, 16))
    attempts = json.loads((second / "receipt.json").read_text())["attempts"]
    assert [attempt["from_iteration"] > 0 for attempt in attempts] == [False, True]

    (effect,) = found["verdict"]["effects"]
    assert effect["contrast"]["seeds"] == [1, 2]
    assert effect["contrast"]["controlled"]
    # The first seeds of the two cells drew one initialisation and one order of data, and differ after the gate alone.
    one, other = (read_metrics(place / cell / "1" / "metrics.jsonl") for cell in CELLS)
    assert [record["lm_loss"] for record in one[:4]] == [record["lm_loss"] for record in other[:4]]
    assert one[-1]["lm_loss"] != other[-1]["lm_loss"]
    seed = read_metrics(place / CELLS[0] / "2" / "metrics.jsonl")
    assert seed[0]["lm_loss"] != one[0]["lm_loss"]
    again = cli(*arguments, "--resume")
    assert again.returncode == 0 and "within these 2 seeds, no verdict over seeds: lm_loss" in again.stdout
    assert (place / "report.html").read_text().count("no verdict over seeds") >= 2
    content["set"].append("stp.weight=0.25")
    file.write_text(
        yaml.safe_dump(
            {**content, "factors": {"spans": content["factors"]["spans"], "gate": {"open": []}}}, sort_keys=False
        )
    )
    edited = cli(*arguments, "--resume")
    assert edited.returncode == 2 and "stp.weight: 0.5 in the run, 0.25 here" in edited.stderr
