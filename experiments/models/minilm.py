"""all-MiniLM-L6-v2, a sentence encoder, as a Flax NNX module with the published weights.

BERT with six post-norm blocks of width 384 (Devlin et al., arXiv 1810.04805; Wang et al., MiniLM, arXiv 2002.10957), the mean of
the tokens' outputs as the sentence's embedding, scaled to length 1 (Reimers and Gurevych, Sentence-BERT, arXiv 1908.10084).
Weights are read from safetensors, the tokenizer from a tokenizer.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from experiments.models.pretrained import filled


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of an encoder: blocks, width, heads, MLP, vocabulary and the longest text in tokens."""

    blocks: int
    width: int
    heads: int
    hidden: int
    words: int
    positions: int


MINILM = Shape(blocks=6, width=384, heads=12, hidden=1536, words=30522, positions=512)
_EPSILON = 1e-12  # of the norms


class Block(nnx.Module):
    """Self-attention and an MLP, each added to its input and normed."""

    def __init__(self, shape: Shape, *, dtype: Any, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)

        width = shape.width
        self.heads = shape.heads
        self.query, self.key, self.value, self.output = (linear(width, width) for _ in range(4))
        self.up, self.down = linear(width, shape.hidden), linear(shape.hidden, width)
        self.attention_norm, self.mlp_norm = (_norm(width, dtype, rngs) for _ in range(2))

    def __call__(self, x: jax.Array, allowed: jax.Array) -> jax.Array:
        """(N, T, width), (N, T) bool -> (N, T, width)."""
        query, key, value = (
            layer(x).reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.swapaxes(2, 3) * query.shape[-1] ** -0.5
        scores = jnp.where(allowed[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        attended = (nnx.softmax(scores, axis=-1) @ value).transpose(0, 2, 1, 3).reshape(x.shape)
        x = self.attention_norm(x + self.output(attended))
        return self.mlp_norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class MiniLM(nnx.Module):
    """Sentence encoder: `module(ids, mask)` with (N, T) int32 tokens and (N, T) 1 where there is one -> (N, width), length 1.

    `dtype` is handed to every layer, Flax's plain way to lower precision; parameters stay float32.
    """

    def __init__(self, shape: Shape = MINILM, *, dtype: Any = None, rngs: nnx.Rngs) -> None:
        def table(rows: int) -> nnx.Embed:
            return nnx.Embed(rows, shape.width, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)

        self.shape = shape
        self.words, self.positions, self.kinds = table(shape.words), table(shape.positions), table(2)
        self.norm = _norm(shape.width, dtype, rngs)
        self.blocks = nnx.List([Block(shape, dtype=dtype, rngs=rngs) for _ in range(shape.blocks)])

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        places = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=ids.dtype), ids.shape)
        x = self.norm(self.words(ids) + self.positions(places) + self.kinds(jnp.zeros_like(ids)))
        for block in self.blocks:
            x = block(x, mask > 0)
        weights = mask[..., None].astype(x.dtype)
        mean = (x * weights).sum(1) / weights.sum(1)
        return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def _norm(width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=_EPSILON, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def load_minilm(path: Path | str, *, shape: Shape = MINILM) -> MiniLM:
    """The encoder with the weights of a safetensors file, as float32.

    Raises:
        ValueError: the file holds another network.
    """
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in _UNUSED}
    return filled(lambda: MiniLM(shape, rngs=nnx.Rngs(0)), tensors, _source)


# The places 0, 1, 2, …, and BERT's layer on its first output, which the mean of all outputs does without.
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_NAMES = {
    "words/embedding": "embeddings.word_embeddings.weight",
    "positions/embedding": "embeddings.position_embeddings.weight",
    "kinds/embedding": "embeddings.token_type_embeddings.weight",
    "norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def _source(name: str) -> str:
    """A parameter's name in the file."""
    if name in _NAMES:
        return _NAMES[name]
    *blocks, layer, leaf = name.split("/")
    kind = {"kernel": "weight", "scale": "weight", "bias": "bias"}[leaf]
    prefix = f"encoder.layer.{blocks[1]}." if blocks else ""
    return f"{prefix}{_NAMES[layer]}.{kind}"


def encode(path: Path | str, texts: Sequence[str], *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of texts by a tokenizer.json, (N, length) int32 each: padded with 0, longer texts cut off."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_padding(length=length)
    tokenizer.enable_truncation(length)
    encoded = tokenizer.encode_batch(list(texts))
    ids, mask = ([getattr(text, name) for text in encoded] for name in ("ids", "attention_mask"))
    return np.array(ids, np.int32), np.array(mask, np.int32)
