"""Functions in the user's own Python files, which a recipe names as ``package.module:function``.

Naming one runs the file. Only names in a recipe are imported: from the import path, and from the
folder of the recipe.
"""

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""A name of a function; no template or metric of the package looks like one."""


def is_function(name: str) -> bool:
    """Whether a text is the name of a function."""
    return re.fullmatch(FUNCTION, name) is not None


def import_from(folder: Path) -> None:
    """Add a folder to the import path, behind all others: it shadows no installed module."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def find_function(name: str) -> Callable[..., Any]:
    """Return the function called ``package.module:function``.

    Raises ValueError where there is no such module or function, naming where it was looked for.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's file imports
        raise ValueError(
            f"{name}: no module '{error.name}' beside the recipe or on the import path; looked in "
            f"{', '.join(sys.path[-3:])}"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{name}: {module.__file__} has no function '{function_name}'; define it")
    return function
