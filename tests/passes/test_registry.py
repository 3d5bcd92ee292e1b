"""What every registered pass promises: a name, a docstring, refusals, text form, and honesty about its changes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import fx, nn

import e2pass
from e2pass.backends.fpga.model import FpgaCostModel
from e2pass.capture import capture
from e2pass.config import Config
from e2pass.diagnostics import Diagnostics
from e2pass.dump import dump
from e2pass.errors import ConfigError, E2PassError, PassError, VerifyError
from e2pass.inputs import Inputs
from e2pass.passes import registry
from e2pass.passes.base import Pass, PassResult
from e2pass.passes.manager import PassManager
from e2pass.passes.verify import verify
from e2pass.program import Program
from e2pass.step.training_step import TrainingStep
from tests.zoo import Residual, conv_bn, conv_residual, image_net, vector_net

NAMES = tuple(registry.PASSES)


def program(config: Config | None = None, model: nn.Module | None = None, loader: Any = None) -> Program:
    torch.manual_seed(0)
    wide = Residual(conv_bn(8, 16), nn.ReLU(), conv_bn(16, 8))  # so that the two blocks' prices differ
    owner = image_net(conv_residual(8), nn.ReLU(), wide) if model is None else model
    inputs = Inputs.of(torch.randn(4, 3, 8, 8) if model is None else torch.randn(4, 12))
    made = Program.of(owner, inputs, Config() if config is None else config, capture(owner, inputs, Diagnostics()))
    made.loader = loader
    return made


def make(name: str) -> Pass:
    kind = registry.get(name)
    if any(f.name == "step" for f in dataclasses.fields(kind)):
        return kind(step=TrainingStep(FpgaCostModel("zedboard")))  # type: ignore[call-arg]
    return kind()


def before(name: str) -> list[Pass]:
    """The passes that come before ``name`` in the default pipeline."""
    return [make(n) for n in NAMES[: NAMES.index(name)]]


def state(p: Program) -> dict[str, object]:
    """Everything a pass can change, as comparable text."""
    found: dict[str, object] = {f"graph {mode}": dump(gm.graph) for mode, gm in p.unique_graphs()}
    for name, joints in p.lowered.items():
        found.update({f"joint {name} {i}": dump(joint.graph) for i, joint in enumerate(joints)})
    for mode, plan in p.plans.items():
        found[f"plan {mode}"] = [type(s).__name__ for s in plan.steps], [dump(r.graph) for r in plan.regions]
    found["blocks"] = repr([b for mode in p.blocks.values() for b in mode])
    found["loader"] = id(p.loader)
    found["weights"] = None if p.slu is None else p.slu.weight.tolist()
    found["rewrites"] = len(p.rewrites)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_a_frozen_dataclass_with_a_name_and_a_docstring(name: str) -> None:
    kind = registry.get(name)
    assert issubclass(kind, Pass)
    assert not inspect.isabstract(kind)
    assert kind.name == name
    assert kind.__doc__
    assert not kind.__doc__.startswith(f"{kind.__name__}(")  # the dataclass decorator's own text
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    field = next(iter(dataclasses.fields(kind)), None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(make(name), field.name if field else "anything", 1)


def test_every_pass_of_the_package_is_registered() -> None:
    pending, found = [Pass], set()
    for name in NAMES:
        registry.get(name)
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__.startswith("e2pass.passes.") and not inspect.isabstract(kind):
            found.add(kind.name)
    assert found == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_requires_refuses_an_unprepared_program(name: str) -> None:
    p = program()
    p.facts.clear()
    with pytest.raises(PassError) as caught:
        make(name).requires(p)
    message = str(caught.value)
    assert message.startswith(name)
    assert "\n" not in message
    assert all(need in message for need in registry.get(name).needs)


@pytest.mark.parametrize("name", NAMES)
def test_modified_is_honest_and_ensures_holds(name: str) -> None:
    p = program(loader=[torch.zeros(1)] * 4)
    PassManager(before(name)).run(p)
    item, old = make(name), state(p)
    item.requires(p)
    result = item.run(p)
    assert result.program is p
    assert result.modified == (state(p) != old)
    p.facts |= item.establishes
    item.ensures(p)
    verify(p)
    for diagnostic in result.diagnostics:
        assert diagnostic.code.startswith("E2P")
        assert len(diagnostic.code) == 6
        assert diagnostic.message


@pytest.mark.parametrize("name", ["find-residual-blocks", "insert-gates", "drop-batches"])
def test_a_pass_with_nothing_to_do_modifies_nothing(name: str) -> None:
    p = program(model=vector_net(nn.ReLU()))
    PassManager([n for n in before(name) if n.name == "find-residual-blocks"]).run(p)
    old = state(p)
    assert not make(name).run(p).modified
    assert state(p) == old


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("weigh-gates", "price")])
def test_spec_of_the_defaults_is_the_name(name: str) -> None:
    assert make(name).spec() == name
    assert registry.parse(name) == [make(name)]


@pytest.mark.parametrize(
    "text",
    [
        "find-residual-blocks,insert-gates{skip=0.3},outline,lower,quantize{x=4,grad=12},predict-signs{scale=unit}",
        "find-residual-blocks{include=a.b+c,exclude=add_3},insert-gates{gate=random,inject=False,seed=3}",
        "drop-batches{p=0.25,seed=7,coast=True},predict-signs{x-bits=3,gy-bits=8,beta=0.1}",
    ],
)
def test_spec_round_trip(text: str) -> None:
    passes = registry.parse(text)
    assert ",".join(p.spec() for p in passes) == text
    assert registry.parse(",".join(p.spec() for p in passes)) == passes


def test_parse_reads_options_with_their_types() -> None:
    find, gates = registry.parse(" find-residual-blocks{exclude=a+b} , insert-gates{skip=0.2,hidden=4,inject=False}")
    assert find == registry.get("find-residual-blocks")(exclude=("a", "b"))  # type: ignore[call-arg]
    assert gates.options() == {"skip": 0.2, "hidden": 4, "inject": False}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no pass"),
        ("outlin", "find-residual-blocks"),
        ("outline,", "no pass"),
        ("outline lower", "commas"),
        ("insert-gates{skip=0.4", "commas"),
        ("insert-gates{skp=0.4}", "skip"),
        ("insert-gates{skip}", "key=value"),
        ("insert-gates{skip=much}", "float"),
        ("insert-gates{gate=ajar}", "learned"),
        ("drop-batches{coast=1}", "bool"),
        ("price", "Python"),
        ("weigh-gates{step=1}", "Python"),
    ],
)
def test_text_that_is_no_pipeline(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# The manager


@dataclasses.dataclass(frozen=True)
class Raises(Pass):
    """Fails with what it is given."""

    error: BaseException = dataclasses.field(default_factory=RuntimeError)
    name = "fail"

    def run(self, program: Program) -> PassResult:
        raise self.error


@dataclasses.dataclass(frozen=True)
class Breaks(Pass):
    """Breaks the training graph: a node reads one behind it."""

    name = "break"

    def run(self, program: Program) -> PassResult:
        graph = program.graphs["train"].graph
        first, *_, last = (n for n in graph.nodes if n.op in ("call_function", "call_module"))
        first.args = (last,)
        return PassResult(program, True)


@dataclasses.dataclass(frozen=True)
class Promises(Pass):
    """Returns something else than a result."""

    name = "promise"

    def run(self, program: Program) -> PassResult:
        return None  # type: ignore[return-value]


def test_the_manager_names_the_failing_pass_and_those_before() -> None:
    with pytest.raises(PassError, match=r"pass fail \(after find-residual-blocks, outline\) failed: RuntimeError: oh"):
        PassManager([make("find-residual-blocks"), make("outline"), Raises(RuntimeError("oh"))]).run(program())
    with pytest.raises(PassError, match=r"pass insert-gates \(after no other\): insert-gates needs blocks"):
        PassManager([make("insert-gates")]).run(program())


def test_the_manager_passes_the_users_errors_on() -> None:
    with pytest.raises(ConfigError, match=r"^mine$"):
        PassManager([Raises(ConfigError("mine"))]).run(program())
    with pytest.raises(KeyboardInterrupt):
        PassManager([Raises(KeyboardInterrupt())]).run(program())


def test_a_pass_that_returns_something_else_is_named() -> None:
    with pytest.raises(PassError, match=r"promise returned a NoneType"):
        PassManager([Promises()]).run(program())


def test_the_manager_reports_each_pass() -> None:
    seen: list[tuple[str, bool, float]] = []
    passes = [make("find-residual-blocks"), make("insert-gates")]
    PassManager(passes, lambda p, r, s: seen.append((p.name, r.modified, s))).run(program())
    assert [(n, m) for n, m, _ in seen] == [("find-residual-blocks", True), ("insert-gates", True)]
    assert all(s >= 0 for *_, s in seen)


# The verifier


def test_a_graph_in_the_wrong_order_is_caught_and_its_pass_named() -> None:
    with pytest.raises(VerifyError, match=r"pass break \(after find-residual-blocks\): .*malformed"):
        PassManager([make("find-residual-blocks"), Breaks()]).run(program())


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op.startswith("call")]


def test_each_broken_invariant_is_caught() -> None:
    p = program()
    PassManager([make("find-residual-blocks"), make("insert-gates"), make("outline"), make("lower")]).run(p)
    verify(p)
    node = _calls(p.graphs["train"].graph)[0]
    value = node.meta.pop("val")
    with pytest.raises(VerifyError, match=f"node {node.name} of the train graph has no value"):
        verify(p)
    node.meta["val"] = value
    plan = p.plans["train"]
    p.plans["train"] = dataclasses.replace(plan, steps=tuple(reversed(plan.steps)))
    with pytest.raises(VerifyError, match="before it is computed"):
        verify(p)
    p.plans["train"] = plan
    name, joints = next(iter(p.lowered.items()))
    described = joints[1].outputs.pop()
    with pytest.raises(VerifyError, match=f"joint graph of {name} describes"):
        verify(p)
    joints[1].outputs.append(described)
    verify(p)


def test_a_block_whose_node_is_gone_is_caught() -> None:
    p = program()
    PassManager([make("find-residual-blocks")]).run(p)
    p.blocks["train"][0].fork = "no_such_node"
    with pytest.raises(VerifyError, match="no_such_node"):
        verify(p)


def test_verify_error_is_a_pass_error() -> None:
    assert issubclass(VerifyError, PassError)
    assert issubclass(PassError, E2PassError)
    assert e2pass.E2PassError is E2PassError
