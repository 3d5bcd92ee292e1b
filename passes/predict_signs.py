"""Predictive sign gradients on a joint graph (paper, section 3.3).

Every weight gradient becomes: most significant bits of the codes of x and gy, predicted dW, threshold, full dW,
select, sign, scale; each piece a node of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import fx

from e2pass.config import PSG
from e2pass.cost import Phase, Technique
from e2pass.diagnostics import Diagnostics
from e2pass.lowering.joint import Joint
from e2pass.lowering.products import Role, WeightGradient, layout_chain, weight_gradients
from e2pass.parameters import parameter_names, region_parameters
from e2pass.passes.base import Pass, PassResult
from e2pass.passes.joint_rewrite import after, e2, replay, tagged, unpack
from e2pass.passes.quantize import Codes
from e2pass.program import Program

aten = torch.ops.aten


@dataclass
class PsgResult:
    """What one joint graph's rewrite did: weights whose signs are predicted, and the reason for each other one."""

    predicted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PredictSignsJoint:
    """Rewrites the weight gradients of a quantized joint graph into predictor and fall-back.

    Attributes:
        psg: Predictor widths, threshold and scale.
        shared: Weights used in several regions: their predicted and full gradients leave the region apart, are
            summed over the regions, and are selected and signed once outside.
        full: Weights that are also used outside of products, and so keep full precision everywhere.
    """

    psg: PSG
    shared: frozenset[str] = frozenset()
    full: frozenset[str] = frozenset()

    def __call__(self, joint: Joint, frozen: bool) -> None:
        """Rewrite ``joint`` in place, unless it is the one of evaluation; ``notes["psg"]`` holds the result."""
        if not frozen:
            joint.notes["psg"] = self._rewrite(joint)

    def _rewrite(self, joint: Joint) -> PsgResult:
        result = PsgResult()
        gradients = []
        for gradient in weight_gradients(joint):
            reason = gradient.reason or self._reason_against(gradient)
            if reason:
                result.left[gradient.target] = reason
            else:
                gradients.append(gradient)
                result.predicted.append(gradient.target)
        rewriter = _Rewriter(joint, self.psg)
        rewriter.predict_products({p for g in gradients for p in g.products})
        replacements: dict[str, fx.Node] = {}
        extra: list[tuple[tuple[str, str], fx.Node]] = []
        for gradient in gradients:
            predicted = rewriter.predict(gradient)
            if gradient.target in self.shared:
                extra.append((("predicted", gradient.target), predicted))
            else:
                update, counts = rewriter.sign(gradient, predicted)
                replacements[gradient.target] = update
                extra.append((("counts", gradient.target), counts))
        _set_gradients(joint, replacements, extra)
        return result

    def _reason_against(self, gradient: WeightGradient) -> str:
        if gradient.target in self.full:
            return "another use of it is not a product, so all of it keeps full precision"
        return "" if gradient.products else "no product was found behind it"


@dataclass(frozen=True)
class PredictSigns(Pass):
    """Options are those of ``e2pass.PSG``."""

    x_bits: int = 4
    gy_bits: int = 10
    beta: float = 0.05
    scale: Literal["mean", "unit"] = "mean"

    name: ClassVar[str] = "predict-signs"
    needs: ClassVar[frozenset[str]] = frozenset({"lowered", "quantized"})
    establishes: ClassVar[frozenset[str]] = frozenset({"signs"})

    def run(self, program: Program) -> PassResult:
        """Rewrite every lowered region's weight gradients, and arrange for those of regions lowered later."""
        shared, full = _uses(program)
        psg = PSG(x_bits=self.x_bits, gy_bits=self.gy_bits, beta=self.beta, scale=self.scale)
        rewrite = PredictSignsJoint(psg, frozenset(shared), frozenset(full))
        program.rewrites.append(rewrite)
        program.shared = shared
        diagnostics = Diagnostics()
        for _, joint in program.lowered.values():
            rewrite(joint, False)
            result: PsgResult = joint.notes["psg"]
            for target in result.predicted:
                diagnostics.info("E2P410", target, "weight gradient replaced by a predicted sign")
            for target, reason in result.left.items():
                diagnostics.info("E2P411", target, f"keeps its full gradient: {reason}")
        return PassResult(program, bool(program.lowered), diagnostics)


def _uses(program: Program) -> tuple[dict[str, str], set[str]]:
    """Weights that several regions use, by every name they go by, and weights used outside of products too."""
    canonical = parameter_names(program.model)
    products: dict[str, set[str]] = {}
    others: set[str] = set()
    lowered = {name: weight_gradients(before) for name, (before, _) in program.lowered.items()}
    for name, gradients in lowered.items():
        for gradient in gradients:
            owner = canonical[gradient.target]
            if gradient.products:
                products.setdefault(owner, set()).add(name)
            else:
                others.add(owner)
    for region in program.plans["train"].regions:
        if region.name not in lowered:  # runs as it is, so its weights get plain gradients there
            others |= {canonical[p] for p in region_parameters(region, program.model)}
    shared = {alias: owner for alias, owner in canonical.items() if len(products.get(owner, ())) > 1}
    full = {alias for alias, owner in canonical.items() if owner in others}
    return {a: o for a, o in shared.items() if a not in full}, full


