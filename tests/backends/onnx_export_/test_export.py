from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import e2pass
from e2pass.backends.onnx_export import check_inference, export_inference
from e2pass.errors import ExportError, InputError
from e2pass.transformed import Transformed
from tests.zoo import ZOO, vector_net, vector_residual

TOLERANCE = 1e-5  # of float32 sums in another order, relative to the largest output
BATCHES = (1, 3, 7)


def with_deciding_gates(t: Transformed, inputs: Any) -> None:
    """Make every gate open for about half of ``inputs`` and closed for the others, with scores away from zero."""
    slu = t.model.e2_slu
    assert slu is not None
    slu.price.zero_()
    t.model.eval()
    logits: list[Tensor] = []
    standardise = slu._standardise

    def recording(gate: Any, logit: Tensor, current: Any) -> Tensor:
        logits.append(logit.detach().squeeze(1))
        return standardise(gate, logit, current)

    gates: list[Any] = list(slu.gates)
    for gate in gates:
        gate.logit_var.fill_(1e-4)
        gate.embed.weight.data.normal_(std=2.0)
    with torch.no_grad(), mock.patch.object(slu, "_standardise", recording):
        for index, gate in enumerate(gates):  # in order: each gate sees what the gates before it decided
            logits.clear()
            t.model(*inputs) if isinstance(inputs, tuple) else t.model(**inputs)
            ordered = logits[index].sort().values
            gaps = ordered.diff()
            quarter = len(ordered) // 4
            widest = quarter + int(gaps[quarter : len(gaps) - quarter].argmax())
            gate.logit_mean.copy_((ordered[widest] + ordered[widest + 1]) / 2)


def decisions(t: Transformed, inputs: Any) -> Tensor:
    """Share of samples that each gate opens for."""
    slu = t.model.e2_slu
    assert slu is not None
    slu.reset_statistics()
    with torch.no_grad():
        t.model(*inputs) if isinstance(inputs, tuple) else t.model(**inputs)
    return slu.opened_eval / slu.decided_eval


def transformed_resnet(config: str) -> tuple[Transformed, Tensor]:
    model = e2pass.models.resnet(8)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
    # Samples of very different mean and contrast: gates have something to tell apart.
    samples = torch.randn(24, 3, 32, 32) * torch.linspace(0.2, 2.0, 24).view(-1, 1, 1, 1) + torch.randn(24, 3, 1, 1)
    t = e2pass.transform(model, samples[:4], config=config)
    t.model.train()
    with torch.no_grad():
        for _ in range(2):
            t.model(samples)  # running statistics, and running scales where operands are quantized
    with_deciding_gates(t, (samples,))
    return t, samples


