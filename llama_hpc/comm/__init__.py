"""Communication of the token loop: reductions, activations between stages, outcomes, the shared counter."""
