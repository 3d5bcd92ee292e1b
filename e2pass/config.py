"""Configuration: which techniques are applied, and how. One pydantic model a technique, presets by name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from e2pass.errors import ConfigError

GateKind = Literal["learned", "open", "closed", "random"]
GatePer = Literal["sample", "batch"]
Survival = Literal["constant", "linear"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None


def _explain(section: type[BaseModel], error: ValidationError) -> str:
    """Turn the first pydantic error into one sentence that names key, value and what is allowed."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"])) or section.__name__
    if first["type"] == "extra_forbidden":
        return f"{section.__name__} has no key {key!r}; the valid keys are {', '.join(section.model_fields)}"
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    wanted = first["msg"].replace("Input should", "it should", 1)
    return f"{section.__name__}.{key} = {first['input']!r} is not allowed: {wanted}"


class SMD(_Section):
    """Stochastic mini-batch dropping (paper, section 3.1).

    Attributes:
        p: Probability that a mini-batch is dropped; 0.5 in the paper.
        seed: Seed of the drop sequence, which is the technique's own and the same on every rank.
        coast: A dropped step still applies momentum and weight decay (what the published code did under torch 1.0).
    """

    p: float = Field(0.5, ge=0.0, lt=1.0)
    seed: int = Field(0, ge=0)
    coast: bool = False


class SLU(_Section):
    """Selective layer update (paper, section 3.2).

    Attributes:
        skip: Target skip ratio: the energy-weighted share of the gated blocks' work that is not executed.
        gate: ``learned`` (RNN gates), ``open``, ``closed``, or ``random`` (stochastic depth, the paper's baseline).
        hidden: Width of the gates' embedding and LSTM state; 10 in the paper.
        inject: Add the gradient of the compute term in the gates' own backward; with False the caller adds
            ``t.cost_term()`` to the loss.
        seed: Seed of the random gates.
        per: Each ``sample`` decides for itself, or all of a ``batch`` share one decision.
        survival: Random gates of all blocks skip at the same rate (``constant``), or at one that grows with depth
            (``linear``, as published); the energy-weighted mean is ``skip`` either way.
        min_active: In training at least so many samples enter each block; those with the highest scores are forced.
        projections: Gate the bodies of blocks with a projection as skip path; False leaves such blocks alone.
        include: Blocks to gate although the search would not: names of blocks or additions, or module paths.
        exclude: Blocks to leave alone; a module path stands for all blocks in it.
    """

    skip: float = Field(0.4, ge=0.0, lt=1.0)
    gate: GateKind = "learned"
    hidden: int = Field(10, ge=1, le=1024)
    inject: bool = True
    seed: int = Field(0, ge=0)
    per: GatePer = "sample"
    survival: Survival = "constant"
    min_active: int = Field(0, ge=0)
    projections: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _min_active_counts_samples(self) -> SLU:
        if self.per == "batch" and self.min_active:
            raise ValueError("SLU(min_active) forces single samples, and with per='batch' all of a batch decide as one")
        return self


class Bits(_Section):
    """Operand widths of every convolution and matrix product (8/8/16 in the paper).

    Attributes:
        x: Bits of activations.
        w: Bits of weights.
        grad: Bits of the gradients that flow back.
        norm_saved: Bits of the norm inputs that backward keeps; None keeps them in fp32.
        w_scale: One scale for a weight ``tensor``, or one for each output ``channel``.
        rounding: To ``nearest`` even, or ``stochastic`` while training, from a generator of its own.
        seed: Seed of stochastic rounding; the state dict holds the step, so a resumed run rounds alike.
        bit_true: Make the codes of the forward half independent of kernel, thread count, memory format and runtime:
            scales are powers of two, biases are added behind products, norms, means and sums are taken in double
            precision. Sums of products are then exact in float32 up to 2^24, so ``x + w`` may be 26 at most.
        exclude: Patterns of parameter names (as in a shell) whose products stay in full precision.
    """

    x: int = Field(8, ge=2, le=16)
    w: int = Field(8, ge=2, le=16)
    grad: int = Field(16, ge=2, le=16)
    norm_saved: int | None = Field(16, ge=2, le=16)
    w_scale: Literal["tensor", "channel"] = "tensor"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = Field(0, ge=0, lt=2**31)
    bit_true: bool = False
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _bit_true_products_are_exact(self) -> Bits:
        if self.bit_true and self.x + self.w > 26:
            raise ValueError(
                f"Bits(bit_true=True) needs x + w of at most 26 bits, not {self.x} + {self.w}: products of wider codes "
                "are not exact in float32"
            )
        if self.bit_true and self.rounding == "stochastic":
            raise ValueError(
                "Bits(bit_true=True) needs rounding='nearest': random numbers depend on memory format and runtime"
            )
        return self


