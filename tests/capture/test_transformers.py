"""What is special about transformers models: keyword calls, output classes, losses, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from e2pass.capture import Capture, capture
from e2pass.diagnostics import Diagnostics
from e2pass.errors import InputError
from e2pass.inputs import Inputs

IDS = torch.arange(32).reshape(4, 8) % 11


def gpt2(use_cache: bool) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0, use_cache=use_cache
    )
    return transformers.GPT2LMHeadModel(config)


def taken(model: nn.Module, **example: Any) -> Capture:
    return capture(model, Inputs.of(example), Diagnostics())


def test_a_loss_is_computed_and_the_output_class_is_kept() -> None:
    model = gpt2(use_cache=False)
    result = taken(model, input_ids=IDS, labels=IDS)
    ids = IDS[:3] + 1
    model.eval()
    output = result.rebuild(result.eval(*result.bind((), {"labels": ids, "input_ids": ids})), False)
    expected = model(input_ids=ids, labels=ids)
    assert type(output) is type(expected)
    assert output.past_key_values is None
    torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=0)
    assert result.symbolic_batch


def test_a_cache_is_returned_as_one() -> None:
    model = gpt2(use_cache=True)
    result = taken(model, input_ids=IDS)
    model.eval()
    cache = result.rebuild(result.eval(*result.bind((), {"input_ids": IDS[:2]})), False).past_key_values
    expected = model(input_ids=IDS[:2]).past_key_values
    assert isinstance(cache, transformers.DynamicCache)
    assert cache.get_seq_length() == 8
    for one, other in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(vars(one)["keys"], vars(other)["keys"], rtol=0, atol=0)


def test_a_call_that_does_not_fit_is_refused() -> None:
    result = taken(gpt2(use_cache=False), input_ids=IDS)
    with pytest.raises(InputError, match="captured without \\['labels'\\]"):
        result.bind((), {"input_ids": IDS, "labels": IDS})
    with pytest.raises(InputError, match=r"has shape \(4, 5\); the captured graph holds for \(any, 8\)"):
        result.bind((), {"input_ids": IDS[:, :5]})
