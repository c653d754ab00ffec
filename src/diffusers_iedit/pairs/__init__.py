"""From captioned images to iEdit's weakly supervised training set (Sec. 3.1): `build.py` has the stages in order."""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .edit_prompts import Edit, EditOptions, make_edit
    from .schema import FEATURES, load_pairs, validate

if missing := [name for name in ("datasets", "faiss", "nltk", "scipy") if find_spec(name) is None]:
    raise ImportError(f'diffusers_iedit.pairs needs {", ".join(missing)}: pip install "diffusers-iedit[data]"')

_MODULES = {
    "Edit": "edit_prompts",
    "EditOptions": "edit_prompts",
    "make_edit": "edit_prompts",
    "FEATURES": "schema",
    "load_pairs": "schema",
    "validate": "schema",
}

__all__ = ["FEATURES", "Edit", "EditOptions", "load_pairs", "make_edit", "validate"]


# Loading pairs should not import NLTK, nor a new caption all of datasets (PEP 562).
def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
