"""ALiBi's slopes (arXiv 2108.12409), as BLOOM and Baichuan take them."""

import math


def slopes(heads: int) -> tuple[float, ...]:
    """Return what the distance to a key costs in each head; heads beyond a power of two take odd steps in between."""
    whole = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** (-(2.0 ** -(math.log2(whole) - 3)))
    found = [base**power for power in range(1, whole + 1)]
    between = 2.0 ** (-(2.0 ** -(math.log2(2 * whole) - 3)))
    found += [between**power for power in range(1, 2 * (heads - whole) + 1, 2)]
    return tuple(found)
