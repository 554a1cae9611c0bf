"""The chat template among the files of a model: read as transformers does, written as it does."""

from __future__ import annotations

from os.path import lexists
from pathlib import Path
from typing import Any

from onelaunch.checkpoints.atomic import read_bytes, read_json, write_text
from onelaunch.errors import BadInput

CHAT_TEMPLATE_FILE = "chat_template.jinja"

# The longest templates on the Hub have some 30 kB; tokenizer_config.json may list many tokens.
_TEMPLATE_BYTES = 1 << 18
_SETTINGS_BYTES = 4 << 20


def read_chat_template(folder: Path, prefix: str = "") -> tuple[str | None, tuple[str, ...]]:
    """Read the chat template in a folder, from chat_template.jinja, or else tokenizer_config.json
    (of several the one named default), or else chat_template.json.

    The names of the files begin with `prefix`. Returns None if there is none. One that cannot be
    used does not keep the model from loading: the second value has a line for the user.
    """
    path = folder / f"{prefix}{CHAT_TEMPLATE_FILE}"
    try:
        if lexists(path):
            return checked_template(path, read_bytes(path, _TEMPLATE_BYTES, "a chat template")), ()
        for name in ("tokenizer_config.json", "chat_template.json"):
            path = folder / f"{prefix}{name}"
            source = _default(read_json(path, _SETTINGS_BYTES)) if lexists(path) else None
            if source is not None:
                return checked_template(path, source.encode("utf-8", "surrogatepass")), ()
    except BadInput as error:
        return None, (f"note: the model's chat template is not used: {error}",)
    return None, ()


def write_chat_template(folder: Path, source: str, prefix: str = "") -> None:
    """Write chat_template.jinja, its name after `prefix`, into a folder, atomically."""
    write_text(folder / f"{prefix}{CHAT_TEMPLATE_FILE}", source)


def _default(settings: dict[str, Any]) -> str | None:
    """Return the template of a table's chat_template: a string, or named ones in a list."""
    value = settings.get("chat_template")
    if isinstance(value, list):
        by_name = {e.get("name"): e.get("template") for e in value if isinstance(e, dict)}
        value = by_name.get("default")
    return value if isinstance(value, str) else None


def checked_template(path: Path, raw: bytes) -> str:
    """Return the chat template in a file; raises BadInput if it is too large or not UTF-8."""
    if len(raw) > _TEMPLATE_BYTES:
        raise BadInput(f"{path}: its chat template is larger than {_TEMPLATE_BYTES} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: its chat template is not UTF-8 (byte {error.start})") from None
