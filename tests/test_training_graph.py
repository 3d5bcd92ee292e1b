"""The training step as one graph: complete, linked across regions, annotated, filtered."""

from __future__ import annotations

from collections import Counter
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

import e2pass
from e2pass import SLU, Config
from e2pass.cost import Phase
from e2pass.errors import InputError
from e2pass.step.edges import EdgeKind
from e2pass.step.graph import TrainingGraph
from e2pass.transformed import Transformed
from tests.zoo import ZOO, Residual, vector_net, vector_residual


def small() -> Transformed:
    return e2pass.transform(vector_net(vector_residual(16), vector_residual(16)), torch.zeros(4, 12), [None, None])


@pytest.fixture(scope="module")
def transformed() -> Transformed:
    return small()


@pytest.fixture(scope="module")
def graph(transformed: Transformed) -> TrainingGraph:
    return transformed.graph


def ancestors(graph: TrainingGraph, name: str) -> set[str]:
    return nx.ancestors(graph.to_networkx(), name)  # type: ignore[no-any-return]


def test_the_step_is_one_graph_in_an_order_that_runs(graph: TrainingGraph) -> None:
    network = graph.to_networkx()
    assert list(network) == [node.name for node in graph.nodes]
    assert nx.is_weakly_connected(network)
    order = {name: i for i, name in enumerate(network)}
    assert all(order[edge.source] < order[edge.target] for edge in graph.edges)
    phases = [node.site.phase for node in graph.nodes]
    assert phases[0] is Phase.DATA
    assert phases[-1] is Phase.UPDATE
    assert set(phases) == set(Phase)
    assert {edge.kind for edge in graph.edges} == set(EdgeKind)


def test_nothing_floats(graph: TrainingGraph) -> None:
    """Everything but SMD's decision and what only parameters go into has a source, in the batch in the end."""
    network = graph.to_networkx()
    sources = [graph[name] for name in network if not network.pred[name]]
    assert sources[0].name == "data/smd-drop"
    assert all(node.state for node in sources[1:])


@pytest.mark.parametrize("name", ["0.weight", "1.body.1.weight", "2.body.3.weight", "3.weight", "3.bias"])
def test_an_update_depends_on_the_whole_step(graph: TrainingGraph, name: str) -> None:
    above = ancestors(graph, f"update/{name}")
    assert {"data/smd-drop", "data/input_1", "data/loss-target", "merge/slu_merge_0", "merge/slu_merge_1"} <= above
    assert {graph[n].site.region for n in above} >= {"loss", "gate_0", "gate_1", "trunk_0", "trunk_1"}
    assert sum(n.startswith("update/") for n in above) == 0


def test_gradients_pass_a_module_that_could_not_be_lowered() -> None:
    """Its backward half is one operation without a price, which every gradient before it depends on."""
    model, inputs = ZOO["untraceable"].make()
    t = e2pass.transform(model, inputs, config="slu")
    network = t.graph.to_networkx()
    (backward,) = [node.name for node in t.graph.nodes if node.site.op == "opaque.backward"]
    assert backward in {op.name for op in t.graph.price.unpriced}
    after = nx.descendants(network, backward)
    assert {"update/0.0.0.weight", "update/1.body.0.0.weight", "update/2.scale"} <= after
    assert not {"update/3.body.0.0.weight", "update/4.2.weight"} & after
    before = nx.ancestors(network, backward)
    assert {"merge/slu_merge_1", "loss/nll_loss_forward"} <= before
    assert all(network.pred[node.name] for node in t.graph.nodes if node.site.phase is Phase.UPDATE)
    order = {name: i for i, name in enumerate(network)}
    assert all(order[edge.source] < order[edge.target] for edge in t.graph.edges)


def test_values_and_gradients_pass_the_blocks_in_opposite_order(graph: TrainingGraph) -> None:
    network = graph.to_networkx()
    forward = network.subgraph([n.name for n in graph.nodes if n.in_forward])
    backward = network.subgraph([n.name for n in graph.nodes if not n.in_forward])
    assert nx.has_path(forward, "data/input_1", "merge/slu_merge_1")
    assert nx.has_path(forward, "merge/slu_merge_0", "merge/slu_merge_1")
    sums = [n.name for n in graph.nodes if n.site.region == "gradient_sum"]
    assert len(sums) == 2
    assert nx.has_path(backward, "gradient_sum/slu_merge_0_0", "gradient_sum/_0_0")
    assert not nx.has_path(backward, "gradient_sum/_0_0", "gradient_sum/slu_merge_0_0")
    # Block 2's body does not see the gradient of what it is added to, block 1's does.
    assert "gradient_sum/slu_merge_0_0" not in nx.ancestors(backward, "update/2.body.1.weight")
    assert "gradient_sum/slu_merge_0_0" in nx.ancestors(backward, "update/1.body.1.weight")


