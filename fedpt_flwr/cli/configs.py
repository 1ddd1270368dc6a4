"""Run configs as `flwr run` reads them: the app's defaults, and what a user gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpt_flwr.errors import ConfigError


def flat_config(app_dir: Path, overrides: list[str] | None) -> dict[str, Any]:
    """The app's defaults, and over them what a user gives."""
    return app_config(app_dir) | given_config(overrides)


def app_config(app_dir: Path) -> dict[str, Any]:
    """The app's defaults."""
    import tomllib

    from flwr.common.config import flatten_dict

    path = app_dir / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", place=str(path.absolute()), remedy="name the app's folder with --app"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not valid TOML ({error})", place=str(path.absolute())) from error
    defaults = project.get("tool", {}).get("flwr", {}).get("app", {}).get("config", {})
    if "num-server-rounds" not in defaults:
        raise ConfigError(
            "must be the one of this app, with [tool.flwr.app.config]",
            place=str(path.absolute()),
            remedy="name the app's folder with --app",
        )
    return dict(flatten_dict(defaults))


def given_config(overrides: list[str] | None, *, place: str = "--run-config") -> dict[str, Any]:
    """What a user gives with the option ``place``, read as `flwr run` would."""
    import tomllib

    from click import ClickException
    from flwr.common.config import parse_config_args

    try:
        given = parse_config_args(overrides)
    except (ClickException, ValueError, OSError, tomllib.TOMLDecodeError) as error:
        message = error.message if isinstance(error, ClickException) else str(error)
        raise ConfigError(f"cannot be read ({message})", value=overrides, place=place) from error
    if overrides and not given:  # Flower passes over what is no pair, and takes a file that is empty
        rule = "must be key=value pairs or one TOML file that sets some keys"
        raise ConfigError(rule, value=" ".join(overrides), place=place)
    return dict(given)
