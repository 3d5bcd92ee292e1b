"""Node data for Model Explorer (github.com/google-ai-edge/model-explorer): colours the nodes of an annotated file."""

from __future__ import annotations

import json
from pathlib import Path

from e2pass.backends.interop.files import write_text
from e2pass.errors import InputError
from e2pass.step.graph import TrainingGraph

VALUES = ("energy_j", "time_s", "macs")
GRAPH = "training_step"
"""Name of the graph in the file that ``write_annotated`` wrote."""


def write_model_explorer(graph: TrainingGraph, path: str | Path, value: str = "energy_j") -> Path:
    """Write the expected cost of each priced operation as node data, by its name in the annotated file.

    That name is the node's id in Model Explorer, which opens the file by its adapter ``model-explorer-onnx``.

    Args:
        graph: The training step.
        path: JSON file to write.
        value: ``energy_j``, ``time_s`` or ``macs``.

    Raises:
        InputError: For another value, or if no file can be written there.
    """
    if value not in VALUES:
        raise InputError(f"value {value!r} is not allowed; choose one of {', '.join(VALUES)}")
    amounts = {
        name: row.total_j if value == "energy_j" else row.time_s if value == "time_s" else row.macs
        for name, row in graph.costs.items()
    }
    data = {
        GRAPH: {
            "results": {name: {"value": amount} for name, amount in amounts.items()},
            "gradient": [{"stop": 0, "bgColor": "#fff7ec"}, {"stop": 1, "bgColor": "#d7301f"}],
        }
    }
    return write_text(json.dumps(data, indent=1) + "\n", path)
