"""SmolLM2-135M, a causal language model, as a Flax NNX module with the weights and the tokenizer of a GGUF file.

Llama (Touvron et al., arXiv 2302.13971): pre-norm blocks with RMSNorm, rotary embedding (Su et al., arXiv 2104.09864) on
interleaved pairs as GGUF stores them, grouped-query attention (Ainslie et al., arXiv 2305.13245), a gated MLP, and an output tied
to the word embedding unless the file has another one. Rotary embeddings may be slowed down, by one factor or one for each pair.
Weights are dequantised by the `gguf` package; the tokenizer is byte-level BPE with digits one by one. Tensors and metadata that
ask for something else are refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from experiments.models import DAMAGED
from experiments.models.pretrained import TextError, filled

Cache = tuple[jax.Array, jax.Array]  # keys and values, (N, blocks, places, key-value heads, head size)
_CONTROL = 3  # type of a token that no text spells


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder; `context` is the longest text, `base` the rotary embedding's, `epsilon` the norms'.

    `stretch` says for each pair of the rotary embedding how many times slower it turns than `base` says; empty where none does.
    `tied`: the output is the word embedding.
    """

    blocks: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    words: int
    context: int
    base: float
    epsilon: float
    stretch: tuple[float, ...] = ()
    tied: bool = True

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
        self.gate, self.up, self.down = (
            linear(width, shape.hidden),
            linear(width, shape.hidden),
            linear(shape.hidden, width),
        )
        self.attention_norm, self.mlp_norm = (_norm(shape, dtype, rngs) for _ in range(2))

    def __call__(
        self, x: jax.Array, places: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """(N, T, width), (N, T) places in the text, this block's keys and values so far -> the same, with these T."""
        shape, (count, tokens, _) = self.shape, x.shape
        y = self.attention_norm(x)
        query, key, value = (
            layer(y).reshape(count, tokens, -1, shape.head) for layer in (self.query, self.key, self.value)
        )
        query, key = (rotated(vectors, places, shape.base, shape.stretch) for vectors in (query, key))
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
        if not shape.tied:
            self.head = nnx.Linear(
                shape.width, shape.words, use_bias=False, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
            )

    def __call__(
        self,
        ids: jax.Array,
        keys: jax.Array | None = None,
        values: jax.Array | None = None,
        start: jax.Array | None = None,
    ) -> Any:
        room = self.shape.context if keys is None else keys.shape[2]
        first = 0 if start is None or isinstance(start, jax.core.Tracer) else int(start.max())
        if first + ids.shape[1] > room:
            raise TextError(f"{ids.shape[1]} tokens from place {first} on do not fit into {room}: make a longer cache.")
        places = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=ids.dtype), ids.shape)
        places = places if start is None else places + start[:, None]
        x, new = self.words(ids), []
        for number, block in enumerate(self.blocks):
            cache = None if keys is None or values is None else (keys[:, number], values[:, number])
            x, pair = block(x, places, cache)
            new.append(pair)
        if keys is None:
            return self._logits(self.norm(x))
        keys, values = (jnp.stack(arrays, axis=1) for arrays in zip(*new, strict=True))
        return {"logits": self._logits(self.norm(x[:, -1])), "keys": keys, "values": values}

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.words.attend(x) if self.shape.tied else self.head(x)


def rotated(x: jax.Array, places: jax.Array, base: float, stretch: tuple[float, ...] = ()) -> jax.Array:
    """Rotary embedding of interleaved pairs: (N, T, heads, size) at places (N, T); `stretch` as in `Shape`."""
    size = x.shape[-1] // 2
    speeds = base ** (-jnp.arange(size, dtype=jnp.float32) / size)
    if stretch:
        speeds = speeds / jnp.asarray(stretch, jnp.float32)
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
    """Room for so many tokens of each of `batch` texts.

    Raises:
        TextError: more than the model reads.
    """
    if not 0 < places <= shape.context:
        raise TextError(f"A cache of {places} tokens: the model reads 1 to {shape.context}.")
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


