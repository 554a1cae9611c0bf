"""Read a JSON body field by field, with errors that name the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from onelaunch.errors import BadInput


class InvalidRequest(BadInput):
    """A request that cannot be answered, with the HTTP status, the type and the code of OpenAI's
    error object, the field it is about, and further entries of the object."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.kind, self.code = param, status, kind, code
        self.headers, self.details = dict(headers or {}), details

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {
            "message": str(self), "type": self.kind, "param": self.param, "code": self.code,
            **self.details,
        }  # fmt: skip
        return {"error": error}


class Body:
    """The fields of a JSON object; null counts as absent. Its readers raise InvalidRequest."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def parse(cls, raw: bytes) -> Body:
        """Parse a body; raises InvalidRequest unless it is a JSON object."""
        try:
            data = json.loads(raw, parse_constant=_no_constant)
        except RecursionError:
            raise InvalidRequest("the body is nested too deep") from None
        except ValueError as error:  # of JSON, of UTF-8, of a number with thousands of digits
            raise InvalidRequest(f"the body is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise InvalidRequest("the body must be a JSON object")
        return cls(data)

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def first(self, *names: str) -> str:
        """The first of some names that the body has; else the first of all."""
        return next((name for name in names if name in self.fields), names[0])

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from `low` to `high`; 3.0 counts as one."""
        value = self.fields.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, f"must be a whole number from {low} to {high}")
        return int(value)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, "must be a number")
        if not low <= value <= high:
            self.refuse(name, f"must be from {low:g} to {high:g}")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return bool(value)

    def string(self, name: str, default: str = "") -> str:
        """A string of valid Unicode."""
        value = self.fields.get(name, default)
        if not isinstance(value, str):
            self.refuse(name, "must be a string")
        return self.unicode(name, value)

    def unicode(self, name: str, text: str) -> str:
        """`text`, unless it has half of a surrogate pair, which no UTF-8 has."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.refuse(name, "must be valid Unicode")
        return text

    def table(self, name: str) -> Body:
        """An object; empty where it is absent."""
        value = self.fields.get(name, {})
        if not isinstance(value, dict):
            self.refuse(name, "must be an object")
        return Body(value)

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raise InvalidRequest for a field."""
        raise InvalidRequest(f"{name}: {reason}", name)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
