"""A decoder-only transformer of the shape of Llama and Qwen2, whole or a few tokens at a time with a cache.

With n(x) = s * x / sqrt(mean(x^2) + epsilon) (RMSNorm, scale s), the residual stream x of a token at position t goes through

  x <- x + W_o attention(n(x)),   x <- x + W_down (silu(W_gate n(x)) * W_up n(x))

in each layer, and its logits are W_u n(x), W_u being the embedding's transpose where embeddings are tied. Query head h attends
to key and value head h // (num_heads / num_kv_heads) (grouped-query attention, arXiv 2305.13245). Queries and keys of dimension
D are rotated by position (RoPE, arXiv 2104.09864): coordinates i and i + D/2 together, by the angle t rope_base^(-2i/D). This
is the half-split order of Hugging Face's `rotate_half`; weights made for neighbouring pairs (2i, 2i+1), as in GGUF files of
Llama, need their rows of queries and keys permuted first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Self

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from lambda_hat.specs.spec import Spec
from lambda_hat.targets.target import Params

#: Of a linear map W, (in, out): A, (in, rank), and B, (rank, out); the map is then W + A B. By the name of its module.
Adapters = Mapping[str, tuple[jax.Array, jax.Array]]


class DecoderSpec(Spec):
    """A decoder that is trained from random weights; its vocabulary comes from the tokenizer."""

    kind: Literal["decoder"] = "decoder"
    width: int = Field(32, ge=2, description="dimension of the residual stream")
    num_layers: int = Field(2, ge=1, le=1000, description="layers of attention and MLP")
    num_heads: int = Field(4, ge=1, description="query heads, each of dimension width / num_heads")
    num_kv_heads: int = Field(2, ge=1, description="key and value heads, each shared by num_heads / num_kv_heads query heads")
    mlp_width: int = Field(64, ge=1, description="hidden units of the gated MLP (SwiGLU)")
    rope_base: float = Field(10_000.0, gt=1, description="base of the rotary embedding's wavelengths")
    norm_epsilon: float = Field(1e-6, gt=0, description="added to the mean square in RMSNorm")
    attention_bias: bool = Field(False, description="whether queries, keys and values have biases, as in Qwen2")
    tied_embeddings: bool = Field(False, description="whether the logits are products with the tokens' own embeddings")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"width must be an even multiple of num_heads, {self.num_heads}, since rotations take pairs of coordinates; "
                f"got {self.width}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, {self.num_kv_heads}; got {self.num_heads}")
        return self

    @property
    def head_dim(self) -> int:
        """Dimension D of a head."""
        return self.width // self.num_heads


class Cache(NamedTuple):
    """A layer's keys, rotated, (B, kv heads, D, S), and values, (B, kv heads, S, D), of the positions so far, S being the
    longest sequence; laid out for the sums over D and over S of a single query."""

    keys: jax.Array
    values: jax.Array


#: Of all layers, apart, so that a loop can write into each where it is.
Caches = tuple[Cache, ...]


class Adapted(NamedTuple):
    """Parameters with adapters, which a decoder's functions take as parameters too."""

    params: Params
    adapters: Adapters


#: (params, tokens_BT) -> logits_BTV; those at t depend on the tokens up to t.
Apply = Callable[[Params, jax.Array], jax.Array]

#: (params, caches, tokens_BT, starts_B) -> (logits_BTV, caches), of tokens at positions starts_b, starts_b + 1, ... below S. A
#: token sees what the caches hold up to its own position, so positions are filled without gaps; what lies beyond, such as
#: padding, is overwritten in time.
Step = Callable[[Params, Caches, jax.Array, jax.Array], tuple[jax.Array, Caches]]


class Decoder(NamedTuple):
    """The network as pure functions. Parameters are {module: {name: array}}, weights (in, out).

    init: (seed, dtype) -> params, on the host: weights from N(0, 1/in), embeddings from N(0, 1/width), scales 1, biases 0; the
      same numbers in every dtype. shapes: () -> what init gives, without the numbers. init_caches: (B, S, dtype) -> empty ones.
    """

    init: Callable[[tuple[int, ...], Any], Params]
    shapes: Callable[[], Params]
    apply: Apply
    step: Step
    init_caches: Callable[[int, int, Any], Caches]


