"""The local posterior and what draws from it, one file a sampler; `kinds` lists them."""
