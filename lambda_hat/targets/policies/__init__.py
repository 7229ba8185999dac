"""Policies: small language models of verifiable tasks, trained here, and how they sample and learn."""
