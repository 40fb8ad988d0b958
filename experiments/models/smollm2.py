"""SmolLM2-135M, a causal language model, as a Flax NNX module with the weights and the tokenizer of a GGUF file.

Llama (Touvron et al., arXiv 2302.13971): pre-norm blocks with RMSNorm, rotary embedding (Su et al., arXiv 2104.09864) on
interleaved pairs as GGUF stores them, grouped-query attention (Ainslie et al., arXiv 2305.13245), a gated MLP, and an output tied
to the word embedding. Weights are dequantised by the `gguf` package; the tokenizer is byte-level BPE with digits one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from experiments.models.pretrained import filled

Cache = tuple[jax.Array, jax.Array]  # keys and values, (N, blocks, places, key-value heads, head size)
_CONTROL = 3  # type of a token that no text spells


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder; `context` is the longest text, `base` the rotary embedding's, `epsilon` the norms'."""

    blocks: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    words: int
    context: int
    base: float
    epsilon: float

    @property
    def head(self) -> int:
        """Size of a head."""
        return self.width // self.heads


class Block(nnx.Module):
    """Attention and a gated MLP, each on a normed input and added to it."""

    def __init__(self, shape: Shape, *, dtype: Any, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)

        width, narrow = shape.width, shape.kv_heads * shape.head
        self.shape = shape
        self.query, self.key, self.value, self.output = (
            linear(width, outputs) for outputs in (width, narrow, narrow, width)
        )
        self.gate, self.up = linear(width, shape.hidden), linear(width, shape.hidden)
        self.down = linear(shape.hidden, width)
        self.attention_norm, self.mlp_norm = (_norm(shape, dtype, rngs) for _ in range(2))

    def __call__(self, x: jax.Array, places: jax.Array, cache: Cache | None) -> tuple[jax.Array, Cache]:
        """(N, T, width), (N, T) places in the text, this block's keys and values so far -> the same, with these T."""
        shape, (count, tokens, _) = self.shape, x.shape
        y = self.attention_norm(x)
        query, key, value = (
            layer(y).reshape(count, tokens, -1, shape.head) for layer in (self.query, self.key, self.value)
        )
        query, key = (rotated(vectors, places, shape.base) for vectors in (query, key))
        seen = places
        if cache is not None:
            key, value = (_written(*pair, places[:, 0]) for pair in zip(cache, (key, value), strict=True))
            seen = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=places.dtype), key.shape[:2])
        attended = _attention(query, key, value, seen[:, None, :] <= places[:, :, None])
        x = x + self.output(attended.reshape(x.shape))
        y = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y)), (key, value)


class SmolLM2(nnx.Module):
    """Causal language model.

    `module(ids)`: (N, T) tokens -> (N, T, words) logits. `module(ids, keys, values, start)`: the T tokens from place `start` (N,)
    on, after those in the cache (`new_cache`) -> {"logits": (N, words) of the last one, "keys", "values"}.

    `dtype` is handed to every layer, Flax's plain way to lower precision; parameters stay float32.
    """

    def __init__(self, shape: Shape, *, dtype: Any = None, rngs: nnx.Rngs) -> None:
        self.shape = shape
        self.words = nnx.Embed(shape.words, shape.width, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        self.blocks = nnx.List([Block(shape, dtype=dtype, rngs=rngs) for _ in range(shape.blocks)])
        self.norm = _norm(shape, dtype, rngs)

    def __call__(
        self,
        ids: jax.Array,
        keys: jax.Array | None = None,
        values: jax.Array | None = None,
        start: jax.Array | None = None,
    ) -> Any:
        places = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=ids.dtype), ids.shape)
        places = places if start is None else places + start[:, None]
        x, new = self.words(ids), []
        for number, block in enumerate(self.blocks):
            cache = None if keys is None or values is None else (keys[:, number], values[:, number])
            x, pair = block(x, places, cache)
            new.append(pair)
        if keys is None:
            return self.words.attend(self.norm(x))
        keys, values = (jnp.stack(arrays, axis=1) for arrays in zip(*new, strict=True))
        return {"logits": self.words.attend(self.norm(x[:, -1])), "keys": keys, "values": values}


def rotated(x: jax.Array, places: jax.Array, base: float) -> jax.Array:
    """Rotary embedding of interleaved pairs: (N, T, heads, size) at places (N, T)."""
    size = x.shape[-1] // 2
    speeds = base ** (-jnp.arange(size, dtype=jnp.float32) / size)
    angles = places[..., None, None].astype(jnp.float32) * speeds
    cosine, sine = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    one, two = x[..., ::2], x[..., 1::2]
    return jnp.stack([one * cosine - two * sine, one * sine + two * cosine], axis=-1).reshape(x.shape)