@functools.cache
def decoder(spec: DecoderSpec, vocab_size: int) -> Decoder:
    """Cached, so that equal specs give the same functions and compile once."""

    def forward(
        tokens_BT: jax.Array, positions_BT: jax.Array, caches: Caches | None, adapters: Adapters
    ) -> tuple[jax.Array, Caches | None]:
        def adapt(next_f: Any, args: tuple, kwargs: dict, context: Any) -> jax.Array:
            out = next_f(*args, **kwargs)
            if context.method_name != "__call__" or context.module.module_name not in adapters:
                return out
            a, b = adapters[context.module.module_name]
            return out + (args[0] @ a) @ b

        embed = hk.Embed(vocab_size, spec.width, w_init=jnp.zeros, name="embedding")
        x = embed(tokens_BT)
        written: list[Any] = []
        with hk.intercept_methods(adapt):
            for layer in range(spec.num_layers):
                own = None if caches is None else caches[layer]
                with hk.name_scope(f"layer_{layer}"):
                    out, own = _attention(spec, _rms_norm(spec, "attention_norm", x), positions_BT, own)
                    x = x + out
                    h = _rms_norm(spec, "mlp_norm", x)
                    h = jax.nn.silu(_linear("gate", spec.mlp_width, h)) * _linear("up", spec.mlp_width, h)
                    x = x + _linear("down", spec.width, h)
                written.append(own)
            x = _rms_norm(spec, "norm", x)
            logits = x @ embed.embeddings.T if spec.tied_embeddings else _linear("unembedding", vocab_size, x)
        return logits, None if caches is None else tuple(written)

    network: Any = hk.without_apply_rng(hk.transform(forward))

    def call(params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, caches: Caches | None) -> tuple[jax.Array, Any]:
        params, adapters = params if isinstance(params, Adapted) else (params, {})
        return network.apply(params, tokens_BT, positions_BT, caches, adapters)

    def shapes() -> Params:
        zeros = np.zeros((1, 1), np.int32)
        return jax.eval_shape(network.init, jax.random.key(0), zeros, zeros, None, {})

    def init(seed: tuple[int, ...], dtype: Any) -> Params:
        rng = np.random.default_rng(seed)

        def initial(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if name in ("scale", "b"):
                return np.full(shape, name == "scale", dtype)
            fan_in = spec.width if name == "embeddings" else shape[0]
            return (rng.standard_normal(shape) / math.sqrt(fan_in)).astype(dtype)

        return {module: {name: initial(name, leaf.shape) for name, leaf in own.items()} for module, own in shapes().items()}

    def apply(params: Params, tokens_BT: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        return call(params, tokens_BT, jnp.broadcast_to(positions, tokens_BT.shape), None)[0]

    def step(params: Params, caches: Caches, tokens_BT: jax.Array, starts_B: jax.Array) -> tuple[jax.Array, Caches]:
        positions = starts_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        return call(params, tokens_BT, positions, caches)

    def init_caches(batch: int, length: int, dtype: Any) -> Caches:
        values = jnp.zeros((batch, spec.num_kv_heads, length, spec.head_dim), dtype)
        return (Cache(values.swapaxes(2, 3), values),) * spec.num_layers

    return Decoder(init, shapes, apply, step, init_caches)


def _linear(name: str, width: int, x: jax.Array, with_bias: bool = False) -> jax.Array:
    return hk.Linear(width, with_bias, w_init=jnp.zeros, name=name)(x)


class _Scale(hk.Module):
    def __call__(self, width: int, dtype: Any) -> jax.Array:
        return hk.get_parameter("scale", (width,), dtype, jnp.ones)


def _rms_norm(spec: DecoderSpec, name: str, x: jax.Array) -> jax.Array:
    wide = x.astype(_at_least_float32(x))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + spec.norm_epsilon)
    return normed.astype(x.dtype) * jnp.broadcast_to(_Scale(name)(x.shape[-1], x.dtype), x.shape)


def _attention(spec: DecoderSpec, x: jax.Array, positions_BT: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
    """Causal attention of x, (B, T, width), to itself or to what the layer's cache holds by then."""
    batch, length, _ = x.shape
    dim, kv_heads = spec.head_dim, spec.num_kv_heads

    def project(name: str, heads: int) -> jax.Array:
        return _linear(name, heads * dim, x, spec.attention_bias).reshape(batch, length, heads, dim)

    queries = rotate(project("query", spec.num_heads), positions_BT, spec.rope_base)
    keys = rotate(project("key", kv_heads), positions_BT, spec.rope_base)
    values = project("value", kv_heads)
    keys, values = keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2)
    if cache is not None:
        starts = positions_BT[:, 0]

        def write(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            at = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
            return jax.vmap(at)(old, new, starts)

        cache = Cache(write(cache.keys, keys, 2), write(cache.values, values, 1))
        keys, values = cache
    queries = queries.reshape(batch, length, kv_heads, spec.num_heads // kv_heads, dim)
    # Of a single query the products are sums over the cache as it lies, many times as fast on CPUs as small matrix products.
    single = cache is not None and length == 1
    if single:
        scores = jnp.sum(queries[:, 0, ..., None] * keys[:, :, None], axis=-2)[:, :, :, None]
    else:
        scores = jnp.einsum("btkgd,bkds->bkgts", queries, keys)
    seen_BTS = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None] <= positions_BT[:, :, None]
    scores = jnp.where(seen_BTS[:, None, None], scores.astype(_at_least_float32(x)) / math.sqrt(dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    if single:
        out = jnp.sum(weights[:, :, :, 0, :, None] * values[:, :, None], axis=-2)
    else:
        out = jnp.einsum("bkgts,bksd->btkgd", weights, values)
    out = out.reshape(batch, length, spec.width)
    return _linear("output", spec.width, out), cache


def rotate(x: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
    """The rotary embedding of x, (B, T, heads, D): coordinates i and i + D/2 turned by the angle t base^(-2i/D)."""
    half, dtype = x.shape[-1] // 2, _at_least_float32(x)
    frequencies = base ** -(jnp.arange(half, dtype=dtype) / half)
    angles = positions_BT[..., None, None].astype(dtype) * frequencies[None, None, None]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _at_least_float32(x: jax.Array) -> Any:
    """Norms, angles and softmax of half precision are computed in float32."""
    return x.dtype if x.dtype == jnp.float64 else jnp.float32
