"""Reads settings from the command line, the environment and a file, in this order of precedence."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import BeforeValidator, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from fluxfire.errors import FluxfireError
from fluxfire.serve.settings import Settings

PREFIX = "FLUXFIRE_"
"""What the name of an environment variable begins with; the setting's name follows, in capitals."""
_SIZE = re.compile(r"(\d+)x(\d+)")


class _Base(BaseSettings):
    """The sources of a service's settings."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", protected_namespaces=()
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic passes all of them
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources, the first of them the strongest."""
        file = cls.model_config.get("toml_file")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, file)


def read_settings(given: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Read settings.

    Args:
        given: settings of the command line. They win over the environment, and the environment
            over the file.
        file: a TOML file with settings by name; None for no file.

    Raises:
        FluxfireError: the file cannot be read, or a setting is unknown or wrong.
    """
    if file is not None:
        _check_file(file)
    model = create_model("Sources", __base__=_Base, **_definitions())
    model.model_config["toml_file"] = file
    try:
        read = model(**given)
    except ValidationError as error:
        raise FluxfireError("; ".join(_explain(each, file) for each in error.errors())) from None
    return Settings(**{name: getattr(read, name) for name in read.model_fields_set})


def _definitions() -> dict[str, Any]:
    """Return each setting's type and default; an environment variable lists values by commas."""
    hints = get_type_hints(Settings)
    found = {}
    for field in fields(Settings):
        kind = hints[field.name]
        if field.name == "warm_up":
            kind = Annotated[kind, NoDecode, BeforeValidator(_read_sizes)]
        elif kind == tuple[str, ...]:
            kind = Annotated[kind, NoDecode, BeforeValidator(_read_list)]
        found[field.name] = (kind, field.default)
    return found


def _read_list(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(filter(None, map(str.strip, value.split(","))))
    return value


def _read_sizes(value: Any) -> Any:
    """Read sizes such as 1024x768; pairs of numbers stay as they are."""
    sizes = _read_list(value)
    if not isinstance(sizes, list | tuple):
        return sizes
    read = []
    for size in sizes:
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if isinstance(size, str) and match is None:
            raise ValueError(f"{size!r} is not WIDTHxHEIGHT, such as 1024x1024")
        read.append((int(match[1]), int(match[2])) if match else size)
    return tuple(read)


def _check_file(file: Path) -> None:
    try:
        tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FluxfireError(f"the settings in {file} cannot be read: {error}") from error


def _explain(error: Any, file: Path | None) -> str:
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        known = ", ".join(field.name for field in fields(Settings))
        return f"{file} has the unknown setting {name}; the settings are {known}"
    variable = PREFIX + name.upper()
    where = f" (it may come from {variable})" if variable in os.environ else ""
    said = error["msg"].removeprefix("Value error, ")
    shown = "" if "secret" in name else f"={error['input']!r}"
    return f"{name}{shown}: {said}{where}"