@pytest.fixture(scope="module", params=["slu", "e2train"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Transformed, Tensor, Path]:
    torch.manual_seed(0)
    t, samples = transformed_resnet(request.param)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    assert export_inference(t, samples[:4], path) == path
    return t, samples, path


def run(path: Path, **feeds: Tensor) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: list[np.ndarray[Any, Any]] = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    return found


@pytest.mark.parametrize("batch", BATCHES)
def test_outputs_equal_the_models_that_skips(exported: tuple[Transformed, Tensor, Path], batch: int) -> None:
    t, samples, path = exported
    shares = decisions(t, (samples,))
    assert ((shares > 0) & (shares < 1)).all(), "a gate that decides alike for all samples would prove nothing"
    chosen = samples[torch.randperm(len(samples))[:batch]]
    with torch.no_grad():
        expected = t.model.eval()(chosen)
    (found,) = run(path, x=chosen)
    assert found.shape == (batch, 10)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    assert (found.argmax(1) == expected.numpy().argmax(1)).all()
    assert check_inference(path, t, chosen) <= TOLERANCE


@pytest.mark.parametrize("masked", [False, True], ids=["skipping", "masked"])
def test_bit_true_outputs_are_pytorchs_to_the_bit(masked: bool, tmp_path: Path) -> None:
    t, samples = transformed_resnet("bit-true")
    path = export_inference(t, samples[:4], tmp_path / "model.onnx", masked=masked)
    assert check_inference(path, t, samples) == 0.0
    shares = decisions(t, (samples,))
    assert ((shares > 0) & (shares < 1)).all()


def test_gates_are_part_of_the_file(exported: tuple[Transformed, Tensor, Path]) -> None:
    """Closing all gates in torch gives other outputs than the file: it does not hold the ungated model."""
    t, samples, path = exported
    assert t.model.e2_slu is not None
    for kind in ("open", "closed"):
        t.model.e2_slu.kind = kind
        try:
            assert check_inference(path, t, samples) > 1e-3
        finally:
            t.model.e2_slu.kind = "learned"


def test_weights_keep_their_names(exported: tuple[Transformed, Tensor, Path]) -> None:
    """Quantized ones are stored as integer codes and a scale; what these decode to is within half a step."""
    t, _, path = exported
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    quantized = t.model._executable.config.bits is not None
    layers = {f"{name}.weight" for name, m in t.unwrap().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for name, parameter in t.model.named_parameters():
        if quantized and name in layers:
            codes, scale = stored[f"{name}.codes"], stored[f"{name}.scale"]
            assert codes.dtype == np.int8
            assert name not in stored
            np.testing.assert_allclose(codes * scale, parameter.detach().numpy(), atol=0.501 * float(scale), rtol=0)
        else:
            np.testing.assert_array_equal(stored[name], parameter.detach().numpy())
    assert any(name.startswith("e2_slu.") for name in stored)


def test_file_is_standard_complete_and_silent_about_where_it_was_made(
    exported: tuple[Transformed, Tensor, Path],
) -> None:
    _, _, path = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert not model.functions  # all scales are frozen
    assert [f.name for f in path.parent.iterdir()] == [path.name]  # no weights beside it, nothing temporary
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert os.fsencode(Path(e2pass.__file__).parent) not in path.read_bytes()


def test_the_model_given_is_not_changed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = torch.randn(4, 12)
    t = e2pass.transform(vector_net(vector_residual(16), vector_residual(16)), inputs, config="slu")
    t.model.train()
    before = {k: v.clone() for k, v in t.model.state_dict().items() if isinstance(v, Tensor)}
    random = torch.get_rng_state()
    export_inference(t.model, inputs, str(tmp_path / "m.onnx"))
    check_inference(tmp_path / "m.onnx", t.model, inputs)
    assert t.model.training
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in before.items():
        assert torch.equal(t.model.state_dict()[key], value), key
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    with torch.no_grad():
        next(t.model.parameters()).add_(1.0)
    difference = check_inference(tmp_path / "m.onnx", t, inputs)
    assert math.isfinite(difference)
    assert difference > 0.01  # the check does tell models apart


def test_unseen_scales_are_the_tensors_own(tmp_path: Path) -> None:
    """Never trained: quantizers have no running scale, and an all-zero tensor has none of its own."""
    inputs = torch.randn(4, 12)
    t = e2pass.transform(vector_net(vector_residual(16)), inputs, config="8bit")
    path = export_inference(t, inputs, tmp_path / "m.onnx")
    assert check_inference(path, t, inputs) <= TOLERANCE
    assert check_inference(path, t, torch.zeros(3, 12)) <= TOLERANCE


def test_codes_of_other_widths_and_scales_of_channels(tmp_path: Path) -> None:
    inputs = torch.randn(4, 12)
    config = e2pass.Config(smd=None, slu=None, psg=None, bits=e2pass.Bits(x=12, w=4, w_scale="channel"))
    t = e2pass.transform(vector_net(vector_residual(16)), inputs, config=config)
    t.model.train()(inputs)
    path = export_inference(t, inputs, tmp_path / "m.onnx")
    large = 3 * torch.randn(7, 12)  # beyond the running scales: codes saturate
    assert check_inference(path, t, large) <= TOLERANCE
    with torch.no_grad():
        plain = t.unwrap().eval()(large)
        assert (t.model.eval()(large) - plain).abs().max() > 1e-4  # quantization does show


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("config", ["slu", "e2train"])
def test_bags_of_embeddings(tmp_path: Path, config: str, mode: str) -> None:
    torch.manual_seed(0)
    model, words = nn.Sequential(nn.EmbeddingBag(10, 12, mode=mode), nn.Linear(12, 3)), torch.randint(0, 10, (4, 5))
    t = e2pass.transform(model, words, config=config)
    path = export_inference(t, words, tmp_path / "m.onnx")
    assert check_inference(path, t, torch.randint(0, 10, (7, 5))) <= TOLERANCE


def test_padded_means_of_embeddings_are_refused(tmp_path: Path) -> None:
    model, words = nn.Sequential(nn.EmbeddingBag(10, 12, mode="mean", padding_idx=0)), torch.randint(0, 10, (4, 5))
    t = e2pass.transform(model, words, config="neutral")
    with pytest.raises(ExportError, match=r"operator aten\.embedding_bag"):
        export_inference(t, words, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_vit(tmp_path: Path) -> None:
    model, inputs = ZOO["vit"].make()
    assert isinstance(inputs, dict)
    t = e2pass.transform(model, inputs, config="slu")
    pixels = torch.randn(16, 3, 32, 32) + torch.linspace(-1, 1, 16).view(-1, 1, 1, 1)
    with_deciding_gates(t, {"pixel_values": pixels})
    shares = decisions(t, {"pixel_values": pixels})
    assert ((shares > 0) & (shares < 1)).all()
    path = export_inference(t, inputs, tmp_path / "vit.onnx")
    stored = onnx.load(path).graph
    assert [value.name for value in stored.input] == ["pixel_values"]
    assert [value.name for value in stored.output] == ["logits"]
    for batch in BATCHES:
        assert check_inference(path, t, {"pixel_values": pixels[:batch]}) <= TOLERANCE


def everything_runs_masked(path: Path) -> bool:
    return not any(node.op_type in ("If", "NonZero", "ScatterND") for node in onnx.load(path).graph.node)


def test_masked_form_has_no_control_flow(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(24, 12)
    t = e2pass.transform(vector_net(vector_residual(16), vector_residual(16)), inputs[:4], config="slu")
    with_deciding_gates(t, (inputs,))
    path = export_inference(t, inputs[:4], tmp_path / "m.onnx", masked=True)
    assert everything_runs_masked(path)
    assert check_inference(path, t, inputs) <= TOLERANCE


def executed(path: Path, folder: Path, value: Tensor) -> set[str]:
    """Names of the nodes that onnxruntime ran, by its own profile, graph optimizations off."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: value.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    return {event["name"] for event in events if event["cat"] == "Node"}


@pytest.mark.parametrize("batch", [1, 6])
def test_nodes_of_a_skipped_block_do_not_run(tmp_path: Path, batch: int) -> None:
    """The profile of a batch that no gate opens for holds no node of any body; of one that all open for, all nodes."""
    torch.manual_seed(0)
    inputs = torch.randn(batch, 12)
    t = e2pass.transform(vector_net(vector_residual(16), vector_residual(16)), torch.randn(4, 12), config="slu")
    assert t.model.e2_slu is not None
    ran = {}
    for kind, price in (("open", -1e3), ("closed", 1e3)):
        t.model.e2_slu.price.fill_(price)
        path = export_inference(t, inputs, tmp_path / f"{kind}.onnx", dynamic_batch=batch > 1)
        assert check_inference(path, t, inputs) <= TOLERANCE
        names = executed(path, tmp_path, inputs)
        ran[kind] = {name for name in names if "body_" in name and "/" in name}
    assert ran["open"]
    assert not ran["closed"]


def test_convolution_in_three_dimensions_without_bias(tmp_path: Path) -> None:
    model, inputs = ZOO["conv3d"].make()
    t = e2pass.transform(model, inputs, config="slu")
    path = export_inference(t, inputs, tmp_path / "m.onnx")
    assert check_inference(path, t, inputs) <= TOLERANCE


def test_a_module_that_looks_at_values_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = ZOO["untraceable"].make()
    t = e2pass.transform(model, inputs, config="slu")
    capfd.readouterr()
    with pytest.raises(ExportError, match=r"torch\.export cannot trace the model .* must be rewritten"):
        export_inference(t, inputs, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_fixed_batch(tmp_path: Path) -> None:
    inputs = torch.randn(5, 12)
    t = e2pass.transform(vector_net(vector_residual(16)), inputs, config="slu")
    path = export_inference(t, inputs, tmp_path / "m.onnx", dynamic_batch=False)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 5
    assert check_inference(path, t, inputs) <= TOLERANCE
    with pytest.raises(ExportError, match=r"onnxruntime cannot run .*m.onnx"):
        check_inference(path, t, torch.randn(4, 12))


def test_one_example_sample_is_enough_for_any_batch(tmp_path: Path) -> None:
    t = e2pass.transform(vector_net(vector_residual(16)), torch.randn(1, 12), config="slu")
    path = export_inference(t, torch.randn(1, 12), tmp_path / "m.onnx")
    assert check_inference(path, t, torch.randn(9, 12)) <= TOLERANCE


class Named(nn.Module):
    """Its children have the names that an exporter might use for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies, self.compiled, self.plan, self.run = (vector_residual(12) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        return self.run(self.plan(self.compiled(self.bodies(x))))


def test_any_name_of_a_module_will_do(tmp_path: Path) -> None:
    inputs = torch.randn(4, 12)
    t = e2pass.transform(Named(), inputs, config="slu")
    path = export_inference(t, inputs, tmp_path / "m.onnx")
    assert check_inference(path, t, inputs) <= TOLERANCE


class Eigenvalues(nn.Module):
    """``torch.linalg.eigvalsh`` has no ONNX form."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 9)

    def forward(self, x: Tensor) -> Any:
        return torch.linalg.eigvalsh(self.linear(x).view(-1, 3, 3))


@pytest.mark.parametrize("config", ["slu", "8bit"])
def test_an_operator_without_onnx_form_is_named_and_nothing_is_left(tmp_path: Path, config: str) -> None:
    t = e2pass.transform(nn.Sequential(nn.Linear(12, 12), Eigenvalues()), torch.randn(4, 12), config=config)
    with pytest.raises(
        ExportError,
        match=r"operator aten\._linalg_eigh\.default in region \w+ \(module 1\) has no ONNX form; replace it",
    ):
        export_inference(t, torch.randn(4, 12), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(4, 12)
    t = e2pass.transform(vector_net(vector_residual(16)), inputs, config="slu")
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the old one")

    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("node 7 is odd\nand more")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="the ONNX file of the model is not valid: node 7 is odd; please report"):
        export_inference(t, inputs, path)
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("m.onnx", b"the old one")]


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    inputs = torch.randn(4, 12)
    t = e2pass.transform(vector_net(vector_residual(16)), inputs, config="slu")
    with pytest.raises(InputError, match=r"a Linear cannot be exported; give what e2pass.transform returned"):
        export_inference(nn.Linear(2, 2), inputs, tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is a folder"):
        export_inference(t, inputs, tmp_path)
    with pytest.raises(InputError, match="does not exist; create it first"):
        export_inference(t, inputs, tmp_path / "none" / "m.onnx")
    with pytest.raises(InputError, match="there is no file"):
        check_inference(tmp_path / "m.onnx", t, inputs)
    with pytest.raises(InputError):
        export_inference(t, (inputs, inputs), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_onnxruntime_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    inputs = torch.randn(4, 12)
    t = e2pass.transform(vector_net(vector_residual(16)), inputs, config="slu")
    with pytest.raises(ExportError, match=r"onnxruntime is not installed.*pip install 'e2pass\[verify\]'"):
        check_inference(tmp_path / "m.onnx", t, inputs)
