"""The first wing: local learning coefficients of targets, by many samplers."""
