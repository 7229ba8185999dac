"""How it is computed: long loops in chunks, random numbers for hot loops, JAX's configuration."""
