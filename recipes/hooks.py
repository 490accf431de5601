"""What modules return while an evaluation runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

S = TypeVar("S")


@contextmanager
def seen_in(
    model: nn.Module,
    modules: Mapping[int, nn.Module],
    keep: Callable[[Any, tuple[Any, ...], Any], S],
) -> Iterator[dict[int, S]]:
    """{layer: keep(module, inputs, output)}, filled anew by every forward in the context.

    torch.compile does not promise to notice hooks that come and go (it skips their guards), so a
    compiled model that has any of the modules runs eagerly in here.

    Args:
        model: whose forwards are watched.
        modules: by layer.
        keep: what to keep of a call.
    """
    seen: dict[int, S] = {}
    with ExitStack() as open_:
        for layer, module in modules.items():

            def hook(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                seen[layer] = keep(module, args, output)

            open_.callback(module.register_forward_hook(hook).remove)
        if modules and any(m._compiled_call_impl is not None for m in model.modules()):
            open_.enter_context(torch.compiler.set_stance("force_eager"))
        yield seen
