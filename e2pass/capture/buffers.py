"""Buffers that a model assigns anew, ``self.average = f(self.average)``: in a graph they are written into."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

_CLONE = torch.ops.aten.clone.default
_COPIES = ("copy_", torch.ops.aten.copy_.default)


def replaced(model: nn.Module, before: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, object]]:
    """Find the buffers of ``model`` that are other objects than ``before``, and put those back.

    Args:
        model: The model after a call.
        before: Its buffers before the call, by name.

    Yields:
        Name, buffer, and what it was replaced by.
    """
    for name, buffer in before.items():
        path, _, leaf = name.rpartition(".")
        registered = model.get_submodule(path)._buffers
        value = registered.get(leaf)
        if value is not buffer:
            registered[leaf] = buffer
            yield name, buffer, value


def write_early(graph: fx.Graph) -> None:
    """Move each last write of a buffer to where its value is known, which is in the block that computes it.

    What reads the buffer's old value reads a copy of it then: the write would take from autograd what backward needs.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for write in list(graph.nodes):
        if write.target not in _COPIES or write.op not in ("call_method", "call_function"):
            continue
        buffer, value = write.args[:2]
        if not isinstance(buffer, fx.Node) or not isinstance(value, fx.Node) or buffer.op != "get_attr":
            continue
        holders = list(graph.find_nodes(op="get_attr", target=buffer.target))
        readers = [user for holder in holders for user in holder.users if user is not write]
        if write.users or any(order[user] > order[write] or _writes(user) for user in readers):
            continue
        last = value
        for holder in holders:
            if any(user is not write for user in holder.users):
                with graph.inserting_after(holder):
                    copied = graph.create_node(write.op, "clone" if write.op == "call_method" else _CLONE, (holder,))
                copied.meta = dict(holder.meta)
                order[copied] = order[holder]
                holder.replace_all_uses_with(copied, delete_user_cb=lambda user, c=copied, w=write: user not in (c, w))
                last = copied if order[copied] >= order[last] else last
        if buffer is holders[0]:
            last.append(write)


def _writes(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "_opname", "")
    return node.op != "call_module" and name.endswith("_") and not name.endswith("__")