def test_the_gates_learn_from_the_gradient_and_decide_about_the_merge(graph: TrainingGraph) -> None:
    decides = [e for e in graph.edges if e.kind is EdgeKind.GATE]
    assert {graph[e.target].site.region for e in decides} == {"merge", "gate_1"}
    worth = graph["merge/slu_merge_1_sum"]
    assert {graph[n].site.region for n in graph.readers(worth.name)} == {"gate_1"}
    assert any(graph[n].site.region == "gate_0" for n in nx.descendants(graph.to_networkx(), worth.name))


class Mixed(nn.Module):
    """Smooth, with residual blocks, two uses of one value and a branch that no loss sees."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.first = Residual(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.second = Residual(nn.Linear(6, 6), nn.Tanh())
        self.side = nn.Linear(6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stem = torch.tanh(self.stem(x))
        first = self.first(stem)
        return self.head(self.second(first) * stem), self.side(first)


def linear_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.sum() + 0.0 * target.sum()


@pytest.fixture(scope="module")
def mixed() -> tuple[Mixed, torch.Tensor, TrainingGraph]:
    """A neutral transformation: gates, all of them open, and nothing else."""
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(3, 5)
    config = Config(smd=None, slu=SLU(gate="open"), psg=None, bits=None)
    return model, x, e2pass.transform(model, x, config=config, loss=linear_loss).graph


def test_who_depends_on_whom_is_what_perturbation_says(mixed: tuple[Mixed, torch.Tensor, TrainingGraph]) -> None:
    """The gradient of p changes with parameter q if and only if a path leads from a reader of q to the update of p.

    The loss is linear, so the head's gradient does not depend on the head, nor the last block's on all of itself.
    """
    model, x, graph = mixed
    sizes = {n.name for n in graph.nodes if n.site.op == "aten.sym_size.int"}  # depend on shapes, not on values
    network = nx.restricted_view(graph.to_networkx(), sizes, [])
    names = [name for name, _ in model.named_parameters() if not name.startswith("side.")]

    def gradients() -> dict[str, torch.Tensor]:
        output, _ = model(x)
        return dict(zip(names, torch.autograd.grad(output.sum(), [model.get_parameter(n) for n in names]), strict=True))

    before = gradients()
    for q in names:
        parameter = model.get_parameter(q)
        saved = parameter.detach().clone()
        parameter.data.add_(torch.randn_like(saved))
        after = gradients()
        parameter.data.copy_(saved)
        numeric = {p for p in names if not torch.equal(before[p], after[p])}
        structural = {p for p in names if any(q in graph[n].state for n in nx.ancestors(network, f"update/{p}"))}
        assert structural == numeric, q


def test_a_shared_weight_is_signed_once_behind_the_sums_over_its_uses() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(
        nn.Linear(5, 6), Residual(shared, nn.Tanh()), Residual(shared, nn.Tanh()), nn.Linear(6, 3)
    )  # fmt: skip
    graph = e2pass.transform(model, torch.randn(4, 5)).graph
    (signed,) = graph["update/1.body.0.weight"].operands
    above = nx.ancestors(graph.to_networkx(), signed)
    assert {n for n in above if n.startswith("weight_sum/")} == {
        n.name for n in graph.nodes if n.name.startswith("weight_sum/1.body.0.weight_") and n.name != signed
    }
    assert sum(n.site.op.endswith(".sign.default") for n in graph.select(path="1.body.0").nodes) == 1
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    assert all(order[edge.source] < order[edge.target] for edge in graph.edges)
    bodies = {graph[n].site.region for n in above}
    assert {"body_1_body_0", "body_1_body_0#2"} <= bodies


def test_every_node_says_where_it_comes_from(graph: TrainingGraph) -> None:
    assert {node.made_by for node in graph.nodes} == {
        "capture", "drop-batches", "insert-gates", "lower", "outline", "predict-signs", "price", "quantize",
    }  # fmt: skip
    for node in graph.nodes:
        assert len(node.dtypes) == len(node.outputs), node.name
        if node.site.region.startswith(("trunk_", "body_")):
            assert node.site.layer, node.name
    assert all(n.made_by == "quantize" for n in graph.tagged("bits"))
    assert all(n.made_by == "predict-signs" for n in graph.tagged("psg") if n.tag != "psg.full")
    assert all(n.made_by == "lower" for n in graph.tagged("psg.full"))


def test_true_widths_are_not_the_stored_ones(graph: TrainingGraph) -> None:
    high = [n for n in graph.tagged("psg.msb") if n.site.op == "e2pass.msb.default"]
    assert {(n.dtypes[0], n.outputs[0].bits) for n in high} == {("i8", 4), ("i16", 10)}
    codes = [n for n in graph.tagged("bits") if n.site.op == "e2pass.quantize.default"]
    assert {(n.dtypes[0], n.outputs[0].bits) for n in codes} == {("i8", 8), ("i16", 16)}


def _own_line(graph: TrainingGraph, path: str) -> set[str]:
    return {n.line for n in graph.select(path=path).nodes if n.site.phase is not Phase.UPDATE}


def test_lines_are_those_of_the_users_code(mixed: tuple[Mixed, torch.Tensor, TrainingGraph]) -> None:
    first, graph = Mixed.forward.__code__.co_firstlineno, mixed[2]
    assert _own_line(graph, "stem") == {f"test_training_graph.py:{first + 1}"}  # forward and backward alike
    assert _own_line(graph, "head") == {f"test_training_graph.py:{first + 3}"}
    assert graph["update/head.weight"].line == ""


def test_lines_survive_torch_export() -> None:
    class Sized(Mixed):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            for _ in range(int(x.dim()) - 1):  # torch.fx cannot iterate over this
                x = x * 1.5
            return super().forward(x)

    t = e2pass.transform(Sized(), torch.randn(3, 5), config="8bit")
    assert "captured by export" in str(t.diagnostics)
    first = Mixed.forward.__code__.co_firstlineno
    assert _own_line(t.graph, "stem") == {f"test_training_graph.py:{first + 1}"}


def test_a_model_of_torchs_own_modules_has_no_lines(graph: TrainingGraph) -> None:
    assert {n.line for n in graph.nodes if n.site.layer == "0"} == {""}


def test_expected_executions(transformed: Transformed, graph: TrainingGraph) -> None:
    """Half of the batches are dropped; of the others 40 % of the samples skip a gated block: 0.5 * 0.6."""
    assert {block.name for block in transformed.blocks if block.gated}
    products = [
        n for n in graph.nodes if n.site.phase is Phase.FORWARD and n.site.op.startswith(("aten.mm", "aten.addmm"))
    ]
    inside = [n.probability(graph.rates) for n in products if n.site.region.startswith("body_")]
    outside = [n.probability(graph.rates) for n in products if n.site.region.startswith("trunk_")]
    assert inside == pytest.approx([0.3] * 4)  # two layers in each of two blocks
    assert outside == pytest.approx([0.5] * 2)  # the first layer and the last
    assert graph["data/smd-drop"].probability(graph.rates) == 1.0
    assert graph["data/input_1"].probability(graph.rates) == 0.5


def test_costs_are_those_of_the_report(transformed: Transformed, graph: TrainingGraph) -> None:
    report = transformed.report()
    assert report.transformed is not None
    assert sum(row.total_j for row in graph.costs.values()) == pytest.approx(report.transformed.energy_j)
    assert sum(row.total_j for row in graph.original.costs.values()) == pytest.approx(report.baseline.energy_j)
    named = {node.name for node in graph.nodes}
    assert set(graph.costs) | set(graph.without_cost) == named
    assert not set(graph.costs) & set(graph.without_cost)


def test_tagged_finds_what_a_technique_inserted(graph: TrainingGraph) -> None:
    psg = list(graph.tagged("psg"))
    assert psg
    # The full weight gradient is the model's own operation; PSG marks it, because it runs only where needed.
    assert {node.tag for node in psg if node.site.technique != "psg"} == {"psg.full"}
    assert len([n for n in psg if n.tag == "psg.sign"]) == 6  # one for each weight matrix
    assert list(graph.tagged("no such technique")) == []


def test_forward_and_backward_are_graph_modules_of_each_region(graph: TrainingGraph) -> None:
    assert set(graph.forward) == set(graph.backward)
    names = {node.site.region for node in graph.nodes}
    assert set(graph.forward) <= names
    for region, half in graph.forward.items():
        ours = {n.name for n in graph.nodes if n.site.region == region}
        ahead = {f"{region}/{n.name}" for n in half.graph.nodes if n.op == "call_function"}
        behind = {f"{region}/{n.name}" for n in graph.backward[region].graph.nodes if n.op == "call_function"}
        assert ahead | behind == ours
        assert ahead == {n.name for n in graph.nodes if n.site.region == region and n.in_forward}


def test_filters(graph: TrainingGraph) -> None:
    block = graph.select(block="1.body")
    assert {n.site.block for n in block.nodes} == {"1.body"}
    assert {e.source for e in block.edges} <= {n.name for n in block.nodes}
    assert set(block.costs) <= {n.name for n in block.nodes}
    both = graph.select(path="1", tag="psg", phase="dw")
    assert all(n.tag.startswith("psg.") and n.site.layer.startswith("1.") for n in both.nodes)
    assert Counter(n.tag for n in graph.select(tag="psg.sign").nodes) == {"psg.sign": 6}
    assert len(graph.select(region="loss")) + len(graph.select(technique="psg")) < len(graph)
    assert len(graph.select()) == len(graph)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"block": "nope"}, "the graph has no block 'nope'; it has 1.body, 2.body"),
        ({"path": "1.bod"}, "the graph has no path '1.bod'; it has"),
        ({"region": "loss", "tag": "psg"}, "no node with region='loss', tag='psg'; each of them alone does fit some"),
    ],
)
def test_a_filter_that_fits_nothing_says_what_there_is(graph: TrainingGraph, filters: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        graph.select(**filters)
    assert message in str(error.value)


def test_an_unknown_node_gets_similar_names(graph: TrainingGraph) -> None:
    with pytest.raises(InputError, match=r"no node 'trunk_0/adm'; similar names are .*trunk_0/addmm"):
        graph["trunk_0/adm"]


def test_diff_of_the_techniques_one_by_one(transformed: Transformed, graph: TrainingGraph) -> None:
    changes = graph.diff()
    assert {n.site.op for n in changes.removed} == {"aten.t.default"}  # weights turn around after they are quantized
    assert len(changes.added) + len(changes.replaced) + changes.kept == len(graph)
    made_by = {n.made_by for n in changes.added if n.site.phase is not Phase.UPDATE}  # the gates' own updates
    assert made_by == {"drop-batches", "insert-gates", "quantize", "predict-signs"}
    counts = {(change, what): n for change, what, n in changes.summary()}
    assert counts["added", "psg.sign"] == 6
    assert counts["added", "smd.drop"] == 1
    update = next(r for r in changes.replaced if r.after.name == "update/0.weight")
    assert update.changes == ("reads %trunk_0/mul_tensor instead of %trunk_0/t_3",)
    text = changes.to_text()
    assert "+ %data/smd-drop = e2pass.smd.drop {smd.drop}\n" in text
    assert "~ %update/0.weight: reads %trunk_0/mul_tensor instead of %trunk_0/t_3\n" in text
    back = e2pass.diff(graph, graph.original)
    assert [n.name for n in back.removed] == [n.name for n in changes.added]
    assert [n.name for n in back.added] == [n.name for n in changes.removed]


def test_diff_of_neutral_is_gates_only(mixed: tuple[Mixed, torch.Tensor, TrainingGraph]) -> None:
    model, x, graph = mixed
    neutral = graph.diff()
    assert {n.tag for n in neutral.added} == {"slu.gate", "slu.merge", "update"}
    assert {n.site.technique for n in neutral.added} == {"slu"}
    assert all(n.operands for n in neutral.added if n.tag == "slu.merge"), "open gates are shown as they would learn"
    roots = {n.name for n in graph.nodes if not n.operands and not n.in_forward}
    assert roots == {"trunk_1/sum_1", "trunk_1/t_3"}, "all but the branch that no loss sees read a gradient"
    assert all("gradient=none" in line for line in graph.to_text().splitlines() if line[1:].split(":")[0] in roots)
    assert graph.to_text().count("gradient=none") == len(roots)
    gated = {n for n in neutral.to_text().splitlines() if "gated:" in n}
    assert "~ %update/first.body.0.weight: gated: runs only where gate 0 is open, instead of always" in gated
    assert ("replaced", "gated", len(gated)) in neutral.summary()
    assert "ungated: always runs, instead of only where gate 0 is open" in str(e2pass.diff(graph, graph.original))
    whole, short = neutral.to_text().splitlines(), neutral.to_text(most=2).splitlines()
    assert short[:3] == whole[:3]
    assert short[3] == f"... and {len(neutral.added) - 2} more added"
    assert short[-1] == f"... and {len(neutral.replaced) - 2} more replaced"
    assert len(short) == 1 + 2 * 3
    assert {r.after.gate for r in neutral.replaced} == {0, 1}
    plain = e2pass.transform(model, x, config=Config(smd=None, slu=None, psg=None, bits=None)).graph
    assert plain.diff().empty
    with pytest.raises(InputError, match="has no original"):
        plain.original.diff()
