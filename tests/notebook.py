"""A notebook's code cells, run in order in one namespace as Jupyter does, without Jupyter."""

import ast
import json
from pathlib import Path
from typing import Any


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def outputs_of(path: Path) -> list[Any]:
    """Of each code cell, the value of its last line if that is an expression, which Jupyter shows, or None."""
    namespace, outputs = {"__name__": "__main__"}, []
    for cell in code_cells(path):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), namespace)
        outputs.append(last and eval(compile(ast.Expression(last.value), path.name, "eval"), namespace))
    return outputs
