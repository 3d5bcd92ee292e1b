"""Low-precision operands: 8-bit activations and weights in the forward half, 16-bit gradients in the backward half.

The quantizers are inserted after autograd has derived the backward half from the unquantized forward, so the
straight-through estimator needs no code of its own. Backward keeps the integer codes, not the tensors they decode to.
"""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from e2pass.config import Bits
from e2pass.cost import Technique
from e2pass.diagnostics import Diagnostics
from e2pass.lowering.joint import Joint
from e2pass.lowering.products import Operand, Product, Role, find_products, output_axis, weight_gradients
from e2pass.parameters import matching
from e2pass.passes.base import Pass, PassResult
from e2pass.passes.bit_true import exceeds, make_bit_true
from e2pass.passes.joint_rewrite import after, e2, replay, tagged, unpack
from e2pass.passes.saved_width import narrow_saved
from e2pass.program import Program

_DEPENDENT = "codes behind it may differ between kernels"


@dataclass(frozen=True)
class Codes:
    """The integer codes of one operand of a product."""

    codes: fx.Node
    scale: fx.Node
    bits: int


@dataclass(frozen=True)
class QuantizeJoint:
    """Rewrites a joint graph so that every layer's products read integer codes.

    Attributes:
        bits: Operand widths, scales and rounding.
        excluded: Weights whose products stay in full precision.
    """

    bits: Bits
    excluded: frozenset[str] = frozenset()

    def __call__(self, joint: Joint, frozen: bool) -> None:
        """Rewrite ``joint`` in place; its notes name the products that are left, and what is not bit-true.

        Args:
            joint: Joint graph as lowered.
            frozen: Activations use the running scales of the owner (evaluation) instead of the batch's own.
        """
        if self.bits.bit_true:
            make_bit_true(joint)
        targets = {p: g.target for g in weight_gradients(joint) for p in _sources(g.products)}
        rewriter = _Rewriter(joint, self.bits, frozen)
        left = joint.notes["full_precision"] = {}
        for product in find_products(joint):
            weights = [*rewriter.weights(product), *filter(None, [targets.get(product.node)])]
            if not weights:
                left[product.node.name] = "product of two activations, without a weight"
            elif self.excluded.intersection(weights):
                left[product.node.name] = f"product of {weights[0]}, which Bits.exclude names"
            else:
                rewriter.rewrite(product)
            if self.bits.bit_true and not product.backward:
                self._note_inexact(joint, product)
        rewriter.finish()
        if not frozen:
            narrow_saved(joint, self.bits.norm_saved, self.bits.bit_true)

    def _note_inexact(self, joint: Joint, product: Product) -> None:
        name = product.node.name
        left = name in joint.notes["full_precision"]
        reason = "a product in fp32" if left else exceeds(product, self.bits.x, self.bits.w)
        if reason is not None:
            joint.notes["order_dependent"][name] = reason


