"""Studies of many trials: how batch size, learning rate, richness and width shape training."""
