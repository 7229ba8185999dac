"""lambda_hat: software for people who study how neural networks learn."""

__version__ = "0.1.0"