def _written(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """(N, S, heads, size) with (N, T, heads, size) in the places from `start` (N,) on."""
    write = jax.lax.dynamic_update_slice_in_dim
    return jax.vmap(lambda a, b, place: write(a, b, place, axis=0))(old, new.astype(old.dtype), start)


def _attention(query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array) -> jax.Array:
    """(N, T, heads, size), (N, S, key-value heads, size) twice, (N, T, S) -> (N, T, heads · size)."""
    count, tokens, heads, size = query.shape
    shared = key.shape[2]
    grouped = query.reshape(count, tokens, shared, heads // shared, size).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(count, shared, -1, size)  # the queries that share keys, one after the other
    scores = grouped @ key.transpose(0, 2, 3, 1) * size**-0.5
    mask = jnp.tile(allowed, (1, heads // shared, 1))[:, None]
    weights = nnx.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    out = (weights @ value.transpose(0, 2, 1, 3)).reshape(count, shared, heads // shared, tokens, size)
    return out.transpose(0, 3, 1, 2, 4).reshape(count, tokens, heads * size)


def _norm(shape: Shape, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(shape.width, epsilon=shape.epsilon, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def new_cache(shape: Shape, places: int, *, batch: int = 1, dtype: Any = jnp.float32) -> Cache:
    """Room for so many tokens of each of `batch` texts."""
    sizes = (batch, shape.blocks, places, shape.kv_heads, shape.head)
    return jnp.zeros(sizes, dtype), jnp.zeros(sizes, dtype)


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Language:
    """A model with its tokenizer, and the bytes of its file and of the weights in it."""

    module: SmolLM2
    tokenizer: Tokenizer
    file_bytes: int
    weight_bytes: int


def load_smollm2(path: Path | str) -> Language:
    """The model and the tokenizer of a GGUF file; weights as float32.

    Raises:
        ValueError: the file holds another network.
    """
    reader = GGUFReader(path)

    def field(name: str) -> Any:
        stored = reader.get_field(name)
        if stored is None:
            raise ValueError(f"{path} has no field {name!r}.")
        return stored.contents()

    shape = Shape(
        blocks=field("llama.block_count"),
        width=field("llama.embedding_length"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        hidden=field("llama.feed_forward_length"),
        words=len(field("tokenizer.ggml.tokens")),
        context=field("llama.context_length"),
        base=field("llama.rope.freq_base"),
        epsilon=field("llama.attention.layer_norm_rms_epsilon"),
    )
    weights = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return Language(
        module=filled(lambda: SmolLM2(shape, rngs=nnx.Rngs(0)), weights, _source),
        tokenizer=_tokenizer(*(field(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))),
        file_bytes=Path(path).stat().st_size,
        weight_bytes=sum(int(tensor.n_bytes) for tensor in reader.tensors),
    )


def _tokenizer(words: Sequence[str], merges: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """Byte-level BPE from the file's words and merges, digits one by one."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    made.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, types, strict=True) if kind == _CONTROL]
    made.add_special_tokens([AddedToken(word, normalized=False) for word in control])
    return made


_LAYERS = {
    **{"query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output", "attention_norm": "attn_norm"},
    **{"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "mlp_norm": "ffn_norm"},
}
_OTHERS = {"words/embedding": "token_embd.weight", "norm/scale": "output_norm.weight"}


def _source(name: str) -> str:
    """A parameter's name in the file."""
    if name in _OTHERS:
        return _OTHERS[name]
    _, number, layer, _ = name.split("/")
    return f"blk.{number}.{_LAYERS[layer]}.weight"


# --- text -------------------------------------------------------------------------------------------------------------


@nnx.jit
def _called(module: SmolLM2, *inputs: jax.Array) -> Any:
    return module(*inputs)


def generate(language: Language, prompt: str, tokens: int) -> str:
    """The greedy continuation: the most probable next token, so many times."""
    ids = np.asarray([language.tokenizer.encode(prompt).ids], np.int32)
    keys, values = new_cache(language.module.shape, ids.shape[1] + tokens)
    start, made, step = 0, list[int](), jnp.asarray(ids)
    while len(made) < tokens:
        out = _called(language.module, step, keys, values, jnp.full((1,), start, jnp.int32))
        keys, values, start = out["keys"], out["values"], start + step.shape[1]
        made.append(int(jnp.argmax(out["logits"][0])))
        step = jnp.asarray([[made[-1]]], jnp.int32)
    return language.tokenizer.decode(made)
