"""What the kernels are meant to reach on one H200 in bfloat16, as ratios within one run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

CUDNN, FLASH = "cuDNN", "FlashAttention 2"
FLA_NSA, XUNHAO_NSA, FLA_WINDOW = "fla NSA", "XunhaoLai NSA", "fla parallel_attn"
UNSELECTED, TORCH_TOPK = "the same without TopK", "torch.topk alone"
NSA = (FLA_NSA, XUNHAO_NSA)


@dataclass(frozen=True)
class Target:
    """A bound on a row, and an aim beyond it.

    measure: "time" is ours over that of the best of ``against`` and "speedup" its inverse, then
        "copy" is a share of the measured copy bandwidth, and "ms" milliseconds.
    group, batch, keys: the rows it is meant for, None for all.
    """

    measure: Literal["time", "speedup", "copy", "ms"]
    must: float
    aim: float | None = None
    against: tuple[str, ...] = ()
    group: int | None = None
    batch: int | None = None
    keys: int | None = None

    @property
    def at_most(self) -> bool:
        return self.measure in ("time", "ms")

    def met(self, value: float) -> bool:
        return value <= self.must if self.at_most else value >= self.must

    def value(
        self, latency_ms: float, peers_ms: Mapping[str, float], of_copy: float | None
    ) -> float | None:
        """What was reached; None where nothing that this compares with was measured."""
        if self.measure == "copy":
            return of_copy
        if self.measure == "ms":
            return latency_ms
        others = [peers_ms[name] for name in self.against if name in peers_ms]
        if not others:
            return None
        ratio = latency_ms / min(others)
        return ratio if self.measure == "time" else 1 / ratio

    def show(self, value: float) -> str:
        """A value of this measure, such as "1.07x"."""
        if self.measure == "copy":
            return f"{value:.0%}"
        if self.measure == "ms":
            return f"{value:.2g} ms" if value >= 1 else f"{1e3 * value:.3g} µs"
        return f"{value:.2f}x"

    def __str__(self) -> str:
        what = {
            "time": f"of {' or '.join(self.against)}",
            "speedup": f"faster than {' or '.join(self.against)}",
            "copy": "of copy bandwidth",
            "ms": "",
        }[self.measure]
        aim = "" if self.aim is None else f" (aim {self.show(self.aim)})"
        bound = f"{'≤' if self.at_most else '≥'} {self.show(self.must)}"
        return f"{bound} {what}".strip() + aim


TARGETS: dict[str, tuple[Target, ...]] = {
    "full + TopK forward": (
        Target("time", 1.25, 1.05, (CUDNN,)),
        Target("time", 1.08, 1.03, (UNSELECTED,)),
    ),
    "full + TopK backward": (Target("time", 1.05, None, (CUDNN,)),),
    "block-sparse forward, real lists": (
        Target("speedup", 3.0, None, NSA, group=4),
        Target("ms", 6.5, 3.5, group=4, keys=32768),
        Target("speedup", 1.5, 3.0, NSA, group=16),
    ),
    "block-sparse forward, random lists": (
        Target("speedup", 1.5, None, NSA, group=4),
        Target("speedup", 1.1, None, NSA, group=16),
    ),
    "block-sparse backward, real lists": (Target("speedup", 2.0, None, NSA),),
    "window + sinks forward": (
        Target("copy", 0.6, 0.8),
        Target("speedup", 1.3, None, (FLA_WINDOW,)),
    ),
    "window + sinks backward": (
        Target("copy", 0.6, 0.8),
        Target("speedup", 1.3, None, (FLA_WINDOW,)),
    ),
    "decode, full + TopK": (Target("copy", 0.85, 0.92, batch=16, keys=32768),),
    "decode, sparse layer": (
        Target("ms", 0.010, 0.006, batch=1),
        Target("copy", 0.7, None, batch=64),
    ),
}


def targets_of(name: str, *, group: int, batch: int, keys: int) -> list[Target]:
    """The targets of a row of this name and shape."""
    shape = {"group": group, "batch": batch, "keys": keys}
    return [
        target
        for target in TARGETS.get(name, ())
        if all(getattr(target, what) in (None, size) for what, size in shape.items())
    ]
