"""Functions of the user's own, named in a config by their dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from megatron_vespo.config.load import ConfigError


def import_function(setting: str, path: str, known: str = "") -> Callable[..., Any]:
    """The function at ``package.module.function`` (or ``package.module:function``).

    ``setting``: the field of the config that holds the path, and ``known``: what else that may be; both for the
    message of the :class:`ConfigError` that is raised where there is no such function.
    """
    module_name, _, attribute = path.rpartition(":" if ":" in path else ".")
    if not module_name:
        what = f"neither one of {known} nor a" if known else "not a"
        raise ConfigError(f"{setting}={path!r} is {what} dotted path such as my_package.my_module.my_function.")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ConfigError(
            f"{setting}={path!r}: module {module_name!r} cannot be imported ({error}). "
            "It must be installed or on PYTHONPATH."
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{setting}={path!r}: module {module_name!r} has no {attribute!r}.") from error
    if not callable(function):
        raise ConfigError(f"{setting}={path!r}: {attribute!r} is a {type(function).__name__}, not a function.")
    return function
