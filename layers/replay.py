"""Routing that is decided once: recorded, taken again, or forced (moe.md 16.4 and 17).

Every choice in a router, or by a capacity, is handed through `decided`, which gives it back. On a
tape it may keep a copy, or give back another: what an earlier forward chose. So a recomputed
forward takes the recorded choices however its logits have moved (another rounding, another
precision), and shapes and saved tensors fit; weights are worked out anew at these choices, so that
gradients flow. Choices are the ids of experts (and of groups), and which of them are kept.

Compiled code looks at no tape: it runs no Python, and its recomputation is of one traced graph.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from types import TracebackType

import torch
from torch import Tensor

COMPILED = "no routed layer ran, or the model is compiled and keeps no account of its choices"


class Tape(AbstractContextManager["Tape"]):
    """While entered, `decided` asks it. May be entered again: a graph may be recomputed twice."""

    def __init__(self) -> None:
        self._outer: Tape | None = None
        self._tokens: list[Token[Tape | None]] = []

    def __enter__(self) -> "Tape":
        self._outer = _TAPE.get()
        self._tokens.append(_TAPE.set(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _TAPE.reset(self._tokens.pop())

    def take(self, choice: Tensor, n_choices: int | None) -> Tensor:
        """What stands for `choice`; arguments as `decided`'s."""
        return choice if self._outer is None else self._outer.take(choice, n_choices)


_TAPE: ContextVar[Tape | None] = ContextVar("routing_tape", default=None)  # of this thread


def decided(choice: Tensor, n_choices: int | None = None) -> Tensor:
    """The choice that holds: the one given, unless a tape says another.

    Args:
        choice: [T, K] int64 ids, or bool, which of a token's choices are kept.
        n_choices: of ids, how many there are to choose from.
    """
    if torch.compiler.is_compiling():
        return choice
    tape = _TAPE.get()
    return choice if tape is None else tape.take(choice, n_choices)


class _Recording(Tape):
    """Adds each choice that holds to a list."""

    def __init__(self, held: list[Tensor]):
        super().__init__()
        self._held = held

    def take(self, choice: Tensor, n_choices: int | None) -> Tensor:
        choice = super().take(choice, n_choices)
        self._held.append(choice.detach())
        return choice


class _Replaying(Tape):
    """Gives back a list's choices in their order, whatever is chosen now."""

    def __init__(self, held: Sequence[Tensor]):
        super().__init__()
        self._held = held
        self.place = 0  # choices given back

    def __enter__(self) -> "Tape":
        self.place = 0
        return super().__enter__()

    def take(self, choice: Tensor, n_choices: int | None) -> Tensor:
        if self.place == len(self._held):
            raise ValueError(
                f"the record holds {self.place} choices and the forward makes more: replay it in "
                "the model and for the inputs that it was made with"
            )
        held, self.place = self._held[self.place], self.place + 1
        if held.shape != choice.shape or held.dtype != choice.dtype:
            raise ValueError(
                f"choice {self.place - 1} of the record is {held.dtype} {list(held.shape)}, the "
                f"forward makes {choice.dtype} {list(choice.shape)}: replay it in the model and "
                "for the inputs that it was made with"
            )
        return held.to(choice.device)


class _Balanced(Tape):
    """Deals the ids out in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.forced = 0

    def take(self, choice: Tensor, n_choices: int | None) -> Tensor:
        if n_choices is None:
            return choice
        self.forced += 1
        dealt = torch.arange(choice.numel(), device=choice.device)
        return dealt.remainder(n_choices).view_as(choice)


def checkpoint_contexts() -> tuple[Tape, Tape]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`: recomputation takes what was chosen.

    Else a router that decides anew on logits rounded otherwise gives other shapes, or gradients of
    another function (NVIDIA-NeMo/Automodel#3325). Not for compiled code, which refuses it.
    """
    held: list[Tensor] = []
    return _Recording(held), _Replaying(held)


@contextmanager
def record_routing() -> Iterator[list[Tensor]]:
    """Keep what routers choose: `with record_routing() as routes: model(x)`.

    Yields:
        A list that grows by each choice, in the order in which they are made: [T, K] int64 ids of
        experts, [T, G] of groups where a choice is limited to some, [T, K] bool where choices are
        kept or not. Plain tensors, to be saved and replayed elsewhere.

    Raises:
        ValueError: at the end, when nothing was recorded.
    """
    routes: list[Tensor] = []
    with _Recording(routes):
        yield routes
    if not routes:
        raise ValueError(f"nothing was recorded: {COMPILED}")


@contextmanager
def replay_routing(routes: Sequence[Tensor]) -> Iterator[None]:
    """Choose as recorded: `with replay_routing(routes): loss(model(x)).backward()`.

    Weights, losses and logits are those of the current parameters, at the recorded choices.

    Args:
        routes: of `record_routing`, by forwards of the same shapes in the same mode (training
            limits capacities and makes choices of its own; evaluation does not), on any device.

    Raises:
        ValueError: for a choice of another shape, one too many, or at the end one too few.
    """
    tape = _Replaying(routes)
    with tape:
        yield
    if tape.place != len(routes):
        raise ValueError(
            f"the record holds {len(routes)} choices, {tape.place} were replayed: "
            f"{COMPILED if not tape.place else 'the forward makes fewer than the recorded one'}"
        )


@contextmanager
def force_balance() -> Iterator[None]:
    """Deal experts out in turn, as even as can be: for timing a mixture apart from its router.

    Routers that keep by a threshold, not by a number (remoe, expert_choice), are left as they are.

    Raises:
        ValueError: at the end, when nothing was forced.
    """
    tape = _Balanced()
    with tape:
        yield
    if not tape.forced:
        raise ValueError(f"no choice was forced: {COMPILED}, or it keeps experts by a threshold")


def join_routes(routes: Sequence[Tensor], n_forwards: int, n_sequences: int) -> list[Tensor]:
    """One record for whole sequences, from that of forwards that each brought their next tokens.

    So what a model chose while it generated with a cache is replayed by one training forward over
    prompt and answer (its last token, which no forward read, left out).

    Args:
        routes: of `record_routing` around all of the forwards.
        n_forwards: how many there were; each made as many choices.
        n_sequences: B; each choice is [B * S', ...] for the S' tokens of its forward.

    Returns:
        As many choices as one forward makes, [B * S, ...] each.

    Raises:
        ValueError: when the record does not split into so many forwards or sequences.
    """
    if n_forwards < 1 or len(routes) % n_forwards:
        raise ValueError(f"{len(routes)} choices are not those of {n_forwards} forwards alike")
    if n_sequences < 1 or any(len(choice) % n_sequences for choice in routes):
        raise ValueError(f"the choices are not of {n_sequences} sequences")
    per = len(routes) // n_forwards
    joined = []
    for i in range(per):
        parts = [choice.unflatten(0, (n_sequences, -1)) for choice in routes[i::per]]
        joined.append(torch.cat(parts, dim=1).flatten(0, 1))
    return joined
