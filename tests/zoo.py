"""Small models with example inputs, and how many residual blocks each has, by which rule.

A residual block is an addition of two activations of equal shape, where one is the other's ancestor (identity) or both
come from one fork with a linear skip path (projection), and where the body holds parameters and is not linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

BATCH = 6  # a number that no other dimension of these models has

ExampleInputs = Tensor | tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    ``make()`` gives the same weights and inputs each time, in training mode; ``blocks`` is the number of residual
    blocks, ``rule`` the reason for it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], ExampleInputs]
    blocks: int
    rule: str

    def make(self) -> tuple[nn.Module, ExampleInputs]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().train(), self.inputs()


def call(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Call ``model`` the way ``inputs`` asks for: one tensor, positional, or by keyword."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output, in order: a tensor, a sequence, a dict or a transformers output."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output if isinstance(output, list | tuple) else ()
    return [leaf for value in values for leaf in tensors(value)]


def conv_bn(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o))


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Any:
        return x + self.body(x)


class PooledHead(nn.Sequential):
    def __init__(self, channels: int, classes: int = 10) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, classes))


class PreActBlock(nn.Module):
    """Norm and ReLU before each convolution; the projection forks off after the first ReLU (He et al. 2016b)."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(i, o, 1, stride, bias=False) if stride != 1 or i != o else None

    def forward(self, x: Tensor) -> Any:
        pre = functional.relu(self.bn1(x))
        skip = x if self.skip is None else self.skip(pre)
        return self.conv2(functional.relu(self.bn2(self.conv1(pre)))) + skip


class UNet(nn.Module):
    """Two levels; the skip paths are concatenated or, as in LinkNet, added."""

    def __init__(self, add: bool) -> None:
        super().__init__()
        self.add = add
        self.enter = nn.Sequential(conv_bn(3, 8), nn.ReLU())
        self.down = nn.Sequential(conv_bn(8, 16, stride=2), nn.ReLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(2), conv_bn(16, 16), nn.ReLU())
        self.up1 = nn.ConvTranspose2d(16, 16, 2, 2)
        self.merge1 = nn.Sequential(conv_bn(16 if add else 32, 16), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(16, 8, 2, 2)
        self.merge2 = nn.Sequential(conv_bn(8 if add else 16, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b if self.add else torch.cat([a, b], 1)

    def forward(self, x: Tensor) -> Any:
        high = self.enter(x)
        low = self.down(high)
        low = self.merge1(self.join(self.up1(self.bottom(low)), low))
        return self.merge2(self.join(self.up2(low), high))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 2, 1), nn.ReLU())
        self.excite = nn.Sequential(nn.Conv2d(2, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Any:
        return x * self.excite(self.squeeze(x))


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 8), nn.ReLU(), conv_residual(8), nn.ReLU(), conv_residual(8))
        self.head = PooledHead(8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.features(x)
        return {"logits": self.head(features), "features": features}


class Conditioned(nn.Module):
    """An image and a vector; the vector scales the inside of both bodies (a side input of the block)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8), nn.ReLU())
        self.conv1, self.scale1 = nn.ModuleList(conv_bn(8, 8) for _ in "ab"), nn.Linear(5, 8)
        self.conv2 = nn.ModuleList(conv_bn(8, 8) for _ in "ab")
        self.head = PooledHead(8)

    def forward(self, image: Tensor, condition: Tensor) -> Any:
        x, scale = self.stem(image), self.scale1(condition)[:, :, None, None]
        for first, second in zip(self.conv1, self.conv2, strict=True):
            x = x + second(functional.relu(first(x)) * scale)
        return self.head(x)


class SharedBlock(nn.Module):
    """One residual block called twice, with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = conv_bn(3, 8), conv_residual(8), PooledHead(8)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.block(functional.relu(self.block(self.stem(x)))))


class TiedEmbedding(nn.Module):
    """A language model whose output layer is its embedding, and which also shares one bias under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.Sequential(vector_residual(16), vector_residual(16))
        self.out = nn.Linear(16, 32)
        self.out.weight = self.embed.weight
        self.bias_alias = self.out.bias

    def forward(self, tokens: Tensor) -> Any:
        return self.out(self.blocks(self.embed(tokens)))


class DataDependent(nn.Module):
    """Neither tracer can follow a Python branch on a value."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return x * self.scale
        return x / self.scale


class InPlaceBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b, self.relu = conv_bn(channels, channels), conv_bn(channels, channels), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        out = self.b(self.relu(self.a(x)))
        out += x
        return self.relu(out)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm and a channels-last MLP, scaled by a parameter of the block itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(functional.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class ParallelBlock(nn.Module):
    """``x + attention(h) + mlp(h)``, as in GPT-J: three terms, one block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Any:
        h = self.norm(x)
        q, k, v = self.qkv(h).chunk(3, -1)
        return x + self.out(torch.softmax(q @ k.transpose(1, 2), -1) @ v) + self.mlp(h)


class LookAlikes(nn.Module):
    """Additions that are no residual blocks: a position table, GELU written out, a sum of two linear branches."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.left, self.right = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.position, self.head = nn.Parameter(torch.randn(16)), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.inp(x) + self.position
        x = 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))
        return self.head(torch.relu(self.left(x) + self.right(x)))


class LastStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        sequence, _ = self.lstm(x)
        return self.head(sequence[:, -1])


def conv_residual(c: int) -> Residual:
    return Residual(conv_bn(c, c), nn.ReLU(), conv_bn(c, c))


def vector_residual(width: int, p: float = 0.0) -> Residual:
    dropout = [nn.Dropout(p)] if p else []
    return Residual(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), *dropout, nn.Linear(2 * width, width))


