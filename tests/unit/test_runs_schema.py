"""docs/receipt.schema.json and docs/metrics.schema.json say what runs write."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from megacpp_stp.runs.json_schema import SCHEMAS, json_schema
from megacpp_stp.runs.metrics_model import MetricsRecord
from megacpp_stp.runs.receipt import READABLE_VERSIONS, RECEIPT_VERSION
from megacpp_stp.runs.receipt_model import ReceiptModel
from tests.unit.made_runs import make_run
from tests.unit.test_recipe_schema import problems

DOCS = Path(__file__).parents[2] / "docs"
METRICS = DOCS / "runs.md"


def require_fits(name, text):
    """By the typed model, and by the published schema, which is for readers without it."""
    SCHEMAS[name][0].model_validate_json(text)
    schema = json.loads((DOCS / name).read_text())
    assert problems(json.loads(text), schema, schema, name) == []


def require_run_fits(run):
    """All that a real run left."""
    require_fits("receipt.schema.json", (run / "receipt.json").read_text())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        require_fits("metrics.schema.json", line)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_files_are_golden(request, name):
    text = json.dumps(json_schema(name), indent=2) + "\n"
    golden = DOCS / name
    if request.config.getoption("--update-golden"):
        golden.write_text(text, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == text


def test_the_schema_is_of_the_version_that_is_written():
    assert json_schema("receipt.schema.json")["properties"]["receipt_version"]["const"] == RECEIPT_VERSION
    assert READABLE_VERSIONS[-1] == RECEIPT_VERSION


def test_the_documented_names_are_those_of_the_schema():
    table = METRICS.read_text().split("## Names in metrics.jsonl")[1]
    documented = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert documented == set(MetricsRecord.model_fields)


@pytest.fixture
def receipt(tmp_path):
    """What a run without any training leaves, with real fingerprints."""
    run = make_run(tmp_path / "run", iterations=2)
    content = json.loads((run / "receipt.json").read_text())
    split = {"tokens": 7, "documents": 3, "bin_sha256": "a" * 64}
    data = {"splits": {"train": split, "valid": split}, "tokenizer": {"vocab_size": 5, "sha256": "b" * 64}}
    return {**content, "data": {**data, "source_sha256": "c" * 64}}


def test_a_receipt_as_written_fits(receipt):
    require_fits("receipt.schema.json", json.dumps(receipt))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("status",), "fine"),
        (("receipt_version",), 1),
        (("new",), 1),
        (("windows", "active"), [1]),
        (("data", "tokenizer", "sha256"), "short"),
        (("best",), {"iteration": 1, "lm_loss": "low", "bits_per_byte": 1.0}),
        (("weights_sha256",), 7),
        (("auxiliary_losses", "stp", "weight"), -1.0),
    ],
)
def test_what_no_run_writes_does_not_fit(receipt, path, value):
    """Neither the model nor the published schema takes it: that the tests above can fail."""
    node = receipt
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ValidationError):
        ReceiptModel.model_validate_json(json.dumps(receipt))
    schema = json_schema("receipt.schema.json")
    assert problems(receipt, schema, schema)
