from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a file; a last line torn by a kill is left out."""
    records = []
    with open(path, "rb") as file:
        for line in file:
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
    return records