def image_net(*blocks: nn.Module, channels: int = 8) -> nn.Sequential:
    """A stem of 8 channels, the blocks, and a head on ``channels``."""
    return nn.Sequential(nn.Sequential(conv_bn(3, 8), nn.ReLU()), *blocks, PooledHead(channels))


def vector_net(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), *blocks, nn.Linear(16, 10))


def preact_resnet() -> nn.Module:
    return image_net(PreActBlock(8, 8), PreActBlock(8, 16, 2), PreActBlock(16, 16), nn.BatchNorm2d(16), channels=16)


def grouped() -> nn.Module:
    resnext = Residual(conv_bn(8, 16, 1), nn.ReLU(), conv_bn(16, 16, groups=4), nn.ReLU(), conv_bn(16, 8, 1))
    inverted = Residual(conv_bn(8, 24, 1), nn.ReLU6(), conv_bn(24, 24, groups=24), nn.ReLU6(), conv_bn(24, 8, 1))
    return image_net(resnext, inverted)


def untraceable() -> nn.Module:
    return image_net(conv_residual(8), DataDependent(8), conv_residual(8))


def in_place_on_fork() -> nn.Module:
    block = Residual(nn.ReLU(inplace=True), conv_bn(8, 8))
    return nn.Sequential(conv_bn(3, 8), block, nn.ReLU(), PooledHead(8))


def conv1d() -> nn.Module:
    body = (nn.Conv1d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1))
    return nn.Sequential(nn.Conv1d(2, 8, 3, 2, 1), Residual(*body), nn.Flatten(1), nn.Linear(64, 10))


def conv3d() -> nn.Module:
    body = (nn.Conv3d(4, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 1))
    return nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), Residual(*body), nn.Flatten(1), nn.Linear(256, 10))


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def image() -> Tensor:
    return torch.randn(BATCH, 3, 16, 16)


def vector() -> Tensor:
    return torch.randn(BATCH, 12)


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 64, (BATCH, 9))}


def masked_tokens() -> dict[str, Any]:
    mask = torch.ones(BATCH, 9, dtype=torch.long)
    mask[0, 5:] = 0  # one padded sentence
    return {**tokens(), "attention_mask": mask}


ENTRIES = (
    Entry("preact_resnet", preact_resnet, image, 3, "two identity joins, and a projection forked off after the ReLU"),
    Entry("unet", lambda: UNet(add=False), image, 0, "skip paths are concatenated, nothing is added"),
    Entry("linknet", lambda: UNet(add=True), image, 0, "hourglass: every path from fork to join is upsampled"),
    Entry("mlp", lambda: vector_net(nn.ReLU(), nn.Linear(16, 16), nn.ReLU()), vector, 0, "no addition"),
    Entry("residual_mlp", lambda: vector_net(*(vector_residual(16) for _ in range(3))), vector, 3, "identity joins"),
    Entry("dropout", lambda: vector_net(*(vector_residual(16, 0.5) for _ in "ab")), vector, 2, "identity joins"),
    Entry(
        "squeeze_excite",
        lambda: image_net(*(Residual(conv_bn(8, 8), nn.ReLU(), conv_bn(8, 8), SqueezeExcite(8)) for _ in "ab")),
        image,
        2,
        "the product inside the body is no join",
    ),
    Entry("dict_output", DictOutput, image, 2, "identity joins; the last one is an output as well"),
    Entry("tuple_input", Conditioned, lambda: (image(), torch.randn(BATCH, 5)), 2, "identity, with a side input"),
    Entry(
        "dict_input",
        Conditioned,
        lambda: {"condition": torch.randn(BATCH, 5), "image": image()},
        2,
        "the same, given by keyword and out of order",
    ),
    Entry("shared_block", SharedBlock, image, 2, "one module, but each call joins in the graph"),
    Entry("tied_embedding", TiedEmbedding, lambda: torch.randint(0, 32, (BATCH, 9)), 2, "identity joins"),
    Entry("untraceable", untraceable, image, 2, "identity joins before and after the opaque module"),
    Entry("in_place_relu", lambda: image_net(InPlaceBlock(8), InPlaceBlock(8)), image, 2, "in place, after the join"),
    # A capture that hides in-place aliasing has to refuse it: what the skip path reads is relu(x), not x. Where the
    # capture shows the alias (torch.export), the same addition has a linear body (convolution and norm): none either.
    Entry("in_place_on_fork", in_place_on_fork, image, 0, "the body's first operation overwrites the fork"),
    Entry("convnext", lambda: image_net(*(ConvNeXtBlock(8) for _ in "abc")), image, 3, "identity, layer scale inside"),
    Entry("grouped", grouped, image, 2, "a ResNeXt block and an inverted residual"),
    Entry("conv1d", conv1d, lambda: torch.randn(BATCH, 2, 16), 1, "identity"),
    Entry("conv3d", conv3d, lambda: torch.randn(BATCH, 1, 8, 8, 8), 1, "identity"),
    Entry(
        "parallel",
        lambda: nn.Sequential(nn.Linear(12, 16), ParallelBlock(16), ParallelBlock(16), nn.Linear(16, 10)),
        lambda: torch.randn(BATCH, 7, 12),
        2,
        "three terms are one join",
    ),
    Entry("look_alikes", LookAlikes, vector, 0, "a parameter, a body without parameters, two linear branches"),
    Entry("lstm", LastStep, lambda: torch.randn(BATCH, 7, 12), 0, "no addition"),
    Entry("vit", vit, lambda: {"pixel_values": torch.randn(BATCH, 3, 32, 32)}, 4, "attention and MLP of two layers"),
    Entry("gpt2", gpt2, tokens, 4, "attention and MLP of two layers; its output layer is its embedding"),
    Entry("bert", bert, masked_tokens, 4, "attention and MLP of two layers, norm after the join"),
)

ZOO: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}
