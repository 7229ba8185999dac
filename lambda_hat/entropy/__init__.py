"""Studies of policy entropy: what one update of a policy does to it, and which training sequences do it."""