class PSG(_Section):
    """Predictive sign gradient descent (paper, section 3.3).

    Attributes:
        x_bits: Most significant bits of the activation codes that the predictor sees.
        gy_bits: Most significant bits of the output-gradient codes that the predictor sees.
        msb: How they are taken from the integer codes: ``round``, ``floor`` or ``truncate``.
        beta: Adaptive threshold: a weight gradient is predicted where ``|g_msb| >= beta * max|g_msb|``.
        tau: Fixed threshold in its place, in the gradient's own unit; None for the adaptive one.
        sparsify: Below the threshold the update is zero and the full gradient is not computed.
        sign: Use the sign of the selected gradient; False uses its value.
        scale: Magnitude of the signs: ``mean`` multiplies each tensor's signs by the mean absolute predicted
            gradient, so learning rates keep their meaning; ``unit`` is the paper's.
        warmup: Training steps in full precision, without PSG and without quantization, before it starts.
        exclude: Patterns of parameter names (as in a shell) that keep their full gradient.
        also: What is updated by the sign of its full gradient besides the weights of products: any of
            ``embeddings``, ``norms`` and ``biases``.
        stats: Count predictor use and sign agreement, weight by weight. ``Config()`` and the presets turn it on.
        bound: Sum up the paper's bound on wrong signs, too; needs ``stats``, and costs more than the counts.
    """

    x_bits: int = Field(4, ge=2, le=16)
    gy_bits: int = Field(10, ge=2, le=16)
    msb: Literal["round", "floor", "truncate"] = "round"
    beta: float = Field(0.05, ge=0.0, le=1.0)
    tau: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    sparsify: bool = False
    sign: bool = True
    scale: Literal["mean", "unit"] = "mean"
    warmup: int = Field(0, ge=0)
    exclude: tuple[str, ...] = ()
    also: tuple[Literal["embeddings", "norms", "biases"], ...] = ()
    stats: bool = False
    bound: bool = False

    @model_validator(mode="after")
    def _bound_needs_stats(self) -> PSG:
        if self.bound and not self.stats:
            raise ValueError("PSG(bound=True) is one of the statistics and needs stats=True")
        return self


class Config(_Section):
    """What ``transform`` applies; None turns a technique off.

    ``Config()`` is the preset ``e2train``; it counts what PSG predicts, since ``t.report(rates="measured")`` rests on
    it. PSG needs quantized operands, so ``psg`` without ``bits`` is an error. ``compile=True`` compiles
    quantizers and the element-wise operators between them by torch's inductor, which needs a C++ compiler.
    """

    smd: SMD | None = SMD()
    slu: SLU | None = SLU()
    psg: PSG | None = PSG(stats=True)
    bits: Bits | None = Bits()
    compile: bool = False

    @model_validator(mode="after")
    def _compiled_code_contracts(self) -> Config:
        if self.compile and self.bits is not None and self.bits.bit_true:
            raise ValueError("compile=True may contract products and sums, so it does not go with Bits(bit_true=True)")
        return self

    @model_validator(mode="after")
    def _psg_needs_bits(self) -> Config:
        if self.psg is not None and self.bits is None:
            raise ValueError("PSG predicts from integer codes and needs bits, e.g. bits=Bits(x=8, w=8, grad=16)")
        if self.psg is not None and self.bits is not None:
            for msb, name in ((self.psg.x_bits, "x"), (self.psg.gy_bits, "grad")):
                full = getattr(self.bits, name)
                if msb > full:
                    raise ValueError(f"the predictor cannot see {msb} bits of a {full}-bit code (Bits.{name})")
        return self


PRESETS: dict[str, Config] = {
    "e2train": Config(),
    "paper": Config(psg=PSG(scale="unit", stats=True)),
    "smd": Config(slu=None, psg=None, bits=None),
    "slu": Config(smd=None, psg=None, bits=None),
    "psg": Config(smd=None, slu=None),
    "signsgd": Config(smd=None, slu=None, psg=PSG(x_bits=8, gy_bits=16, beta=0.0, scale="unit", stats=True)),
    "8bit": Config(smd=None, slu=None, psg=None),
    "neutral": Config(smd=None, slu=SLU(gate="open"), psg=None, bits=None),
    "bit-true": Config(bits=Bits(bit_true=True)),
}


def resolve(config: Config | str) -> Config:
    """Return ``config`` itself, or the preset of that name.

    Raises:
        ConfigError: For an unknown preset or anything that is neither a ``Config`` nor a name.
    """
    if isinstance(config, Config):
        return config
    if isinstance(config, str) and config in PRESETS:
        return PRESETS[config]
    raise ConfigError(f"unknown config {config!r}; give an e2pass.Config or one of the presets {', '.join(PRESETS)}")
