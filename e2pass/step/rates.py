"""What the price of a step rests on beside the board: how often things happen, and what the hardware does about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from e2pass.cost import OpSite, TensorSpec
from e2pass.errors import ConfigError

TECHNIQUES: tuple[str, ...] = ("smd", "slu", "bits", "psg")
"""The techniques, in the order in which the waterfall applies them."""


@dataclass(frozen=True)
class Rates:
    """How often things happen in one nominal step.

    Attributes:
        drop: Share of mini-batches dropped.
        skip: Share of samples that skip each gated block, by gate index.
        use: Share of the elements of a weight gradient that are predicted, by weight; ``default_use`` for the others.
        default_use: As reported in the paper at beta = 0.05 ("at least 60 %" of the elements).
        batch: Samples in a mini-batch.
        source: ``assumed`` or ``measured``.
    """

    drop: float = 0.0
    skip: Mapping[int, float] = field(default_factory=dict)
    use: Mapping[str, float] = field(default_factory=dict)
    default_use: float = 0.6
    batch: int = 1
    source: str = "assumed"

    def __post_init__(self) -> None:
        shares = {"drop": self.drop, "default_use": self.default_use}
        shares |= {f"skip[{gate}]": share for gate, share in self.skip.items()}
        shares |= {f"use[{weight!r}]": share for weight, share in self.use.items()}
        for name, share in shares.items():
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"Rates.{name} = {share!r} is not allowed; it is a share, from 0 to 1")
        if self.batch < 1:
            raise ConfigError(f"Rates.batch = {self.batch!r} is not allowed; a mini-batch has at least one sample")

    def executed(self, gate: int | None) -> float:
        """Share of the samples that run what ``gate`` decides about; 1 for None."""
        return 1.0 if gate is None else 1.0 - self.skip.get(gate, 0.0)

    def entered(self, gate: int | None) -> float:
        """Probability that some sample of a mini-batch runs it, where samples decide independently."""
        return 1.0 if gate is None else 1.0 - self.skip.get(gate, 0.0) ** self.batch

    def predicted(self, weight: str) -> float:
        """Share of the elements of a weight's gradient that are predicted."""
        return self.use.get(weight, self.default_use)

    def only(self, techniques: Collection[str]) -> Rates:
        """The same where only these of ``TECHNIQUES`` act: nothing is dropped without ``smd``, and so on."""
        return replace(
            self,
            drop=self.drop if "smd" in techniques else 0.0,
            skip=self.skip if "slu" in techniques else {},
            use=self.use if "psg" in techniques else {},
            default_use=self.default_use if "psg" in techniques else 0.0,
        )


@dataclass(frozen=True)
class PredictorHardware:
    """What hardware does with a predicted weight gradient (PSG); the share predicted is one of elements.

    Attributes:
        reuse: The full gradient continues the predictor's product, most significant bits first, so that it costs only
            the bit products that remain (8 x 16 - 4 x 10 = 88 of 128 for the paper's widths). Off by default: an
            array that multiplies whole words, such as one of DSP slices, computes the full product anew.
        skips: ``element`` (default): the array skips single elements of a weight gradient, as the paper assumes, so
            a share of predicted elements saves that share of the product. ``tensor``: it cannot, so a full gradient
            is computed whole as soon as one of its elements was not predicted.
    """

    reuse: bool = False
    skips: Literal["element", "tensor"] = "element"

    def __post_init__(self) -> None:
        if self.skips not in ("element", "tensor"):
            raise ConfigError(f"skips = {self.skips!r} is not allowed; choose 'element' or 'tensor'")

    def full_share(self, predicted: float) -> float:
        """Share of a full weight gradient that is computed beside its predictor."""
        if self.skips == "element":
            return 1.0 - predicted
        return 0.0 if predicted >= 1.0 else 1.0


STANDARD = PredictorHardware()


def remaining(site: OpSite, known_bits: int) -> OpSite:
    """The product of ``site`` after ``known_bits`` of its bit products are known.

    Of operands of ``n <= m`` bits, ``n m`` bit products make the full product. It is priced as one of ``n`` and
    ``ceil((n m - known_bits) / n)`` bits: as many MACs, of the width that remains.

    Args:
        site: A matrix product or the weight half of a convolution's backward.
        known_bits: Product of the widths of the predictor's operands.
    """
    operands = [i for i, value in enumerate(site.args) if isinstance(value, TensorSpec)][:2]
    narrow, wide = sorted(operands, key=lambda i: site.args[i].bits)
    n, m = site.args[narrow].bits, site.args[wide].bits
    left = max(1, -(-(n * m - known_bits) // n))
    args = list(site.args)
    args[wide] = replace(args[wide], bits=left)
    return replace(site, args=tuple(args))
