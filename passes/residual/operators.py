"""What kind of operation a node is, for ``nn`` modules, functions, tensor methods and ATen operators alike."""

from __future__ import annotations

from enum import StrEnum

from torch import fx, nn
from torch._ops import OpOverload


class Kind(StrEnum):
    """Kinds of operation that the rules tell apart."""

    CONTRACTION = "contraction"  # convolution, linear, matrix product: linear in its first operand
    UP_CONTRACTION = "up-contraction"  # transposed convolution
    BATCH_NORM = "batch norm"  # counted as linear: it is, at inference
    NORM = "norm"  # statistics of the sample itself: not linear
    MOVE = "move"  # reshapes, slices, concatenates, pads: moves values, changes none
    PASS = "pass"  # hands its operand on unchanged
    DROPOUT = "dropout"
    AVG_POOL = "average pool"
    REDUCTION = "reduction"  # mean or sum over dimensions
    MAX_POOL = "max pool"
    RESIZE = "resize"  # interpolation, unpooling, pixel shuffle, grid sampling
    PRODUCT = "product"  # linear while only one operand is an activation
    QUOTIENT = "quotient"
    SUM = "sum"  # linear in all operands
    SHAPE = "shape"  # reads the size, type or device of its operand, not its values
    CHECK = "check"  # an assertion: nothing but itself needs its result
    OPAQUE = "opaque"  # a module that was not traced into
    OTHER = "other"


_MODULES: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Kind], ...] = (
    (nn.modules.conv._ConvTransposeNd, Kind.UP_CONTRACTION),
    ((nn.modules.conv._ConvNd, nn.Linear), Kind.CONTRACTION),
    (nn.modules.batchnorm._BatchNorm, Kind.BATCH_NORM),
    ((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm), Kind.NORM),
    (nn.Identity, Kind.PASS),
    (nn.modules.dropout._DropoutNd, Kind.DROPOUT),
    ((nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd), Kind.AVG_POOL),
    ((nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd), Kind.MAX_POOL),
    ((nn.Upsample, nn.PixelShuffle, nn.modules.pooling._MaxUnpoolNd, nn.Fold), Kind.RESIZE),
    (
        (
            nn.Flatten,
            nn.Unflatten,
            nn.ChannelShuffle,
            nn.PixelUnshuffle,
            nn.ZeroPad2d,
            nn.modules.padding._ConstantPadNd,
            nn.modules.padding._ReflectionPadNd,
            nn.modules.padding._ReplicationPadNd,
        ),
        Kind.MOVE,
    ),
)

_FUNCTIONS: dict[Kind, str] = {
    Kind.CONTRACTION: "conv1d conv2d conv3d convolution linear matmul mm bmm addmm baddbmm einsum",
    Kind.UP_CONTRACTION: "conv_transpose1d conv_transpose2d conv_transpose3d",
    Kind.BATCH_NORM: "batch_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm",
    Kind.NORM: "layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm "
    "local_response_norm",
    Kind.MOVE: "view reshape flatten unflatten permute transpose movedim swapaxes t squeeze unsqueeze expand expand_as "
    "repeat repeat_interleave tile select slice narrow getitem split split_with_sizes chunk unbind tensor_split cat "
    "concat concatenate stack hstack vstack pad _pad constant_pad_nd _unsafe_view view_as reshape_as roll flip "
    "channel_shuffle pixel_unshuffle unfold im2col as_strided index_select rot90 detach",
    Kind.PASS: "contiguous clone alias lift_fresh _to_copy to type_as float half bfloat16 double type requires_grad_ "
    "identity",
    Kind.DROPOUT: "dropout dropout1d dropout2d dropout3d feature_dropout native_dropout alpha_dropout",
    Kind.AVG_POOL: "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "_adaptive_avg_pool2d",
    Kind.REDUCTION: "mean sum",
    Kind.MAX_POOL: "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices "
    "adaptive_max_pool2d_with_indices",
    Kind.RESIZE: "interpolate upsample upsample_bilinear upsample_nearest upsample_nearest1d upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d upsample_nearest3d max_unpool1d "
    "max_unpool2d max_unpool3d pixel_shuffle grid_sample grid_sampler grid_sampler_2d fold col2im",
    Kind.PRODUCT: "mul imul multiply",
    Kind.QUOTIENT: "div truediv itruediv divide true_divide",
    Kind.SUM: "add iadd sub isub neg negative subtract rsub",
    Kind.SHAPE: "size dim numel getattr sym_size sym_numel sym_stride stride new_empty new_zeros new_ones new_full "
    "new_tensor zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli_like "
    "is_floating_point",
    Kind.CHECK: "_assert _assert_async _assert_scalar _assert_tensor_metadata sym_constrain_range "
    "sym_constrain_range_for_size _check _guards_fn",
}
_KIND_OF = {name: kind for kind, names in _FUNCTIONS.items() for name in names.split()}

# An in-place method is spelled with a trailing underscore, and so are most in-place ATen operators.
_INPLACE_OPERATORS = frozenset({"iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior", "setitem"})


def op_name(node: fx.Node) -> str:
    """Return the bare name of the operation: ``conv2d`` for ``F.conv2d`` and ``aten.conv2d.default``.

    A trailing underscore, which marks work in place, is dropped. Attribute reads of ``shape``, ``dtype`` and ``device``
    are called ``getattr``.
    """
    target = node.target
    if isinstance(target, str):
        name = target
    elif isinstance(target, OpOverload):
        name = target.overloadpacket.__name__
    else:
        name = getattr(target, "__name__", str(target))
    return name.strip("_") if _is_dunder(name) else name.rstrip("_")


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def kind_of(node: fx.Node, module: nn.Module | None) -> Kind:
    """Return the kind of a node's operation, ``OTHER`` where it has no special role.

    Args:
        node: Any node.
        module: The module that it runs, None where it is no ``call_module``.
    """
    if module is not None:
        for classes, kind in _MODULES:
            if isinstance(module, classes):
                return kind
        return Kind.OPAQUE if next(module.parameters(), None) is not None else Kind.OTHER
    if node.op not in ("call_function", "call_method"):
        return Kind.OTHER
    name = op_name(node)
    if name == "getattr":
        return Kind.MOVE if node.args[1] in ("T", "mT", "H", "mH", "real", "imag", "data") else Kind.SHAPE
    return _KIND_OF.get(name, Kind.OTHER)


def mutated_operands(node: fx.Node, module: nn.Module | None) -> tuple[fx.Node, ...]:
    """Return the operands that a node changes in place.

    Args:
        node: Any node.
        module: The module that it runs, None where it is no ``call_module``.
    """
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if not isinstance(first, fx.Node):
        return ()
    if node.op == "call_module":
        return (first,) if getattr(module, "inplace", False) is True else ()
    if isinstance(node.target, OpOverload):
        changed = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return (first,) if node.target._schema.arguments[0].name in changed else ()
    if node.op not in ("call_function", "call_method"):
        return ()
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    inplace = op_name(node) in _INPLACE_OPERATORS or node.kwargs.get("inplace") is True
    return (first,) if inplace or (name.endswith("_") and not _is_dunder(name)) else ()


def scale_of(node: fx.Node) -> object:
    """Return ``alpha`` of an addition, 1 where it has none."""
    alpha = node.kwargs.get("alpha", 1)
    if isinstance(node.target, OpOverload) or len(node.args) < 3:
        return alpha
    return node.args[2]
