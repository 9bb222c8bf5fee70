"""Expert pools: which experts a request may use, how they are chosen, and how drift changes them."""
