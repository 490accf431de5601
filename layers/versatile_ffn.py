"""VersatileFFN: one gated FFN used in width, as virtual experts, and in depth, by recursion.

arXiv:2512.14531 (adaptive_ffn.md 5). The paper's rules are the defaults; what its released code
does otherwise (no balance loss, contiguous slices, as many loops as the batch's slowest token) is
not copied.

H is the raw residual stream, F(H) = down glu(gate_up norm(H)) one step, m its hidden width:

    width   sum over the k chosen of w_j E_j(H), E_j the step by hidden numbers
            floor(j S) .. floor(j S) + e alone, S = (m - e) / (N - 1); router on H
    depth   H^(L) - H with H^(0) = H, H^(i) = H^(i-1) + F(H^(i-1)); L of 1 .. L_max, predictor on H
    y       lambda width + (1 - lambda) depth, lambda = (L_max - E[L]) / L_max
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import Cost, FFNOutput, WeightCost
from layers.dispatch import count_experts, is_decoding
from layers.linear import Linear
from layers.loop_predictor import Annealing, LoopPredictor, Loops
from layers.moe import check_routing, flatten_inputs, load_stats, route
from layers.names import check_choice, check_positive
from layers.norm import RMSNorm
from layers.scheduled import Scheduled
from layers.swiglu import GATE_FLOPS, GATES, default_d_ff, glu


@dataclass(frozen=True, kw_only=True)
class VersatileFFNConfig:
    """Sizes and options of a VersatileFFN layer; path, fusion and loops hold the paper's controls.

    A dense FFN: path="depth", loops="fixed", max_loops=1; looped k times: max_loops=k. The width
    alone, the depth alone: path; both of equal weight: fusion="average".
    """

    d_model: int
    d_ff: int | None = None  # hidden width m; None: that of a default swiglu
    n_experts: int = 8  # N, virtual experts of the width path
    top_k: int = 2
    d_expert: int | None = None  # e, hidden numbers of one expert; None: m // N
    max_loops: int = 4  # L_max
    path: str = "both"  # both | width | depth
    fusion: str = "difficulty"  # lambda as above | "average": one half of each
    loops: str = "predicted"  # by token | "fixed": max_loops for every token
    loops_loss: bool = False  # the mean of E[L] as a loss "loops", which a recipe may weigh
    activation: str = "silu"  # of the gate, as swiglu's
    temperature: float = 5.0  # of the Gumbel softmax at step 0
    decay: float = 0.99984  # of the temperature, by optimizer step
    floor: float = 0.1  # of the temperature
    anneal: str = "steps"  # by decay, as published | "run": down to the floor by the last step
    norm_eps: float = 1e-6  # of the layer's own norm

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, d_ff=self.hidden, n_experts=self.n_experts)
        check_positive(d_expert=self.expert, top_k=self.top_k, max_loops=self.max_loops)
        check_choice("path", self.path, ("both", "width", "depth"))
        check_choice("fusion", self.fusion, ("difficulty", "average"))
        check_choice("loops", self.loops, ("predicted", "fixed"))
        check_choice("activation of versatile_ffn", self.activation, GATES)
        _ = self.annealing  # its own checks
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k must be at most n_experts={self.n_experts}, got {self.top_k}")
        if self.n_experts * self.expert > self.hidden:
            raise ValueError(
                f"{self.n_experts} experts of d_expert={self.expert} do not fit into "
                f"d_ff={self.hidden}: n_experts * d_expert must be at most that"
            )
        if (self.path, self.fusion, self.loops) == ("both", "difficulty", "fixed"):
            raise ValueError(
                "loops='fixed' makes every token a hard one, so that fusion='difficulty' gives "
                "the width no weight: set fusion='average', or path='depth'"
            )
        if self.loops_loss and not self.predicts:
            raise ValueError("loops_loss is of predicted loops: not path='width', loops='fixed'")

    @property
    def hidden(self) -> int:
        """m, with the default filled in."""
        return default_d_ff(self.d_model) if self.d_ff is None else self.d_ff

    @property
    def expert(self) -> int:
        """e, with the default filled in."""
        return self.hidden // self.n_experts if self.d_expert is None else self.d_expert

    @property
    def starts(self) -> tuple[int, ...]:
        """The first hidden number of each expert; no two experts share any."""
        gaps = max(self.n_experts - 1, 1)
        return tuple(j * (self.hidden - self.expert) // gaps for j in range(self.n_experts))

    @property
    def routes(self) -> bool:
        """Whether there is a width path, and so a router."""
        return self.path != "depth"

    @property
    def predicts(self) -> bool:
        """Whether there is a loop predictor."""
        return self.path != "width" and self.loops == "predicted"

    @property
    def annealing(self) -> Annealing:
        """The temperature's rule."""
        return Annealing(
            start=self.temperature, decay=self.decay, floor=self.floor, over=self.anneal
        )

    @property
    def expert_names(self) -> tuple[str, ...]:
        """What a router chooses among, in the order of its logits and of `stats["counts"]`."""
        return tuple(f"ffn {e}" for e in range(self.n_experts)) if self.routes else ()

    def cost(self, loops: float | None = None) -> Cost:
        """One token's cost; the router counts its own.

        Args:
            loops: loops of a token, as measured in evaluation (mean of `stats["loops"]`), where the
                width takes no projection of its own; None: all of them and the width, as trained.
        """
        n, d = self.d_model * self.hidden, self.d_model
        deep = self.path != "width"
        passes = 1 if not deep else self.max_loops if loops is None else loops
        down = passes * deep + (self.routes and loops is None)
        act = GATE_FLOPS[self.activation] * self.hidden * passes
        items = [
            WeightCost(
                name="norm.weight", role="norm", params=d, other_flops=4 * d * passes, bits=32
            ),
            WeightCost(
                name="gate_up.weight", role="ffn", params=2 * n, flops=4 * n * passes,
                other_flops=act,
            ),
            WeightCost(
                name="down.weight", role="ffn", params=n, flops=2 * n * down,
                other_flops=self.hidden * self.routes + 2 * d * down,
            ),
        ]  # fmt: skip
        if self.predicts:
            rows = self.max_loops
            items.append(
                WeightCost(
                    name="loop_predictor.weight", role="router", params=rows * d,
                    flops=2 * rows * d, other_flops=8 * rows, bits=32,
                )
            )  # fmt: skip
        return Cost(tuple(items))


