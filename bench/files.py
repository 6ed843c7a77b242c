"""Results on disk: results.json holds everything, results.csv the rows for other programs."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from .run import FIELDS

FORMAT = 1
TEXT = ("level", "op", "size", "work", "dtype", "device", "provider", "status", "reason", "noise")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """In one piece: a run that is killed leaves the last complete file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file is no result of this suite."""
    try:
        document = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected results of python -m bench, got {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path}: expected results of python -m bench, format {FORMAT}; measure again with this version")
    return document


def write_csv(path: Path, results: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(results)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows again, with numbers as numbers and None for what is empty."""

    def value(name: str, text: str) -> Any:
        if name == "reason":
            return text
        return None if text == "" else text if name in TEXT else float(text) if "." in text or "e" in text else int(text)

    with path.open(newline="") as file:
        return [{name: value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]