@dataclass(frozen=True)
class Quantize(Pass):
    """Options are those of ``e2pass.Bits``."""

    x: int = 8
    w: int = 8
    grad: int = 16
    norm_saved: int | None = 16
    w_scale: Literal["tensor", "channel"] = "tensor"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0
    bit_true: bool = False
    exclude: tuple[str, ...] = ()

    name: ClassVar[str] = "quantize"
    needs: ClassVar[frozenset[str]] = frozenset({"lowered"})
    establishes: ClassVar[frozenset[str]] = frozenset({"quantized"})

    def run(self, program: Program) -> PassResult:
        """Rewrite every lowered region, and arrange for those lowered later."""
        bits = Bits(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        rewrite = QuantizeJoint(bits, matching(program.model, self.exclude, "Bits.exclude"))
        program.rewrites.append(rewrite)
        diagnostics = Diagnostics()
        for region in program.plans["train"].regions if self.bit_true else ():
            if region.name not in program.lowered:
                diagnostics.info("E2P401", region.name, f"it runs as plain PyTorch: {_DEPENDENT}")
        for name, (_, joint) in program.lowered.items():
            rewrite(joint, False)
            for product, reason in joint.notes["full_precision"].items():
                diagnostics.info("E2P400", f"{name}/{product}", f"{reason}: stays in fp32")
            for node, reason in joint.notes.get("order_dependent", {}).items():
                diagnostics.info("E2P401", f"{name}/{node}", f"{reason}: {_DEPENDENT}")
        return PassResult(program, bool(program.lowered), diagnostics)


def _sources(products: tuple[fx.Node, ...]) -> list[fx.Node]:
    return [p.args[0] if p.target.__name__ == "getitem" else p for p in products]  # type: ignore[misc, union-attr]


class _Rewriter:
    """One quantizer a tensor and role; one dequantized copy for each half, so that only codes cross over."""

    def __init__(self, joint: Joint, bits: Bits, frozen: bool) -> None:
        self.joint, self.bits, self.frozen = joint, bits, frozen
        self.graph = joint.graph
        self.codes: dict[tuple[fx.Node, Role], tuple[fx.Node, fx.Node]] = {}
        self.values: dict[tuple[fx.Node, Role, bool, tuple[fx.Node, ...]], fx.Node] = {}
        self.scales: list[fx.Node] = []
        placeholders = self.graph.find_nodes(op="placeholder")
        self.last_placeholder = placeholders[-1]
        self.names = {n: key for n, (kind, key) in zip(placeholders, joint.inputs, strict=True) if kind == "param"}

    def rewrite(self, product: Product) -> None:
        operands = {}
        for operand in product.operands:
            codes, scale = self._quantize(operand, product)
            value = self._value(operand, product, codes, scale)
            product.node.update_arg(operand.index, value)
            operands[operand.index] = Codes(codes, scale, getattr(self.bits, operand.role))
        product.node.meta["e2_operands"] = operands
        self._replace_shape_only_argument(product)

    def weights(self, product: Product) -> list[str]:
        """Names of the parameters among the operands."""
        return [self.names[o.base] for o in product.operands if o.role is Role.W]

    def _quantize(self, operand: Operand, product: Product) -> tuple[fx.Node, fx.Node]:
        key = (operand.base, operand.role)
        if key not in self.codes:
            bits = getattr(self.bits, operand.role)
            base = operand.base
            op, args = self._quantizer(operand, product)
            with after(self.graph, self.last_placeholder if base.op == "placeholder" else base):
                node = tagged(
                    self.graph, op, base, bits, *args,
                    like=product.node, tag=f"bits.{operand.role}", technique=Technique.BITS,
                )  # fmt: skip
            node.meta["e2_phase"] = None
            with after(self.graph, node):
                pair = unpack(self.graph, node, (bits, None))
            self.codes[key] = pair
            if operand.role is Role.X and not self.frozen:
                self.scales.append(pair[1])
                self.joint.scales.append(self._scale_name(product))
        return self.codes[key]

    def _quantizer(self, operand: Operand, product: Product) -> tuple[Any, tuple[Any, ...]]:
        """The operator for an operand, and its arguments after the tensor and the width."""
        if self.frozen and operand.role is Role.X:
            exact = (True,) if self.bits.bit_true else ()
            return e2.quantize_running.default, (self._running_scale(product), *exact)
        per_channel = operand.role is Role.W and self.bits.w_scale == "channel"
        axis = output_axis(product, operand) if per_channel else None
        if self.bits.rounding == "stochastic" and not self.frozen:
            stream = zlib.crc32(f"{self.bits.seed} {self._scale_name(product)} {operand.role}".encode())
            return e2.quantize_stochastic.default, (axis, self._step(), stream)
        if self.bits.bit_true:
            return e2.quantize.default, (axis, True)
        return e2.quantize.default, () if axis is None else (axis,)

    def _scale_name(self, product: Product) -> str:
        """Name of the quantizer, alike in training and evaluation: the weight it meets first, and which use of it."""
        weight = next((o.base for o in product.operands if o.role is Role.W), None)
        name = self.names[weight] if weight is not None else product.node.name
        uses = sum(held.partition("#")[0] == name for held in self.joint.scales)
        return f"{name}#{uses + 1}" if uses else name

    def _running_scale(self, product: Product) -> fx.Node:
        self.joint.scales.append(self._scale_name(product))
        weight = self.graph.find_nodes(op="placeholder")[0].meta["val"]
        return self._input("scale", self.joint.scales[-1], f"scale_{len(self.joint.scales) - 1}", weight.dtype)

    def _step(self) -> fx.Node:
        """The number of the training step, as an input of the region."""
        held = dict(zip(self.joint.inputs, self.graph.find_nodes(op="placeholder"), strict=True))
        return held.get(("step", "")) or self._input("step", "", "step", torch.int64)

    def _input(self, kind: str, key: str, name: str, dtype: torch.dtype) -> fx.Node:
        """A further 0-d input, before all others."""
        first = self.graph.find_nodes(op="placeholder")[0]
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        like = next(n.meta["val"] for n in self.graph.find_nodes(op="placeholder") if "val" in n.meta)
        with like.fake_mode:
            node.meta["val"] = torch.empty((), dtype=dtype, device=like.device)
        self.joint.inputs.insert(0, (kind, key))
        return node

    def _value(self, operand: Operand, product: Product, codes: fx.Node, scale: fx.Node) -> fx.Node:
        key = (operand.base, operand.role, product.backward, operand.chain)
        if key not in self.values:
            plain = (operand.base, operand.role, product.backward, ())
            with self.graph.inserting_before(product.node):
                if plain not in self.values:
                    bits = getattr(self.bits, operand.role)
                    self.values[plain] = tagged(
                        self.graph,
                        e2.dequantize.default,
                        codes,
                        scale,
                        like=product.node,
                        tag=f"bits.{operand.role}",
                        technique=Technique.BITS,
                        bits=bits,
                    )
                self.values[key] = replay(self.graph, self.values[plain], operand.chain)
        return self.values[key]

    def _replace_shape_only_argument(self, product: Product) -> None:
        """convolution_backward reads its third tensor for the shape alone: keep its codes for that, not the tensor."""
        node = product.node
        if node.target is not torch.ops.aten.convolution_backward.default:
            return
        unused = ({0, 1, 2} - {o.index for o in product.operands}).pop()
        source: Any = node.args[unused]
        for role in (Role.X, Role.W):
            if (source, role) in self.codes:
                operand = Operand(unused, source, (), role)
                node.update_arg(unused, self._value(operand, product, *self.codes[source, role]))

    def finish(self) -> None:
        """Return the activation scales, so that the owner can keep running averages; drop what became dead."""
        outputs, values = list(self.joint.outputs), self.joint.output_nodes()
        for i, scale in enumerate(self.scales):
            values.append(scale)
            outputs.append(("scale", self.joint.scales[i]))
        self.joint.set_outputs(values, outputs)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.joint.graph_module.recompile()
