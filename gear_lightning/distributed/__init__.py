"""How weights are spread over ranks, and what all ranks must agree on."""