def _set_gradients(
    joint: Joint, replacements: dict[str, fx.Node], extra: list[tuple[tuple[str, str], fx.Node]]
) -> None:
    values = joint.output_nodes()
    for i, (kind, key) in enumerate(joint.outputs):
        if kind == "grad" and key[0] == "param" and key[1] in replacements:
            values[i] = replacements[key[1]]
    joint.set_outputs([*values, *(n for _, n in extra)], [*joint.outputs, *(k for k, _ in extra)])
    joint.graph.eliminate_dead_code()
    joint.graph.lint()
    joint.graph_module.recompile()


class _Rewriter:
    def __init__(self, joint: Joint, psg: PSG) -> None:
        self.joint, self.graph, self.psg = joint, joint.graph, psg
        self.high: dict[fx.Node, fx.Node] = {}
        self.rebuilt: dict[fx.Node, fx.Node] = {}

    def predict_products(self, products: set[fx.Node]) -> None:
        """Give every product its predictor, in graph order, so that shared operands precede all their uses."""
        for node in sorted(products):
            with after(self.graph, node):
                self.rebuilt[node] = self._predicted_product(node)

    def predict(self, gradient: WeightGradient) -> fx.Node:
        """Rebuild the gradient's path from its products' predictors."""
        for node in _topological(gradient):
            if node in self.rebuilt:
                continue
            with after(self.graph, max(node, *(self.rebuilt.get(n, n) for n in node.all_input_nodes))):
                copy = self.graph.node_copy(node, lambda n: self.rebuilt.get(n, n))
                copy.meta = {**node.meta, "e2_technique": Technique.PSG, "e2_tag": "psg.predict"}
                self.rebuilt[node] = copy
        return self.rebuilt[gradient.value]

    def _predicted_product(self, node: fx.Node) -> fx.Node:
        product = node.args[0] if node.target.__name__ == "getitem" else node  # type: ignore[union-attr]
        assert isinstance(product, fx.Node)
        args = list(product.args)
        operands: dict[int, Codes] = product.meta["e2_operands"]
        with self.graph.inserting_before(product):
            for index, codes in operands.items():
                args[index] = self._most_significant(product.args[index], codes, product)  # type: ignore[arg-type]
        with after(self.graph, product):
            copy = tagged(
                self.graph, product.target, *args, like=product, tag="psg.predict", technique=Technique.PSG,
                phase=Phase.DW,
            )  # fmt: skip
        product.meta.update(e2_tag="psg.full", e2_full_dw=True)
        if node is product:
            return copy
        with after(self.graph, copy):
            return tagged(
                self.graph, node.target, copy, node.args[1], like=node, tag="psg.predict", technique=Technique.PSG
            )

    def _most_significant(self, operand: fx.Node, codes: Codes, product: fx.Node) -> fx.Node:
        gradient = codes.codes.args[0].meta["e2_tag"] == f"bits.{Role.GY}"  # type: ignore[union-attr]
        keep = min(self.psg.gy_bits if gradient else self.psg.x_bits, codes.bits)
        if codes.codes not in self.high:
            node = tagged(
                self.graph, e2.msb.default, codes.codes, codes.scale, codes.bits, keep,
                like=product, tag="psg.msb", technique=Technique.PSG, phase=Phase.BACKWARD,
            )  # fmt: skip
            high, scale = unpack(self.graph, node, (keep, None))
            value = tagged(
                self.graph, e2.dequantize.default, high, scale,
                like=product, tag="psg.msb", technique=Technique.PSG, bits=keep, phase=Phase.BACKWARD,
            )  # fmt: skip
            self.high[codes.codes] = value
        return replay(self.graph, self.high[codes.codes], layout_chain(operand)[1])

    def sign(self, gradient: WeightGradient, predicted: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Threshold, select, sign and scale of one weight; returns the update and the selection's counts."""
        full = gradient.value
        last = max(full, predicted)

        def node(target: object, *args: object, tag: str) -> fx.Node:
            return tagged(
                self.graph, target, *args, like=full, tag=tag, technique=Technique.PSG, phase=Phase.BACKWARD
            )  # fmt: skip

        with self.graph.inserting_before(last.next):
            tau = node(e2.threshold.default, predicted, self.psg.beta, tag="psg.threshold")
            pair = node(e2.select.default, predicted, full, tau, tag="psg.select")
            chosen, counts = unpack(self.graph, pair, (None, None))
            update = node(aten.sign.default, chosen, tag="psg.sign")
            if self.psg.scale == "mean":
                magnitude = node(aten.abs.default, predicted, tag="psg.scale")
                mean = node(aten.mean.default, magnitude, tag="psg.scale")
                update = node(aten.mul.Tensor, update, mean, tag="psg.scale")
        return update, counts


def _topological(gradient: WeightGradient) -> list[fx.Node]:
    """Nodes from the products to the gradient, operands first."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node in seen:
            return
        seen.add(node)
        if node not in gradient.products:
            for operand in node.all_input_nodes:
                if isinstance(operand.meta["val"], torch.Tensor):
                    visit(operand)
        order.append(node)

    visit(gradient.value)
    return order
