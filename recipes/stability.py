"""Did a run diverge, and how often did it spike? Pure functions of a curve's losses.

After arXiv:2405.18710 (precision.md section 14): a run diverged when its loss rose above its
initial plateau or is no number; a spike is a loss above the running mean by five standard
deviations. What the paper leaves open is settled here, and the same for every run:

- the plateau is the first loss, which no update has touched yet;
- above it is the mean of WINDOW losses by more than MARGIN, so that no single batch decides, or
  the loss that the run ends with;
- running mean and deviation are those of the WINDOW losses before, without the spike itself.

Losses may have any unit, and any number of steps may lie between two; one per step is meant
(`trainer.log_every_steps: 1`), for a mean over several steps hides short spikes.
"""

from collections import deque
from collections.abc import Sequence
from math import isfinite
from statistics import fmean, pstdev

from layers.names import check_positive

WINDOW = 32  # losses
MARGIN = 0.02  # of the plateau
DEVIATIONS = 5.0


def diverged_at(
    losses: Sequence[float], *, window: int = WINDOW, margin: float = MARGIN
) -> int | None:
    """Where a run diverged: the index of the loss that tells; None where it did not.

    That is the first loss that is no finite number, or the last of the first `window` whose mean
    lies above (1 + margin) times the first loss, or the last loss of all if it lies above that.
    A run that comes down again has diverged too: what it had learned was lost.

    Raises:
        ValueError: window or margin is not positive.
    """
    check_positive(window=window, margin=margin)
    recent: deque[float] = deque(maxlen=window)
    top = (1 + margin) * losses[0] if losses else 0.0
    for i, loss in enumerate(losses):
        if not isfinite(loss):
            return i
        recent.append(loss)
        if len(recent) == window and fmean(recent) > top:
            return i
    return len(losses) - 1 if losses and losses[-1] > top else None


def spikes(
    losses: Sequence[float], *, window: int = WINDOW, deviations: float = DEVIATIONS
) -> tuple[int, ...]:
    """The indices at which spikes begin: loss > mean + deviations * sd of the `window` before.

    Losses of a spike do not enter mean and deviation, and a spike ends with the first loss that
    is back below; one that lasts for `window` losses is the new level, from which on counting
    starts anew. The first `window` losses cannot spike, nor can those that are not finite: they
    are a divergence.

    Raises:
        ValueError: window is below two, or deviations not positive.
    """
    check_positive(window=window, deviations=deviations)
    if window < 2:
        raise ValueError(f"window must be 2 or more for a deviation, got {window}")
    calm: deque[float] = deque(maxlen=window)
    found: list[int] = []
    lasting = 0  # losses of the spike that is on
    for i, loss in enumerate(losses):
        if not isfinite(loss):
            break
        above = len(calm) == window and loss > fmean(calm) + deviations * pstdev(calm)
        if above and not lasting:
            found.append(i)
        lasting = lasting + 1 if above else 0
        if lasting == window:
            calm.clear()
            lasting = 0
        if not above:
            calm.append(loss)
    return tuple(found)
