"""llm-quantize: any Hugging Face checkpoint to a quantized artifact, measured.

The library beneath the command line: a function for each command, their options and their results. Names are imported
on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_quantize import errors, events
    from llm_quantize.advice.answer import Advice
    from llm_quantize.api import (
        calibrate,
        compare,
        convert,
        evaluate,
        fit,
        info,
        plan,
        quantize,
        recipe_from,
        recommend,
        run,
        verify,
    )
    from llm_quantize.artifacts.result import ArtifactResult
    from llm_quantize.artifacts.verification import Verification
    from llm_quantize.calibration.outcome import Calibration
    from llm_quantize.compare.assessment import Assessment
    from llm_quantize.errors import LlmQuantizeError
    from llm_quantize.formats.gguf.levels import Overrides
    from llm_quantize.formats.recipe import Recipe
    from llm_quantize.formats.recipe_file import read_recipe
    from llm_quantize.methods.gptq_options import GptqOptions
    from llm_quantize.options import CalibrationOptions, MeasurementOptions, MethodOptions, Options
    from llm_quantize.plan import ArtifactPlan
    from llm_quantize.reports.findings import ComparisonResult
    from llm_quantize.results import Generation, ModelInfo, Results

__version__ = "0.1.0"

_PUBLIC = {
    "info": "api",
    "plan": "api",
    "quantize": "api",
    "convert": "api",
    "verify": "api",
    "evaluate": "api",
    "compare": "api",
    "recommend": "api",
    "calibrate": "api",
    "run": "api",
    "Options": "options",
    "CalibrationOptions": "options",
    "MethodOptions": "options",
    "MeasurementOptions": "options",
    "GptqOptions": "methods.gptq_options",
    "Overrides": "formats.gguf.levels",
    "Recipe": "formats.recipe",
    "read_recipe": "formats.recipe_file",
    "recipe_from": "api",
    "fit": "api",
    "ModelInfo": "results",
    "ArtifactPlan": "plan",
    "ArtifactResult": "artifacts.result",
    "Verification": "artifacts.verification",
    "Assessment": "compare.assessment",
    "ComparisonResult": "reports.findings",
    "Advice": "advice.answer",
    "Calibration": "calibration.outcome",
    "Generation": "results",
    "Results": "results",
    "LlmQuantizeError": "errors",
    "errors": "",
    "events": "",
}
"""{public name: the module that it is in; "": it is that module}."""

__all__ = [
    "Advice",
    "ArtifactPlan",
    "ArtifactResult",
    "Assessment",
    "Calibration",
    "CalibrationOptions",
    "ComparisonResult",
    "Generation",
    "GptqOptions",
    "LlmQuantizeError",
    "MeasurementOptions",
    "MethodOptions",
    "ModelInfo",
    "Options",
    "Overrides",
    "Recipe",
    "Results",
    "Verification",
    "__version__",
    "calibrate",
    "compare",
    "convert",
    "errors",
    "evaluate",
    "events",
    "fit",
    "info",
    "plan",
    "quantize",
    "read_recipe",
    "recipe_from",
    "recommend",
    "run",
    "verify",
]


class _Package(ModuleType):
    """The package, in which a public name stays what it is: importing a module of the same name (``llm_quantize.plan``
    is a function, and a module that lies in ``sys.modules``) would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and _PUBLIC.get(name)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_PUBLIC[name] or name}")
    return getattr(module, name) if _PUBLIC[name] else module


def __dir__() -> list[str]:
    return sorted(__all__)
