"""State that is a function of the optimizer step: temperatures, sparsity that sets in."""

from abc import ABC, abstractmethod


class Scheduled(ABC):
    """A module with a buffer that `forward` only reads and that training sets before each step.

    What stands in the buffer after training is what evaluation and decoding read, so it is saved
    with the weights; a run that goes on sets it anew and has nothing else to restore.
    """

    @abstractmethod
    def at_step(self, step: int, max_steps: int) -> None:
        """Set the buffer for the step about to be taken.

        Args:
            step: optimizer steps already taken.
            max_steps: optimizer steps of the whole run.
        """
