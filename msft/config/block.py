"""The base of every block of the recipe."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Block(BaseModel):
    """A frozen block of keys: unknown ones are refused, a key without a value counts as not written."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_empty_keys(cls, value: Any) -> Any:
        if value is None:
            return {}
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {key: item for key, item in value.items() if item is not None or key not in known}
