"""Products and decompositions, as each device is quick at them."""
