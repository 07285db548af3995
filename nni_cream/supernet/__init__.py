"""How a supernet runs: the paths through it, and its batch norms."""
