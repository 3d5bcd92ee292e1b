"""The program that passes read and write: a captured model on its way to a transformed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from e2pass.blocks import ResidualBlock
from e2pass.capture import Capture
from e2pass.config import Config
from e2pass.diagnostics import Diagnostics
from e2pass.inputs import Inputs
from e2pass.lowering.joint import Joint
from e2pass.plan import Mode, Plan

JointRewrite = Callable[[Joint, bool], None]
"""Rewrites a joint graph in place; the flag says whether activations use frozen scales (evaluation)."""


@dataclass
class Program:
    """Everything known about the model, at one point of the road from capture to the transformed module.

    Attributes:
        model: Owner of all parameters; the caller's module only with ``inplace=True``.
        inputs: Example inputs.
        config: What to apply.
        capture: Graphs of the model as captured.
        graphs: The flat forward graph of each mode, one object where the modes do not differ; passes edit these.
        blocks: Residual blocks of each mode's graph, aligned by index.
        slu: The gates, once inserted: a module that becomes the child ``e2_slu`` of the transformed model.
        plans: Outlined program of each mode.
        rewrites: What each region's joint graph goes through after lowering, in order.
        lowered: Joint graph of each training region before and after the rewrites, for the graph and the price.
        shared: Every name of a weight that several regions use, with the name under which its owner registers it first.
        step: The priced training step, once ``price`` has run.
        loader: The caller's loader, wrapped once SMD has run.
        diagnostics: What was rewritten, what was not, and why.
        made_by: For each region of ``lowered``, the pass that made each node of its rewritten joint graph.
        facts: Names of the properties established so far, e.g. ``blocks``, ``gates``, ``regions``.
    """

    model: nn.Module
    inputs: Inputs
    config: Config
    capture: Capture
    graphs: dict[Mode, fx.GraphModule] = field(default_factory=dict)
    blocks: dict[Mode, list[ResidualBlock]] = field(default_factory=dict)
    slu: Any = None
    plans: dict[Mode, Plan] = field(default_factory=dict)
    rewrites: list[JointRewrite] = field(default_factory=list)
    lowered: dict[str, tuple[Joint, Joint]] = field(default_factory=dict)
    step: Any = None
    shared: dict[str, str] = field(default_factory=dict)
    loader: Any = None
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    made_by: dict[str, dict[str, str]] = field(default_factory=dict)
    facts: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, config: Config, capture: Capture) -> Program:
        """A program that holds what capture found and nothing else."""
        program = cls(model, inputs, config, capture)
        program.graphs = {"train": capture.train, "eval": capture.eval}
        program.facts.add("captured")
        return program

    def note_origins(self, name: str) -> None:
        """Credit pass ``name`` with every node of the joint graphs that no earlier pass made."""
        for region, (_, joint) in self.lowered.items():
            known = self.made_by.setdefault(region, {})
            for node in joint.graph.nodes:
                known.setdefault(node.name, name)

    def unique_graphs(self) -> list[tuple[Mode, fx.GraphModule]]:
        """Each distinct forward graph once, training first."""
        train, evaluation = self.graphs["train"], self.graphs["eval"]
        return [("train", train)] if train is evaluation else [("train", train), ("eval", evaluation)]
