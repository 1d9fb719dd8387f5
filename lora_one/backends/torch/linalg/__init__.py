"""Matrix products and decompositions, each in the way that is fast on its device."""
