"""The body of a block: the single-exit region behind the operands of a join, which a closed gate does not run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from e2pass.passes.residual.activation_dag import ActivationDag
from e2pass.passes.residual.operators import Kind


@dataclass(frozen=True)
class Body:
    """A region that can be left out.

    Attributes:
        nodes: All its nodes in execution order; besides activations the parameters, sizes and random masks that
            nothing else uses.
        side_inputs: What it reads from outside, other than the fork, in execution order.
    """

    nodes: tuple[int, ...]
    side_inputs: tuple[int, ...]


_STEPS_TO_OUTPUT = 32


class NoBodyError(Exception):
    """The operands have no removable region behind them; the message is the reason, fit for a user."""


def extract(dag: ActivationDag, fork: int, shortcut: int, joins: Collection[int], arms: Collection[int]) -> Body:
    """Return the body between ``fork`` and ``arms``.

    A node belongs to it if it depends on the fork and everything that needs its value belongs to the body or to the
    addition tree.

    Raises:
        NoBodyError: If an operand does not depend on the fork, or a value of the body is used elsewhere too.
    """
    barred = {fork, shortcut}
    while True:
        core = _single_exit(dag, fork, barred, joins)
        members = _descendants(dag, fork, core)
        strangers = {n for n in core if n not in members}
        if not strangers:
            break
        barred |= strangers
    for arm in arms:
        if arm not in core:
            raise NoBodyError(_why_not(dag, fork, arm, joins))
    core |= _useless(dag, core)
    core |= _counters(dag, core)
    outside = {p for n in core for p in dag.inputs[n] if p not in core and p != fork}
    return Body(tuple(sorted(core)), tuple(sorted(outside)))


def _single_exit(dag: ActivationDag, fork: int, barred: Collection[int], joins: Collection[int]) -> set[int]:
    """Return the nodes above the fork whose every user is among them or among the additions."""
    core: set[int] = set()
    missing: dict[int, int] = {}
    stack = list(joins)
    while stack:
        for p in dag.inputs[stack.pop()]:
            if p in barred or p in joins or dag.nodes[p].op == "placeholder" or (dag.activation[p] and p < fork):
                continue
            missing[p] = missing.get(p, len(dag.live_users(p))) - 1
            if missing[p] == 0:
                core.add(p)
                stack.append(p)
    return core


def _descendants(dag: ActivationDag, fork: int, core: set[int]) -> set[int]:
    """Return what of ``core`` depends on the fork, and the constants and sizes that go with it.

    Raises:
        NoBodyError: If a layer between the fork and the core is used elsewhere too.
    """
    frontier = {p for n in core for p in dag.before[n] if p > fork and p not in core}
    derived = _derived(dag, fork, frontier, core) if frontier else set[int]()
    members: set[int] = set()
    for n in sorted(core):
        if dag.activation[n]:
            belongs = any(p == fork or p in members or p in derived for p in dag.before[n])
        else:
            belongs = all(p == fork or p in members or not dag.activation[p] for p in dag.inputs[n])
        if belongs:
            members.add(n)
    return members


def _derived(dag: ActivationDag, fork: int, frontier: set[int], core: set[int]) -> set[int]:
    """Return which values outside the core depend on the fork, all of them through operations without weights."""
    between = dag.between(fork, frontier)
    for n in sorted(between):
        if dag.weighted[n]:
            leak = next(p for p in sorted(between & frontier) if p >= n)
            raise NoBodyError(
                f"a value ({dag.name(leak)}) that layers between the fork ({dag.name(fork)}) and the sum compute also "
                f"goes to {_destination(dag, leak, core)}: the body has another exit"
            )
    return between & frontier


def _destination(dag: ActivationDag, leak: int, inside: Collection[int]) -> str:
    """Return where a value goes besides ``inside``: to the model's output if few steps lead there."""
    readers = [u for u in dag.live_users(leak) if u not in inside]
    queue = list(readers)
    for n in queue:
        if dag.nodes[n].op == "output":
            return "the output of the model (a cache that can be switched off?)"
        if len(queue) < _STEPS_TO_OUTPUT:
            queue.extend(u for u in dag.live_users(n) if u not in inside and u not in queue)
    return dag.name(readers[0]) if readers else "another path"


def _why_not(dag: ActivationDag, fork: int, arm: int, joins: Collection[int]) -> str:
    if not dag.reaches(fork, [arm]):
        return f"an operand ({dag.name(arm)}) does not come from the fork ({dag.name(fork)}) of the other ones"
    return f"the operand {dag.name(arm)} also goes to {_destination(dag, arm, joins)}: the body has another exit"


def _useless(dag: ActivationDag, core: set[int]) -> set[int]:
    """Return unneeded nodes and checks that read values of the body: they cannot run without it."""
    found: set[int] = set()
    stack = list(core)
    while stack:
        for user in dag.users[stack.pop()]:
            if not dag.live[user] and user not in found and user not in core:
                found.add(user)
                stack.append(user)
    return found


def _counters(dag: ActivationDag, core: set[int]) -> set[int]:
    """Return the nodes that count the batches which the body's batch norms have seen.

    An exported graph updates ``num_batches_tracked`` by a node that nothing reads. Where a module runs more than once,
    each update reads the one before, in other bodies; they are left outside.
    """
    found: set[int] = set()
    for n in core:
        if dag.kind[n] is not Kind.BATCH_NORM or dag.nodes[n].op != "call_function":
            continue
        owners = {dag.owner(p) for p in dag.inputs[n] if dag.nodes[p].op == "get_attr"}
        found.update(counter for owner in owners for counter in dag.counters.get(owner, ()))
    found.update(p for n in tuple(found) for p in dag.inputs[n] if all(u in found for u in dag.users[p]))
    return found
