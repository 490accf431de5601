"""Mix'n'Match: a width for each layer of a trained nested model, within a budget.

MatFormer, arXiv:2310.07707, 3.3: widths that do not fall with depth and rise by the least slope.
Equal layers share two neighbouring granularities: the last ones get the wider, as many as the
budget pays for. Layers that differ climb one granularity after another, each time the last first.
"""

from collections.abc import Mapping, Sequence

from layers.names import check_positive
from zoo.budget import measure_of
from zoo.model import LanguageModel, ModelConfig, model_cost

Widths = tuple[int | None, ...]  # one for each layer, as a model's forward takes them
Tables = Mapping[int, Sequence[int]]  # rising widths of each nested layer


def least_slope(
    model: LanguageModel | ModelConfig,
    *,
    hidden: int | None = None,
    params: float | None = None,
    flops: float | None = None,
    multiple_of: int | None = None,
    seq_len: int | None = None,
) -> Widths:
    """The widths of the largest submodel within a budget, None for a layer that is not nested.

    For the model's forward, or for `zoo.extract`.

    Args:
        model: some of its layers are nested (matformer, or moe without shared experts).
        hidden: budget of hidden numbers, summed over nested layers; of a mixture, of one expert.
        params: of the submodel's parameters, as `LanguageModel.cost` counts them, embedding too.
        flops: of its FLOPs per token, forward.
        multiple_of: also widths between two granularities, in even steps rounded to multiples of
            this, at which the model was not trained; None: granularities alone.
        seq_len: at which FLOPs are counted; None: the model's `max_seq_len`.

    Raises:
        ValueError: for no or two budgets, one below the narrowest submodel's cost, a model without
            nested layers, or nested layers of different numbers of granularities.
    """
    config = model.config if isinstance(model, LanguageModel) else model
    given = {"hidden": hidden, "params": params, "flops": flops}
    said = {name: budget for name, budget in given.items() if budget is not None}
    if len(said) != 1:
        raise ValueError(f"least_slope takes one of {', '.join(given)}, got {list(said) or 'none'}")
    [(name, budget)] = said.items()
    tables = _tables(config)
    if multiple_of is not None:
        tables = dict(zip(tables, finer(list(tables.values()), multiple_of), strict=True))
    fixed, costs = _costs(config, tables, name, seq_len or config.max_seq_len)
    least = fixed + sum(row[0] for row in costs)
    if budget < least:
        raise ValueError(f"{name}={budget} is below the narrowest submodel's {least:,.0f}")
    levels = dict(zip(tables, climb(costs, budget - fixed), strict=True))
    return tuple(tables[i][levels[i]] if i in levels else None for i in range(config.n_layers))


def climb(costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The level of each layer: no step more would stay within the budget.

    Args:
        costs: what each layer costs at each of its levels, rising; the first layer first.
        budget: for all of them; at least that of the lowest levels.
    """
    first, levels = costs[0], [0] * len(costs)
    if all(row == first for row in costs):
        return _climb_alike(first, len(costs), budget)
    left = budget - sum(row[0] for row in costs)
    for level in range(1, len(first)):
        for i in reversed(range(len(costs))):
            left -= costs[i][level] - costs[i][level - 1]
            if left < 0:
                return levels
            levels[i] = level
    return levels


def _climb_alike(costs: Sequence[float], n: int, budget: float) -> list[int]:
    """`climb` of n equal layers, in closed form. costs: of one layer at each level."""
    low = max((i for i, cost in enumerate(costs) if n * cost <= budget), default=0)
    if low == len(costs) - 1:
        return [low] * n
    raised = int((budget - n * costs[low]) // (costs[low + 1] - costs[low]))
    return [low] * (n - raised) + [low + 1] * raised


def finer(tables: Sequence[Sequence[int]], multiple_of: int) -> list[list[int]]:
    """Widths between granularities: linear, rounded to a multiple; the trained ones stay as is.

    Each layer gets as many steps as the one with the widest gap has multiples in it, so that equal
    levels of different layers are the same share of the way.

    Args:
        tables: rising widths of each layer, as many each.
        multiple_of: what widths in between are rounded to.
    """
    check_positive(multiple_of=multiple_of)
    made = [[table[0]] for table in tables]
    for j in range(1, len(tables[0])):
        n = max(1, *((table[j] - table[j - 1]) // multiple_of for table in tables))
        for k in range(1, n):
            for row, table in zip(made, tables, strict=True):
                low, high = table[j - 1], table[j]
                nearest = round((low + (high - low) * k / n) / multiple_of) * multiple_of
                row.append(min(max(nearest, low), high))
        for row, table in zip(made, tables, strict=True):
            row.append(table[j])
    return made


def _tables(config: ModelConfig) -> dict[int, Sequence[int]]:
    """Granularities of each nested layer."""
    every = [getattr(choice.config, "granularities", ()) for choice in config.layers()]
    tables = {i: table for i, table in enumerate(every) if table}
    if not tables:
        raise ValueError("no layer of this model is nested, so each has one width alone")
    if len({len(table) for table in tables.values()}) > 1:
        counts = ", ".join(f"{len(table)} in layer {i}" for i, table in tables.items())
        raise ValueError(f"nested layers must have as many granularities each, got {counts}")
    return tables


def _costs(
    config: ModelConfig, tables: Tables, name: str, seq_len: int
) -> tuple[float, list[list[float]]]:
    """What a submodel costs whatever its widths, and what each nested layer adds at each."""
    if name == "hidden":
        return 0, [[float(width) for width in table] for table in tables.values()]
    measure, choices = measure_of(name), config.layers()
    costs = [
        [measure(choices[i].cost(seq_len, width=width)) for width in table]
        for i, table in tables.items()
    ]
    nested = sum(measure(choices[i].cost(seq_len)) for i in tables)
    return measure(model_cost(config, seq_len)) - nested, costs
