"""Precision presets by name, each a full policy (precision.md section 11.5).

In all of them the router, norms, embedding, head and product keys stay high, and in those for
training the last 15% of the layers too, so that two presets differ in their recipe alone.
"""

from typing import Any

from layers.precision.operands import LeafPrecision
from layers.precision.policy import HIGH_ROLES, PrecisionPolicy, Rule

HIGH_TAIL = "last 15%"  # arXiv:2509.25149 section 4.1: without it every model diverged


def _plain(name: str) -> PrecisionPolicy:
    leaf = LeafPrecision.of(name)
    return PrecisionPolicy(name=name, default=leaf, rules=(Rule(use=leaf, roles=HIGH_ROLES),))


def _training(name: str, **operands: Any) -> PrecisionPolicy:
    high = LeafPrecision.of("bf16")
    rules = (Rule(use=high, roles=HIGH_ROLES), Rule(use=high, layers=HIGH_TAIL))
    return PrecisionPolicy(name=name, default=LeafPrecision.of(operands), rules=rules)


def _inference(name: str, **operands: Any) -> PrecisionPolicy:
    rules = (Rule(use=LeafPrecision.of("bf16"), roles=HIGH_ROLES),)
    return PrecisionPolicy(name=name, default=LeafPrecision.of(operands), rules=rules)


def _spec(format: str, **options: Any) -> dict[str, Any]:
    return {"format": format, **options}


def _stochastic(format: str, **options: Any) -> dict[str, Any]:
    return _spec(format, rounding="stochastic", **options)


_MXFP4 = {"scale_rule": "rceil"}  # never clips, so that stochastic rounding has no bias
_TILED = _spec("nvfp4", tile="2d")  # the forward and the input gradient see the same numbers
_SIX = {"scale_rule": "4over6"}
_FRESH = {"hadamard": 32, "signs": "step"}
_QUEST = _spec("mxfp4", scale_rule="quest", hadamard=32)
_QUARTET = _stochastic("mxfp4", scale_rule="three_quarters", **_FRESH)
_EDEN = _spec("nvfp4", rounding="eden", **_FRESH)

PRESETS = {
    policy.name: policy
    for policy in (
        _plain("fp32"),
        _plain("bf16"),
        # TransformerEngine's Float8CurrentScaling, HYBRID: gradients need range, not digits
        _training("fp8_tensor", all="fp8_e4m3", dgrad_dy="fp8_e5m2", wgrad_dy="fp8_e5m2"),
        # torchao's rowwise recipe: scales rounded down to powers of two
        _training("fp8_row", all=_spec("fp8_e4m3", scope="row", scale_rule="p2")),
        # DeepSeek-V3, arXiv:2412.19437 section 3.3: 1 x 128 along the contraction, weights in tiles
        _training(
            "fp8_block128",
            all=_spec("fp8_e4m3", scope="block"),
            fprop_w=_spec("fp8_e4m3", scope="block", tile="2d"),
            dgrad_w=_spec("fp8_e4m3", scope="block", tile="2d"),
        ),
        # arXiv:2506.08027: E4M3 for gradients too, scales rounded up
        _training("mxfp8", all=_spec("mxfp8_e4m3", scale_rule="rceil")),
        # arXiv:2502.20586 and a truncation-free scale: rotated, stochastic gradients backward
        _training(
            "mxfp4",
            all=_spec("mxfp4", **_MXFP4),
            dgrad_dy=_stochastic("mxfp4", hadamard=32, **_MXFP4),
            dgrad_w=_spec("mxfp4", hadamard=32, **_MXFP4),
            wgrad_dy=_stochastic("mxfp4", hadamard=32, **_MXFP4),
            wgrad_x=_spec("mxfp4", hadamard=32, **_MXFP4),
        ),
        # arXiv:2509.25149: weights never rotated, gradients stochastic, rotation on wgrad alone
        _training(
            "nvfp4",
            fprop_x="nvfp4",
            fprop_w=_TILED,
            dgrad_dy=_stochastic("nvfp4"),
            dgrad_w=_TILED,
            wgrad_dy=_stochastic("nvfp4", hadamard=16),
            wgrad_x=_spec("nvfp4", hadamard=16),
        ),
        # arXiv:2512.02010: the better of two block scales where numbers are rounded to the nearest;
        # the rotated activation keeps one, and random rounding a scale that cannot clip
        _training(
            "nvfp4_4over6",
            fprop_x=_spec("nvfp4", **_SIX),
            fprop_w=_TILED | _SIX,
            dgrad_dy=_stochastic("nvfp4", scale_rule="unbiased"),
            dgrad_w=_TILED | _SIX,
            wgrad_dy=_stochastic("nvfp4", scale_rule="unbiased", hadamard=16),
            wgrad_x=_spec("nvfp4", hadamard=16),
        ),
        # arXiv:2604.08826: rotation on wgrad is enough, random rounding makes it worse
        _training(
            "hif4",
            all="hif4",
            wgrad_dy=_spec("hif4", hadamard=64),
            wgrad_x=_spec("hif4", hadamard=64),
        ),
        # arXiv:2505.14669: rotated forward with a scale from the spread of a block; the backward
        # pass rotates anew each step what the forward made, and no gradient passes a clipped value
        _training(
            "quartet",
            fprop_x=_QUEST,
            fprop_w=_QUEST,
            dgrad_dy=_QUARTET,
            dgrad_w=_QUARTET,
            wgrad_dy=_QUARTET,
            wgrad_x=_QUARTET,
            saved="quantized",
            straight_through="unclipped",
        ),
        # arXiv:2601.22813: four-over-six forward, MS-EDEN on all operands of the backward pass
        _training(
            "quartet2",
            all=_EDEN,
            fprop_x=_spec("nvfp4", **_SIX),
            fprop_w=_spec("nvfp4", **_SIX),
        ),
        # arXiv:2606.20381: a uniform grid, all three matmuls rotated, random rounding on dy alone;
        # it states no width, so that of nvfp4
        _training(
            "ufp4",
            all=_spec("nvint4", hadamard=16),
            dgrad_dy=_stochastic("nvint4", hadamard=16),
            wgrad_dy=_stochastic("nvint4", hadamard=16),
        ),
        # ZeroQuant-FP, arXiv:2307.09782, for inference: scales of weight groups are shifts (M1)
        _inference(
            "w4a8",
            all="bf16",
            fprop_x=_spec("fp8_e4m3", scope="row"),
            fprop_w=_spec("fp4_e2m1", scope="block", scale_rule="p2"),
        ),
    )
}
