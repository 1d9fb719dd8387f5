"""What the singular directions of all layers are worth -> a rank per layer, for a number of parameters in all."""

from collections.abc import Sequence


def allotted_ranks(values: Sequence[Sequence[float]], prices: Sequence[int], budget: int) -> list[int]:
    """Return the rank of each layer: the directions that are worth most for their price, as far as the budget goes.

    The first direction of each layer is bought in any case. The others follow in the order of value / price, ties in
    the order of the layers. One that costs more than is left is passed over for cheaper ones of other layers, so that
    less is left than any further direction costs. Directions of no value are not bought. Where all prices are equal, no
    other ranks of this total hold more value.

    Args:
        values: of each layer's directions, not rising. Their number is the largest rank of the layer.
        prices: parameters of a direction of each layer, out + in.
        budget: parameters of all layers together, not below the sum of the prices.

    >>> allotted_ranks([[9.0, 5.0, 1.0], [4.0, 0.5, 0.1]], prices=[10, 10], budget=40)
    [3, 1]
    """
    left = budget - sum(prices)
    if left < 0:
        raise ValueError(f"the budget must be >= {sum(prices)}, the price of rank 1 in all layers, got {budget}")
    ranks = [1] * len(values)
    offers = [(value / prices[layer], layer) for layer, of_layer in enumerate(values) for value in of_layer[1:]]
    for worth, layer in sorted(offers, key=lambda offer: -offer[0]):  # stable
        if worth > 0.0 and prices[layer] <= left:
            left -= prices[layer]
            ranks[layer] += 1
    return ranks