class VersatileFFN(nn.Module, Scheduled):
    """y = lambda width + (1 - lambda) depth of the module's docstring, from the raw residual.

    Both paths share the first loop's hidden numbers u: sum of w_j E_j = down(w u), each number
    times its expert's weight, so that the width costs one more down projection. Training computes
    every loop for every token. Evaluation sorts tokens by their loops and runs those that go on,
    the width in the projection of the last loop: the same numbers to rounding. Compiled code, whose
    shapes may not hang on data, computes all.

    `gate_up`, `down` and `norm` are drawn as `swiglu`'s, each by its fan in; the paper's 0.02
    stands for its width alone.
    """

    def __init__(self, config: VersatileFFNConfig, router: nn.Module | None = None):
        """router: over `n_experts`; none where path="depth"."""
        super().__init__()
        c = self.config = config
        if (router is None) == c.routes:
            raise ValueError(f"path={c.path!r} takes {'a' if c.routes else 'no'} router")
        if getattr(router, "weights_input", False):
            raise ValueError(
                f"{type(router).__name__} weighs the input of experts (Llama 4), versatile_ffn "
                "weighs their output: give it another router"
            )
        self.router = router
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.gate_up = Linear(c.d_model, 2 * c.hidden, role="ffn")  # [2m, D], gate rows first
        self.down = Linear(c.hidden, c.d_model, role="ffn")  # [D, m]
        self.loop_predictor = (
            LoopPredictor(c.d_model, c.max_loops, c.annealing) if c.predicts else None
        )

    def at_step(self, step: int, max_steps: int) -> None:
        """As `layers.scheduled.Scheduled.at_step`."""
        if self.loop_predictor is not None:
            self.loop_predictor.at_step(step, max_steps)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D], the raw residual; carry: [B, S, E'] for routers that read it; mask: [B, S].

        y is Y - H. stats: "loops" [L_max], tokens by how often they looped; of the router as `moe`.
        """
        c = self.config
        tokens, carry, mask = flatten_inputs(x, carry, mask)
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        weights = logits = loops = counts = None
        if self.router is not None:
            routing, keep = route(self.router, tokens, carry, mask, x.shape[0])
            check_routing(routing, c.n_experts)
            held = routing.weights if keep is None else routing.weights.masked_fill(~keep, 0)
            weights = (F.one_hot(routing.experts, c.n_experts) * held[..., None]).sum(1)  # [T, N]
            logits = routing.logits.unflatten(0, x.shape[:2])
            losses |= routing.losses
            if not is_decoding(tokens):
                stats |= load_stats(routing, c.n_experts, keep, keep)
        if self.loop_predictor is not None:
            loops = self.loop_predictor(tokens)
            counts = stats["loops"] = count_experts(loops.choice, c.max_loops, mask)  # [L]
            if c.loops_loss:
                losses["loops"] = loops.mean(mask)
        if loops is None or counts is None or self.training or torch.compiler.is_compiling():
            y = self._every_loop(tokens, weights, loops)
        else:
            y = self._early_exit(tokens, weights, loops, counts, mask)
        y = y.view_as(x).type_as(x)
        return FFNOutput(y, losses, None if is_decoding(tokens) else stats, logits)

    def _hidden(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        """u = glu(gate_up norm(h)), [T, D] to [T, m]; normed in float32, multiplied as `dtype`."""
        return glu(self.gate_up(self.norm(h).to(dtype)), self.config.activation)

    def _width(self, u: Tensor, weights: Tensor) -> Tensor:
        """Sum over experts of w_j E_j. u: [T, m]; weights: [T, N]. Returns [T, D]."""
        return self.down(weigh(u, weights.to(u.dtype), self.config.starts, self.config.expert))

    def _share(self, loops: Loops | None, like: Tensor) -> Tensor:
        """lambda, [T, 1], of the width path. like: [T, ..]."""
        if loops is None or self.config.fusion == "average":
            return like.new_full((len(like), 1), 0.5)
        return (self.config.max_loops - loops.expected) / self.config.max_loops

    def _every_loop(self, tokens: Tensor, weights: Tensor | None, loops: Loops | None) -> Tensor:
        """All loops of all tokens. tokens: [T, D]; weights: [T, N]. Returns [T, D]."""
        c, wide = self.config, torch.promote_types(tokens.dtype, torch.float32)
        u = self._hidden(tokens, tokens.dtype)
        width = None if weights is None else self._width(u, weights).to(wide)
        if c.path == "width":
            assert width is not None
            return width
        delta = self.down(u).to(wide)  # H^(i) - H, which loses no digits to H
        depth = delta if loops is None else loops.one_hot[:, :1] * delta
        for i in range(1, c.max_loops):
            delta = delta + self.down(self._hidden(tokens + delta, tokens.dtype))
            depth = delta if loops is None else depth + loops.one_hot[:, i, None] * delta
        if width is None:
            return depth
        share = self._share(loops, depth)
        return share * width + (1 - share) * depth

    def _early_exit(
        self, tokens: Tensor, weights: Tensor | None, loops: Loops, counts: Tensor,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The same where no gradient of the choice is asked for: only what a token's loops need.

        Its width and its last loop go through one projection, down((1 - lambda) u + lambda w u_1):
        what a token costs is its loops. counts: [L], real tokens by their loops; padding stands
        last, and nothing is run for it.
        """
        c, wide = self.config, torch.promote_types(tokens.dtype, torch.float32)
        goes_on = counts.flip(0).cumsum(0).flip(0).tolist()  # tokens of at least 1, 2, .. L loops
        longest = loops.choice[:, 0] if mask is None else loops.choice[:, 0].where(mask, -1)
        order = longest.argsort(descending=True, stable=True)[: goes_on[0]]
        h = tokens[order]
        u = self._hidden(h, tokens.dtype)
        narrow = share = None
        if weights is not None:
            narrow = weigh(u, weights[order].to(u.dtype), c.starts, c.expert)
            share = self._share(Loops(loops.choice[order], loops.one_hot[order]), narrow)
        delta, ended = torch.zeros_like(h, dtype=wide), list[Tensor]()
        for n in (*goes_on[1:], 0):  # that go on after this loop: the first n
            before = delta[n:]
            if narrow is not None and share is not None:
                rest = 1 - share[n : len(u)]
                mixed = torch.lerp(narrow[n : len(u)], u[n:], rest.to(u.dtype))
                u, before = torch.cat((u[:n], mixed)), rest * before
            step = self.down(u)
            ended.append(before + step[n:])
            if n:
                delta = delta[:n] + step[:n]
                u = self._hidden(h[:n] + delta, tokens.dtype)
            else:
                break
        y = torch.cat(ended[::-1])
        return y.new_zeros(tokens.shape).index_copy(0, order, y)


def weigh(u: Tensor, weights: Tensor, starts: tuple[int, ...], size: int) -> Tensor:
    """Each hidden number times the weight of the expert that owns it, 0 where none does.

    u: [T, m]; weights: [T, N]; starts: ascending, the first number of each; size: numbers of each.
    """
    n, width = len(starts), u.shape[-1]
    if n * size == width:
        return (u.unflatten(-1, (n, size)) * weights[..., None]).flatten(-2)
    parts, end = [], 0
    for j, start in enumerate(starts):
        own = u[:, start : start + size] * weights[:, j, None]
        parts.append(F.pad(own, (start - end, 0)))
        end = start + size
    return F.pad(torch.cat(parts, dim=-1), (0, width - end))
