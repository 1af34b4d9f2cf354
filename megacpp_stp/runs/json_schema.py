"""JSON Schemas of a run's files, from their types and nothing else."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from megacpp_stp.runs.metrics_model import MetricsRecord
from megacpp_stp.runs.receipt_model import ReceiptModel

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMAS: dict[str, tuple[type[BaseModel], str]] = {
    "receipt.schema.json": (ReceiptModel, "receipt.json of a megacpp-stp run"),
    "metrics.schema.json": (MetricsRecord, "one line of metrics.jsonl of a megacpp-stp run"),
}
"""By file name: the type, and what it is of."""


def json_schema(name: str) -> dict[str, Any]:
    """One of `SCHEMAS` as JSON Schema (2020-12)."""
    model, title = SCHEMAS[name]
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})
    for part in (schema, *parts.values()):
        part.pop("title", None)
        for node in (part, *part.get("properties", {}).values()):
            # pydantic's own titles only repeat the name.
            node.pop("title", None)
            _tidy(node)
    return {"$schema": _DIALECT, "$id": name, "title": title, **schema, **({"$defs": parts} if parts else {})}


def _tidy(node: Any) -> None:
    """Say that a mapping whose names have a pattern has no others; one blank for each run of them in a text."""
    if isinstance(node, dict):
        if "patternProperties" in node:
            node["additionalProperties"] = False
        if isinstance(node.get("description"), str):
            node["description"] = " ".join(node["description"].replace("``", "`").split())
        for item in node.values():
            _tidy(item)
    elif isinstance(node, list):
        for item in node:
            _tidy(item)
