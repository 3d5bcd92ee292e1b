"""Frozen quantizers as ``QuantizeLinear`` and ``DequantizeLinear``, weights stored as their integer codes.

This is the form that runtimes and accelerators recognise. What is not frozen stays a function: an activation that no
training step has seen, and codes of more than 8 bits, which these operators have not in this opset. So does the
decoding of weights that meet such an activation as they lie.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
from numpy.typing import NDArray

from e2pass.backends.onnx_export.files import unique_names
from e2pass.backends.onnx_export.functions import DOMAIN, OPSET, add_functions

Array = NDArray[np.generic]


def to_qdq(model: ir.Model) -> None:
    """Rewrite every frozen quantizer of 8 bits or fewer, branches included."""
    encoders = [n for n in _nodes(model, "Encode") if n.attributes["to"].as_int() == ir.DataType.INT8]
    weights = [n for n in encoders if _is_constant(n.inputs[0])]
    frozen = [n for n in encoders if n not in weights and _frozen_scale(n) is not None]
    if not weights and not frozen:
        return
    unique_names(model)
    wanted = [v for n in weights for v in (n.outputs[0], n.inputs[1])] + [_frozen_scale(n) for n in frozen]
    found = _evaluate([v for v in wanted if v is not None])
    for node in frozen:
        running = _frozen_scale(node)
        assert running is not None
        if found[running] != 0:  # a running scale of 0: no training step has seen this activation
            _quantize_by(model, node, found[running])
    for node in weights:
        assert node.inputs[0] is not None
        assert node.inputs[1] is not None
        name = node.inputs[0].name
        codes = _initializer(model, f"{name}.codes", found[node.outputs[0]])
        _decode_by(node, codes, f"{name}.scale", found[node.inputs[1]], model)


def _nodes(model: ir.Model, kind: str) -> Iterable[ir.Node]:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == DOMAIN and node.op_type == kind:
            yield node


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and not value.is_graph_input()


def _frozen_scale(encoder: ir.Node) -> ir.Value | None:
    """The running scale that an activation's quantizer uses; None for one with a scale of its own."""
    scale = encoder.inputs[1]
    producer = scale.producer() if scale is not None else None
    return producer.inputs[1] if producer is not None and producer.op_type == "RunningScale" else None


def _evaluate(values: list[ir.Value]) -> dict[ir.Value, Array]:
    """Compute values that depend on weights alone."""
    order: dict[ir.Node, None] = {}
    constants: dict[str, onnx.TensorProto] = {}

    def visit(value: ir.Value) -> None:
        producer = value.producer()
        if producer is None:
            assert value.const_value is not None
            assert value.name is not None
            constants[value.name] = onnx.numpy_helper.from_array(value.const_value.numpy(), value.name)
        elif producer not in order:
            for operand in producer.inputs:
                if operand is not None:
                    visit(operand)
            order[producer] = None

    for value in values:
        visit(value)
    computed = [v for v in dict.fromkeys(values) if v.producer() is not None]
    outputs = [onnx.helper.make_empty_tensor_value_info(str(v.name)) for v in computed]
    nodes = [ir.serde.serialize_node(n) for n in order]
    graph = onnx.helper.make_graph(nodes, "constants", [], outputs, list(constants.values()))
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)]
    small = ir.serde.deserialize_model(onnx.helper.make_model(graph, opset_imports=opsets))
    add_functions(small)
    results = onnx.reference.ReferenceEvaluator(ir.serde.serialize_model(small)).run(None, {})
    known = dict(zip(computed, results, strict=True))
    return {v: known[v] if v in known else v.const_value.numpy() for v in values}  # type: ignore[union-attr]


def _initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.asarray(array), name=name)
        model.graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return model.graph.initializers[name]


def _axis_form(scale: Array) -> tuple[Array, int | None]:
    """From a scale that broadcasts over the codes to a list along one axis, or to one number."""
    axes = [d for d, size in enumerate(scale.shape) if size != 1]
    assert len(axes) <= 1
    return (scale.reshape(-1), axes[0]) if axes else (scale.reshape(()), None)


def _decode_by(encoder: ir.Node, codes: ir.Value, name: str, scale: Array, model: ir.Model) -> None:
    users = [user for user, _ in encoder.outputs[0].uses()]
    assert all(user.op_type == "Dequantize" for user in users)
    if any(_is_half_quantized(user.outputs[0]) for user in users):
        held = _initializer(model, name, scale)
        for user in users:
            user.replace_input_with(0, codes)
            user.replace_input_with(1, held)
        return
    flat, axis = _axis_form(scale)
    held = _initializer(model, name, flat)
    for user in users:
        _replace(user, ir.node("DequantizeLinear", [codes, held], {} if axis is None else {"axis": axis}))


def _is_half_quantized(weight: ir.Value) -> bool:
    """Whether a product takes the weight as it lies, and other operands that are no codes.

    onnxruntime takes ``DequantizeLinear`` in front of such a product for weight-only quantization: it rounds the other
    operand to codes of its own (``MatMulNBits``), and inside a branch it does not find the weight and gives up.
    """
    products = [n for n, position in weight.uses() if n.op_type in ("MatMul", "Gemm") and position == 1]
    return any(not _is_decoded(n.inputs[0]) for n in products if not _transposes(n))


def _is_decoded(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type == "Reshape":  # which onnxruntime moves in front of the codes
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _transposes(product: ir.Node) -> bool:
    attribute = product.attributes.get("transB")
    return attribute is not None and attribute.as_int() != 0


def _quantize_by(model: ir.Model, encoder: ir.Node, scale: Array) -> None:
    (x, old), limit = encoder.inputs, encoder.attributes["limit"].as_float()
    assert old is not None
    assert x is not None
    one = np.asarray(scale, np.float32)
    held = _initializer(model, f"{old.name}.frozen", one)
    most = _initializer(model, f"{old.name}.most", np.float32(limit) * one)
    least = _initializer(model, f"{old.name}.least", -np.float32(limit) * one)
    zero = _initializer(model, "e2pass.zero_point", np.zeros((), np.int8))
    kept = ir.node("Clip", [x, least, most])  # the codes are symmetric, those of QuantizeLinear reach one lower
    codes = ir.node("QuantizeLinear", [kept.outputs[0], held, zero])
    assert encoder.graph is not None
    encoder.graph.insert_before(encoder, [kept])
    readers = [user for user, _ in encoder.outputs[0].uses()]
    _replace(encoder, codes)
    for user in readers:
        if user.op_type == "Dequantize" and user.domain == DOMAIN:
            _replace(user, ir.node("DequantizeLinear", [codes.outputs[0], held, zero]))


def _replace(old: ir.Node, new: ir.Node) -> None:
    assert old.graph is not None
    old.graph.insert_before(old, [new])
    new.outputs[0].type, new.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    old.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    old.graph.remove(old, safe=True)