def load_smollm2(path: Path | str, *, dtype: Any = None) -> Language:
    """The model and the tokenizer of a GGUF file; weights as float32.

    Raises:
        TextError: a foreign, truncated or damaged file, another architecture, missing weights, or tensors or metadata that
            this model would not follow.
        FileNotFoundError: no such file.
    """
    size = Path(path).stat().st_size
    try:
        reader = GGUFReader(path)
        if (kind := _field(reader, "general.architecture")) != "llama":
            raise TextError(f"{path}: a model of the architecture {kind!r}, expected 'llama'. Take a SmolLM2 file.")
        shape = _shape(reader)
        tokenizer = _tokenizer(reader)
        weights = {tensor.name: _floats(tensor) for tensor in reader.tensors}
        stretch = _stretch(reader, shape, weights.pop(_FACTORS, None))
        shape = replace(shape, stretch=stretch, tied=_OUTPUT not in weights)
    except TextError:
        raise
    except DAMAGED as error:
        raise TextError(
            f"{path}: not a whole GGUF file of {size} bytes ({type(error).__name__}: {error}). Compare its checksum with the "
            "source and fetch it again."
        ) from error
    stored = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    module, problems = filled(lambda: SmolLM2(shape, dtype=dtype, rngs=nnx.Rngs(0)), weights, _source)
    if problems:
        raise TextError(
            f"{path}: {len(problems)} weights do not fit ({shape}): {'; '.join(problems[:4])}. Take a file of this network."
        )
    return Language(module=module, tokenizer=tokenizer, file_bytes=size, weight_bytes=stored)


_OUTPUT, _FACTORS = "output.weight", "rope_freqs.weight"
_KNOWN = {
    *(f"llama.{name}" for name in ("block_count", "embedding_length", "feed_forward_length", "context_length")),
    *(f"llama.attention.{name}" for name in ("head_count", "head_count_kv", "layer_norm_rms_epsilon")),
    *(f"llama.rope.{name}" for name in ("freq_base", "scale_linear", "scaling.type", "scaling.factor")),
    # Said of a model trained further with linear scaling; only other kinds of scaling compute with them.
    *(f"llama.rope.scaling.{name}" for name in ("finetuned", "original_context_length")),
}


