"""Predictive sign gradients on a joint graph (paper, section 3.3).

Every weight gradient becomes: most significant bits of the codes of x and gy, predicted dW, threshold, full dW,
select, sign, scale; each piece a node of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import fx

from e2pass.config import PSG
from e2pass.cost import Phase, Technique
from e2pass.diagnostics import Diagnostics
from e2pass.lowering.joint import Joint
from e2pass.lowering.products import Role, WeightGradient, layout_chain, weight_gradients
from e2pass.parameters import matching, parameter_names, region_parameters
from e2pass.passes.base import Pass, PassResult
from e2pass.passes.joint_rewrite import after, e2, rebuild, replay, source_product, tagged, unpack
from e2pass.passes.quantize import Codes
from e2pass.passes.selection_statistics import error_variance
from e2pass.program import Program

aten = torch.ops.aten


@dataclass
class PsgResult:
    """What one joint graph's rewrite did.

    Attributes:
        predicted: Weights whose signs are predicted.
        signed: Parameters updated by the sign of their full gradient, as asked for.
        left: The others, each with the reason.
    """

    predicted: list[str] = field(default_factory=list)
    signed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PredictSignsJoint:
    """Rewrites the weight gradients of a quantized joint graph into predictor and fall-back.

    Attributes:
        psg: Predictor widths, threshold and scale.
        shared: Weights used in several regions: their predicted and full gradients leave the region apart, are
            summed over the regions, and are selected and signed once outside.
        full: Parameters that keep their full gradient, each with the reason.
        stats: Whether the joint graph also returns each weight's statistics.
    """

    psg: PSG
    shared: frozenset[str] = frozenset()
    full: Mapping[str, str] = field(default_factory=dict)
    stats: bool = False

    def __call__(self, joint: Joint, frozen: bool) -> None:
        """Rewrite ``joint`` in place, unless it is the one of evaluation; ``notes["psg"]`` holds the result."""
        if not frozen:
            joint.notes["psg"] = self._rewrite(joint)

    def _rewrite(self, joint: Joint) -> PsgResult:
        result = PsgResult()
        gradients = []
        signed = []
        for gradient in weight_gradients(joint):
            reason = self.full.get(gradient.target) or self._reason_against(gradient)
            if not reason:
                gradients.append(gradient)
                result.predicted.append(gradient.target)
            elif gradient.kind in self.psg.also and gradient.target not in self.full:
                signed.append(gradient)
                result.signed.append(gradient.target)
            else:
                result.left[gradient.target] = reason
        rewriter = _Rewriter(joint, self.psg)
        rewriter.predict_products({p for g in gradients for p in g.products})
        replacements: dict[str, fx.Node] = {}
        extra: list[tuple[tuple[str, str], fx.Node]] = []
        for gradient in gradients:
            predicted = rewriter.predict(gradient)
            if gradient.target in self.shared:
                extra.append((("predicted", gradient.target), predicted))
                continue
            tau, replacements[gradient.target] = rewriter.update(gradient, predicted)
            if self.stats:
                extra.append((("counts", gradient.target), rewriter.count(gradient, predicted, tau)))
        for gradient in signed:
            replacements[gradient.target] = rewriter.sign(gradient.value, gradient.value, gradient.value)
        _set_gradients(joint, replacements, extra)
        return result

    def _reason_against(self, gradient: WeightGradient) -> str:
        if gradient.reason:
            return gradient.reason
        if not all("e2_operands" in source_product(p).meta for p in gradient.products):
            return "its product stays in full precision"
        return ""


@dataclass(frozen=True)
class PredictSigns(Pass):
    """Options are those of ``e2pass.PSG``."""

    x_bits: int = 4
    gy_bits: int = 10
    msb: Literal["round", "floor", "truncate"] = "round"
    beta: float = 0.05
    tau: float | None = None
    sparsify: bool = False
    sign: bool = True
    scale: Literal["mean", "unit"] = "mean"
    warmup: int = 0
    exclude: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    stats: bool = False
    bound: bool = False

    name: ClassVar[str] = "predict-signs"
    needs: ClassVar[frozenset[str]] = frozenset({"lowered", "quantized"})
    establishes: ClassVar[frozenset[str]] = frozenset({"signs"})

    def run(self, program: Program) -> PassResult:
        """Rewrite every lowered region's weight gradients, and arrange for those of regions lowered later."""
        psg = PSG(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        shared, full = _uses(program, matching(program.model, self.exclude, "PSG.exclude"))
        rewrite = PredictSignsJoint(psg, frozenset(shared), full)
        # What runs may also count; what is shown and priced is the work of the board.
        program.rewrites.append(dataclasses.replace(rewrite, stats=self.stats))
        program.shared = shared
        diagnostics = Diagnostics()
        for _, joint in program.lowered.values():
            rewrite(joint, False)
            result: PsgResult = joint.notes["psg"]
            for target in result.predicted:
                diagnostics.info("E2P410", target, "weight gradient replaced by a predicted sign")
            for target in result.signed:
                diagnostics.info("E2P412", target, "gradient replaced by the sign of itself (PSG.also)")
            for target, reason in result.left.items():
                diagnostics.info("E2P411", target, f"keeps its full gradient: {reason}")
        return PassResult(program, bool(program.lowered), diagnostics)


def _uses(program: Program, excluded: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Weights that several regions use, by every name they go by; and why others must keep their full gradient."""
    canonical = parameter_names(program.model)
    products: dict[str, set[str]] = {}
    others: dict[str, set[str]] = {}
    for name, (before, after_) in program.lowered.items():
        exact = after_.notes.get("full_precision", {})
        for gradient in weight_gradients(before):
            by_products = gradient.products and not any(source_product(p).name in exact for p in gradient.products)
            (products if by_products else others).setdefault(canonical[gradient.target], set()).add(name)
    for region in program.plans["train"].regions:
        if region.name not in program.lowered:  # runs as it is, so its parameters get plain gradients there
            for parameter in region_parameters(region, program.model):
                others.setdefault(canonical[parameter], set()).add(region.name)
    full = {}
    for alias, owner in canonical.items():
        if alias in excluded:
            full[alias] = "PSG.exclude names it"
        elif owner in products and owner in others:
            full[alias] = "another use of it is not a product, so all of it keeps full precision"
        elif len(others.get(owner, ())) > 1:
            full[alias] = "several regions use it, and not in products"
    shared = {alias: owner for alias, owner in canonical.items() if len(products.get(owner, ())) > 1}
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
        self.high: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.rebuilt: dict[fx.Node, fx.Node] = {}

    def predict_products(self, products: set[fx.Node]) -> None:
        """Give every product its predictor, in graph order, so that shared operands precede all their uses."""
        for node in sorted(products):
            with after(self.graph, node):
                self.rebuilt[node] = self._predicted_product(node)

    def predict(self, gradient: WeightGradient) -> fx.Node:
        """Rebuild the gradient's path from its products' predictors."""
        return rebuild(self.graph, gradient, self.rebuilt, "psg.predict")

    def _predicted_product(self, node: fx.Node) -> fx.Node:
        product = source_product(node)
        args = list(product.args)
        operands: dict[int, Codes] = product.meta["e2_operands"]
        with self.graph.inserting_before(product):
            for index, codes in operands.items():
                value = self._most_significant(codes, product)[0]
                args[index] = replay(self.graph, value, layout_chain(product.args[index])[1])  # type: ignore[arg-type]
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

    def _most_significant(self, codes: Codes, product: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What the predictor sees of an operand, and the scale of its codes."""
        gradient = codes.codes.args[0].meta["e2_tag"] == f"bits.{Role.GY}"  # type: ignore[union-attr]
        keep = min(self.psg.gy_bits if gradient else self.psg.x_bits, codes.bits)
        if codes.codes not in self.high:
            mode = () if self.psg.msb == "round" else (self.psg.msb,)
            node = tagged(
                self.graph, e2.msb.default, codes.codes, codes.scale, codes.bits, keep, *mode,
                like=product, tag="psg.msb", technique=Technique.PSG, phase=Phase.BACKWARD,
            )  # fmt: skip
            high, scale = unpack(self.graph, node, (keep, None))
            value = tagged(
                self.graph, e2.dequantize.default, high, scale,
                like=product, tag="psg.msb", technique=Technique.PSG, bits=keep, phase=Phase.BACKWARD,
            )  # fmt: skip
            self.high[codes.codes] = (value, scale)
        return self.high[codes.codes]

    def _insert(self, like: fx.Node, target: object, *args: object, tag: str) -> fx.Node:
        with after(self.graph, max(n for n in (like, *args) if isinstance(n, fx.Node))):
            return tagged(
                self.graph, target, *args, like=like, tag=tag, technique=Technique.PSG, phase=Phase.BACKWARD
            )  # fmt: skip

    def update(self, gradient: WeightGradient, predicted: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Threshold, select, sign and scale of one weight; returns the threshold and the update."""
        full, psg = gradient.value, self.psg
        if psg.tau is None:
            tau = self._insert(full, e2.threshold.default, predicted, psg.beta, tag="psg.threshold")
        else:
            tau = self._insert(full, e2.fixed_threshold.default, predicted, psg.tau, tag="psg.threshold")
        if psg.sparsify:
            chosen = self._insert(full, e2.sparsify.default, predicted, tau, tag="psg.select")
        else:
            chosen = self._insert(full, e2.select.default, predicted, full, tau, tag="psg.select")
        return tau, self.sign(chosen, predicted, full) if psg.sign else chosen

    def sign(self, chosen: fx.Node, magnitude: fx.Node, like: fx.Node) -> fx.Node:
        """Signs of ``chosen``, times the mean absolute ``magnitude`` where that is the scale."""
        update = self._insert(like, e2.sign.default, chosen, tag="psg.sign")
        if self.psg.scale == "mean":
            size = self._insert(like, aten.abs.default, magnitude, tag="psg.scale")
            mean = self._insert(like, aten.mean.default, size, tag="psg.scale")
            update = self._insert(like, aten.mul.Tensor, update, mean, tag="psg.scale")
        return update

    def count(self, gradient: WeightGradient, predicted: fx.Node, tau: fx.Node) -> fx.Node:
        """Statistics of one weight's selection."""
        variance = self._variance(gradient) if self.psg.bound else None
        full = gradient.value
        return self._insert(full, e2.agreement.default, predicted, full, tau, variance, tag="psg.stats")

    def _variance(self, gradient: WeightGradient) -> fx.Node:
        steps: dict[fx.Node, dict[int, fx.Node | None]] = {}
        for node in gradient.products:
            product = source_product(node)
            operands: dict[int, Codes] = product.meta["e2_operands"]
            steps[node] = {i: self._step(c, product) for i, c in operands.items()}
        return error_variance(self.graph, gradient, steps)

    def _step(self, codes: Codes, product: fx.Node) -> fx.Node | None:
        """What one unit of the codes that the predictor sees is worth; None where it sees them whole."""
        value, scale = self._most_significant(codes, product)
        return None if value.meta["e2_bits"] == codes.bits else scale
