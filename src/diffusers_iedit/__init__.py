"""Localised text-guided image editing (iEdit) for diffusers."""

import importlib
import logging
from typing import TYPE_CHECKING


__version__ = "0.1.0"

# At every start, transformers tells that image processors fall back from torchvision to Pillow: nothing changes by it.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

__all__ = ["IEditMaskedDDIM", "IEditMaskedScheduler", "IEditPipeline", "IEditPipelineOutput", "LocalEditor", "mini"]


if TYPE_CHECKING:
    from . import mini
    from .editor import LocalEditor
    from .pipeline import IEditPipeline, IEditPipelineOutput
    from .scheduling_iedit import IEditMaskedDDIM, IEditMaskedScheduler
else:
    # Importing diffusers and transformers takes seconds, so that is left until a name is first used (PEP 562).
    def __getattr__(name: str):
        if name == "mini":
            return importlib.import_module(".mini", __name__)
        if name.startswith("IEditPipeline") and name in __all__:
            return getattr(importlib.import_module(".pipeline", __name__), name)
        if name == "LocalEditor":
            return importlib.import_module(".editor", __name__).LocalEditor
        if name.startswith("IEditMasked") and name in __all__:
            return getattr(importlib.import_module(".scheduling_iedit", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted([*globals(), *__all__])
