"""Trained networks with their data and checkpoints, one file or folder a family; `families` lists them."""
