"""Soft MoE: experts run on mixtures of a sequence's tokens (arXiv:2308.00951, sec. 2.1 and alg. 1).

Q = n_experts * slots_per_expert slots, those of an expert side by side.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import Cost, FFNOutput, WeightCost
from layers.experts import Experts, ExpertsConfig, default_d_expert
from layers.names import check_choice, check_positive

DECISIONS = ("prefix", "whole")
EPS = 1e-6  # below the square sums that rows are divided by the root of
LECUN_CUT = 0.87962566103423978  # std of a standard normal cut at two deviations


@dataclass(frozen=True, kw_only=True)
class SoftMoEConfig:
    """Sizes and options of a Soft MoE."""

    d_model: int
    d_expert: int | None = None  # hidden width F of one expert; None: of a default swiglu
    n_experts: int = 8
    slots_per_expert: int = 8  # p; the paper has as many slots as a sequence has tokens
    activation: str = "silu"  # of the gate, as swiglu's; as mlp's where not gated
    gated: bool = True
    noise: float = 0.0  # std of normal noise on the logits, in training
    decision: str = "prefix"  # in evaluation; "whole": as in training, to measure the gap

    costs_by_sequence: ClassVar[bool] = True  # a token's cost hangs on its sequence's length
    causal: ClassVar[bool] = False  # a slot mixes the whole sequence in training

    def __post_init__(self) -> None:
        check_positive(
            d_model=self.d_model,
            n_experts=self.n_experts,
            slots_per_expert=self.slots_per_expert,
        )
        _ = self.experts  # its own checks
        check_choice("decision", self.decision, DECISIONS)
        if self.noise < 0:
            raise ValueError(f"noise must not be negative, got {self.noise}")

    @property
    def hidden(self) -> int:
        """F of one expert, with the default filled in."""
        return default_d_expert(self.d_model, 1) if self.d_expert is None else self.d_expert

    @property
    def n_slots(self) -> int:
        """Q, slots of a sequence."""
        return self.n_experts * self.slots_per_expert

    @property
    def experts(self) -> ExpertsConfig:
        """The experts that slots run through."""
        return ExpertsConfig(
            d_model=self.d_model, d_expert=self.hidden, n_experts=self.n_experts,
            activation=self.activation, gated=self.gated,
        )  # fmt: skip

    def cost(self, seq_len: int | None = None) -> Cost:
        """One token's cost in training, where Q slots are filled from `seq_len` tokens.

        By default from Q tokens, so that an expert runs once per token. Every expert is read for
        every token, so all parameters are active. Evaluation by "prefix" fills Q slots for each
        token: that multiplies the experts' share by `seq_len`.
        """
        n_slots, d = self.n_slots, self.d_model
        runs = n_slots / (n_slots if seq_len is None else seq_len)
        experts = self.experts.cost(runs).within("experts.")
        every = tuple(replace(item, active_units=item.units) for item in experts)
        # three products of D Q: logits, dispatch, combine; two softmaxes; x to unit length
        mix = WeightCost(
            name="mu", role="router", params=n_slots * d, flops=6 * n_slots * d,
            other_flops=10 * n_slots + 4 * d, bits=32,
        )  # fmt: skip
        return Cost((mix, WeightCost(name="scale", role="router", params=1, bits=32), *every))


class SoftMoE(nn.Module):
    """y_t = sum over slots q of C_tq E_q(sum over tokens i of D_iq x_i), for each sequence, with

    l_iq = scale <x_i / |x_i|, mu_q / |mu_q|>, D = softmax of l over tokens, C over slots, and E_q
    the expert that slot q belongs to. Has no losses and no counts: every slot is always filled.

    In training a token reads later ones. Evaluation is causal ("prefix"): token t mixes slots that
    were filled by tokens up to t alone, from running sums in float32, so it gives y_t of the
    training rule on its prefix. That costs Q expert rows for each token. Logits, softmaxes and
    mixing are in float32 (the released code mixes in bfloat16). Masked tokens fill no slot.
    """

    def __init__(self, config: SoftMoEConfig):
        super().__init__()
        c = self.config = config
        self.mu = nn.Parameter(torch.empty(c.n_slots, c.d_model))
        self.scale = nn.Parameter(torch.empty(1))
        self.experts = Experts(c.experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw mu anew, lecun-normal; scale 1. Experts draw their own."""
        std = self.config.d_model**-0.5 / LECUN_CUT
        nn.init.trunc_normal_(self.mu, std=std, a=-2 * std, b=2 * std)
        nn.init.ones_(self.scale)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool, True where a token is real. carry is not read."""
        c = self.config
        dtype = torch.promote_types(x.dtype, torch.float32)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)  # whatever stands there, NaN included
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.to(dtype)
            logits = F.linear(_unit(tokens), self.scale.to(dtype) * _unit(self.mu.to(dtype)))
            if c.noise and self.training:
                logits = logits + c.noise * torch.randn_like(logits)
        prefix = c.decision == "prefix" and not self.training
        y = (self._prefix if prefix else self._whole)(tokens, logits, mask, x.dtype)
        y = y if mask is None else y.masked_fill(~mask[..., None], 0)
        return FFNOutput(y=y.to(x.dtype))

    def _whole(
        self, tokens: Tensor, logits: Tensor, mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Slots from all of a sequence. tokens: [B, S, D]; logits: [B, S, Q]. Returns [B, S, D]."""
        over_tokens = logits
        if mask is not None:
            over_tokens = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)
        fill = over_tokens.softmax(1)
        if mask is not None:  # without one real token the softmax is even over what is none
            fill = fill * mask[..., None]
        slots = _matmul(fill.transpose(1, 2), tokens)  # [B, Q, D]
        return _matmul(logits.softmax(-1), self._run(slots, dtype))

    def _prefix(
        self, tokens: Tensor, logits: Tensor, mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """As `_whole`, slots of token t from tokens up to t.

        Sums are taken relative to the largest logit so far, so that none overflows or vanishes.
        """
        least = torch.finfo(logits.dtype).min
        weights = logits.softmax(-1)
        top = torch.full_like(logits[:, 0], least) if logits.shape[1] else logits.sum(1)  # [B, Q]
        count = torch.zeros_like(top)
        total = tokens.new_zeros(*top.shape, tokens.shape[-1])  # [B, Q, D]
        ys: list[Tensor] = []
        for t in range(tokens.shape[1]):
            now = (
                logits[:, t] if mask is None else logits[:, t].masked_fill(~mask[:, t, None], least)
            )
            before, top = top, torch.maximum(top, now)
            shrink, added = (before - top).exp(), (now - top).exp()  # [B, Q] each
            if mask is not None:
                added = added * mask[:, t, None]
            count = count * shrink + added
            total = total * shrink[..., None] + added[..., None] * tokens[:, t, None]
            slots = total / count.clamp_min(torch.finfo(count.dtype).tiny)[..., None]
            ys.append(_matmul(weights[:, t, None], self._run(slots, dtype)))  # [B, 1, D]
        return torch.cat(ys, dim=1) if ys else tokens

    def _run(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """Each slot through its expert: a token whose choice is given. [B, Q, D] both ways."""
        c = self.config
        rows = slots.flatten(0, 1).to(dtype)  # [B * Q, D]
        expert = torch.arange(c.n_experts, device=rows.device).repeat_interleave(c.slots_per_expert)
        routed = expert.repeat(slots.shape[0])[:, None]
        y = self.experts(rows, routed, torch.ones_like(routed, dtype=slots.dtype))
        return y.view_as(slots).to(slots.dtype)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1 (of length 0, where they are 0). x: [..., D]."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