def _field(reader: GGUFReader, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    if field is None and default is None:
        raise TextError(f"The GGUF file has no field {name!r}: it is damaged, or not of a language model.")
    return default if field is None else field.contents()


def _floats(tensor: ReaderTensor) -> np.ndarray:
    try:
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise TextError(
            f"The tensor {tensor.name!r} is stored as {tensor.tensor_type.name}, which the gguf package does not read. Take a "
            "file of another quantisation."
        ) from error


def _shape(reader: GGUFReader) -> Shape:
    fields = {
        "blocks": "block_count",
        "width": "embedding_length",
        "heads": "attention.head_count",
        "kv_heads": "attention.head_count_kv",
        "hidden": "feed_forward_length",
        "context": "context_length",
    }
    sizes = {size: _field(reader, f"llama.{name}") for size, name in fields.items()}
    shape = Shape(
        **sizes,
        words=len(_field(reader, "tokenizer.ggml.tokens")),
        base=_field(reader, "llama.rope.freq_base"),
        epsilon=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
    )
    whole = all(isinstance(size, int) and size > 0 for size in (*sizes.values(), shape.words))
    if not whole or shape.width % shape.heads or shape.heads % shape.kv_heads or shape.head % 2:
        raise TextError(
            f"The GGUF file says sizes that fit no model of like blocks ({shape}): it is damaged, or of another network."
        )
    _refuse_other_computations(reader, shape)
    return shape


def _refuse_other_computations(reader: GGUFReader, shape: Shape) -> None:
    """Metadata that ask for what `SmolLM2` and `encode` do not compute."""
    allowed: dict[str, Any] = {  # at these values they ask for nothing
        "llama.vocab_size": shape.words,
        "llama.attention.key_length": shape.head,
        "llama.attention.value_length": shape.head,
        "llama.attention.causal": True,
        "llama.rope.dimension_count": shape.head,
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.expert_count": 0,
        "llama.expert_used_count": 0,
        "llama.tensor_data_layout": "Meta AI original pth",  # interleaved pairs
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    problems = []
    for name in reader.fields:
        if name in allowed and (value := _field(reader, name)) != allowed[name]:
            problems.append(f"{name} is {value!r}, expected {allowed[name]!r}")
        elif name.startswith("llama.") and name not in allowed and name not in _KNOWN:
            problems.append(f"{name} is {_field(reader, name)!r}, which this reader does not know")
    if problems:
        raise TextError(
            f"The GGUF file asks for what this model does not compute: {'; '.join(problems[:8])}. Take another file: read as if "
            "this were not there, its numbers would be wrong."
        )


def _stretch(reader: GGUFReader, shape: Shape, factors: np.ndarray | None) -> tuple[float, ...]:
    """How many times slower each pair turns: the divisor of all places, times each pair's own."""
    kind = _field(reader, "llama.rope.scaling.type", "linear")
    if kind not in ("linear", "none"):
        raise TextError(f"A rotary embedding scaled by {kind!r}, expected 'linear' or 'none': take another file.")
    divisor = _field(reader, "llama.rope.scaling.factor", _field(reader, "llama.rope.scale_linear", 1.0))
    divisor = 1.0 if kind == "none" else divisor
    slowed = (np.ones(shape.head // 2, np.float32) if factors is None else factors) * divisor
    if slowed.shape != (shape.head // 2,) or not (np.isfinite(slowed) & (slowed > 0)).all():
        raise TextError(
            f"A rotary embedding slowed down by {divisor} times {factors} ({_FACTORS}), expected positive numbers, "
            f"{shape.head // 2} of the latter: the file is damaged."
        )
    return () if (slowed == 1).all() else tuple(slowed.tolist())


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE from the file's words and merges."""
    kind = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise TextError(
            f"A tokenizer of the kind {kind}, expected ('gpt2', 'smollm'): this reader does not know how it splits."
        )
    words = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    made.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    control = [word for word, kind in zip(words, types, strict=True) if kind == _CONTROL]
    made.add_special_tokens([AddedToken(word, normalized=False) for word in control])
    return made


_LAYERS = {
    **{"query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output", "attention_norm": "attn_norm"},
    **{"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "mlp_norm": "ffn_norm"},
}
_OTHERS = {"words/embedding": "token_embd.weight", "norm/scale": "output_norm.weight", "head/kernel": _OUTPUT}


def _source(name: str) -> str:
    """A parameter's name in the file."""
    if name in _OTHERS:
        return _OTHERS[name]
    _, number, layer, _ = name.split("/")
    return f"blk.{number}.{_LAYERS[layer]}.weight"


# --- text -------------------------------------------------------------------------------------------------------------


def encode(language: Language, text: str, *, room: int = 0) -> np.ndarray:
    """(1, T) int32 tokens of a text, to which `room` more may be added.

    Raises:
        TextError: an empty text, or one that does not fit into the model's context.
    """
    ids = language.tokenizer.encode(text).ids
    context, words = language.module.shape.context, language.module.shape.words
    if not ids:
        raise TextError("The prompt is empty: give it at least one word.")
    if len(ids) + room > context:
        raise TextError(
            f"The prompt has {len(ids)} tokens and {room} are to come: the model reads {context}. Shorten it, or ask for fewer."
        )
    if max(ids) >= words:
        raise TextError(
            f"The tokenizer knows token {max(ids)}, the model {words} words: take the tokenizer of its file."
        )
    return np.asarray([ids], np.int32)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What `generate` made: the new tokens and their text."""

    ids: tuple[int, ...]
    text: str


@nnx.jit
def _called(module: SmolLM2, *inputs: jax.Array) -> Any:
    return module(*inputs)


def generate(
    language: Language, prompt: str, tokens: int, run: Callable[..., Any] | None = None, *, stop: Sequence[int] = ()
) -> Generated:
    """Greedy: the most probable next token, so many times.

    Args:
        language: model and tokenizer.
        prompt: not empty.
        tokens: at most so many new ones.
        run: the module's cached call, `run(ids, keys, values, start)`; None takes the float32 module, jitted.
        stop: tokens that end it.

    Raises:
        TextError: as `encode`.
    """
    ids = encode(language, prompt, room=tokens)
    run = run or (lambda *inputs: _called(language.module, *inputs))
    keys, values = new_cache(language.module.shape, ids.shape[1] + tokens)
    start, made = 0, list[int]()
    step = jnp.asarray(ids)
    while len(made) < tokens:
        out = run(step, keys, values, jnp.full((1,), start, jnp.int32))
        keys, values, start = out["keys"], out["values"], start + step.shape[1]
        made.append(int(jnp.argmax(out["logits"][0])))
        if made[-1] in stop:
            break
        step = jnp.asarray([[made[-1]]], jnp.int32)
    return Generated(ids=tuple(made), text=language.tokenizer.decode(made))
