"""What is asked for: specs and their ids, the KEY=VALUE grammar, settings."""
