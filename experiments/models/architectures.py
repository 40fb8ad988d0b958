"""A dozen published architectures, small and with random weights: what kinds of module mpjax reaches, and what it leaves out.

| name | after | modules beside Dense and Conv |
| --- | --- | --- |
| `mlp` | Rumelhart et al. 1986, doi 10.1038/323533a0 | |
| `resnet` | He et al. 2015, arXiv 1512.03385 | BatchNorm |
| `mobilenet` | Howard et al. 2017, arXiv 1704.04861 | depthwise Conv |
| `unet` | Ronneberger et al. 2015, arXiv 1505.04597 | ConvTranspose |
| `vit` | Dosovitskiy et al. 2020, arXiv 2010.11929 | DenseGeneral in attention, a class token |
| `bert` | Devlin et al. 2018, arXiv 1810.04805 | Embed |
| `gpt` | Radford et al. 2019 | Embed, once looked up and once multiplied (`attend`); nn.scan and nn.remat over blocks |
| `lstm` | Hochreiter and Schmidhuber 1997, doi 10.1162/neco.1997.9.8.1735 | nn.RNN, two kinds of cell |
| `gru` | Cho et al. 2014, arXiv 1406.1078 | nn.RNN |
| `mixer` | Tolstikhin et al. 2021, arXiv 2105.01601 | Dense over tokens |
| `experts` | Shazeer et al. 2017, arXiv 1701.06538 | weights of an einsum |
| `llama` | Touvron et al. 2023, arXiv 2302.13971 | NNX: RMSNorm, gated MLP, rotary embedding |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from mpjax.program import Batches, Model, from_linen, from_nnx, merged

TOKENS, WORDS, WIDTH = 12, 50, 32


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model as its user has it, with two batches of inputs.

    `source`: what it is written in. `plain(params, *inputs)`: the user's own call. `make`: makes mpjax's model of it.
    """

    name: str
    source: str
    params: Any
    batches: Batches
    plain: Callable[..., Any]
    make: Callable[[], Model]


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (64, 32):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def norm(x: jax.Array) -> Any:
            return nn.BatchNorm(use_running_average=not train)(x)

        x = nn.relu(norm(nn.Conv(16, (3, 3), use_bias=False, name="stem")(x)))
        for number, (width, stride) in enumerate(((16, 1), (32, 2))):
            y = nn.relu(norm(nn.Conv(width, (3, 3), stride, use_bias=False, name=f"block_{number}_a")(x)))
            y = norm(nn.Conv(width, (3, 3), use_bias=False, name=f"block_{number}_b")(y))
            if stride > 1:
                x = nn.Conv(width, (1, 1), stride, use_bias=False, name=f"block_{number}_skip")(x)
            x = nn.relu(x + y)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu6(nn.Conv(16, (3, 3), 2, name="stem")(x))
        for number, width in enumerate((24, 32)):
            x = nn.relu6(nn.Conv(x.shape[-1], (3, 3), feature_group_count=x.shape[-1], name=f"depthwise_{number}")(x))
            x = nn.relu6(nn.Conv(width, (1, 1), name=f"pointwise_{number}")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        down = nn.relu(nn.Conv(8, (3, 3), name="down")(x))
        deep = nn.relu(nn.Conv(16, (3, 3), 2, name="deep")(down))
        up = nn.ConvTranspose(8, (2, 2), (2, 2), name="up")(deep)
        return nn.Conv(2, (1, 1), name="head")(nn.relu(jnp.concatenate([down, up], axis=-1)))


class Encoder(nn.Module):
    """A pre-norm block of attention and an MLP."""

    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(2 * x.shape[-1], name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(hidden)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(WIDTH, (4, 4), (4, 4), name="patches")(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, WIDTH), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, WIDTH)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], WIDTH), jnp.float32)
        for number in range(2):
            x = Encoder(name=f"block_{number}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x[:, 0]))


class Bert(nn.Module):
    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        x = nn.Embed(WORDS, WIDTH, name="words")(words) + nn.Embed(TOKENS, WIDTH, name="positions")(jnp.arange(TOKENS))
        for number in range(2):
            x = Encoder(name=f"block_{number}")(nn.LayerNorm(name=f"norm_{number}")(x))
        return nn.Dense(2, name="classifier")(nn.tanh(nn.Dense(WIDTH, name="pooler")(x[:, 0])))


class Gpt(nn.Module):
    @nn.compact
    def __call__(self, words: jax.Array) -> jax.Array:
        embed = nn.Embed(WORDS, WIDTH, name="words")
        x: Any = embed(words)

        class Step(nn.Module):
            @nn.compact
            def __call__(self, carry: jax.Array, _: None) -> tuple[jax.Array, None]:
                return Encoder(causal=True, name="block")(carry), None

        blocks = nn.scan(nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = blocks(name="blocks")(x, None)
        return embed.attend(nn.LayerNorm(name="norm")(x))


class Lstm(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        steps: Any = nn.RNN(nn.LSTMCell(16, name="first"))(x)
        steps = nn.RNN(nn.OptimizedLSTMCell(16, name="second"))(steps)
        return nn.Dense(4, name="head")(steps[:, -1])


class Gru(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        steps: Any = nn.RNN(nn.GRUCell(16, name="cell"))(x)
        return nn.Dense(4, name="head")(steps[:, -1])


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(WIDTH, name="embed")(x)
        for number in range(2):
            y = nn.gelu(nn.Dense(24, name=f"tokens_up_{number}")(nn.LayerNorm()(x).swapaxes(1, 2)))
            x = x + nn.Dense(x.shape[1], name=f"tokens_down_{number}")(y).swapaxes(1, 2)
            y = nn.gelu(nn.Dense(48, name=f"channels_up_{number}")(nn.LayerNorm()(x)))
            x = x + nn.Dense(WIDTH, name=f"channels_down_{number}")(y)
        return nn.Dense(10, name="head")(x.mean(1))


class Experts(nn.Module):
    """Two of four experts per token, computed densely."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        make, width = nn.initializers.lecun_normal(batch_axis=0), x.shape[-1]
        up = self.param("up", make, (4, width, 2 * width), jnp.float32)
        down = self.param("down", make, (4, 2 * width, width), jnp.float32)
        scores = nn.Dense(4, use_bias=False, name="router")(x)
        best = jnp.sort(scores, axis=-1)[..., -2:-1]
        gates = nn.softmax(jnp.where(scores >= best, scores, -jnp.inf))
        hidden = nn.gelu(jnp.einsum("btd,edh->bteh", x, up))
        x = x + jnp.einsum("bteh,ehd,bte->btd", hidden, down, gates)
        return nn.Dense(10, name="head")(x.mean(1))


class LlamaBlock(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(4)
        )
        self.gate = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norms[0](x)
        query, key, value = (layer(y).reshape(*y.shape[:2], 4, -1) for layer in (self.query, self.key, self.value))
        query, key = rotated(query), rotated(key)
        attended = nnx.dot_product_attention(query, key, value, mask=jnp.tril(jnp.ones((y.shape[1],) * 2, bool)))
        x = x + self.out(attended.reshape(y.shape))
        y = self.norms[1](x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.words = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([LlamaBlock(WIDTH, rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WORDS, use_bias=False, rngs=rngs)

    def __call__(self, words: jax.Array) -> jax.Array:
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def rotated(x: jax.Array) -> jax.Array:
    """Rotary position embedding, halves as pairs: (N, T, heads, size), even size."""
    size = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * 10000.0 ** (
        -jnp.arange(size, dtype=jnp.float32) / size
    )
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    one, two = x[..., :size], x[..., size:]
    return jnp.concatenate([one * cosine - two * sine, two * cosine + one * sine], axis=-1)


_VECTORS, _IMAGES, _SEQUENCES, _WORDS = (4, 20), (4, 16, 16, 3), (4, TOKENS, WIDTH), (4, TOKENS)
LINEN: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, _VECTORS),
    "resnet": (ResNet, _IMAGES),
    "mobilenet": (MobileNet, _IMAGES),
    "unet": (UNet, _IMAGES),
    "vit": (ViT, _IMAGES),
    "bert": (Bert, _WORDS),
    "gpt": (Gpt, _WORDS),
    "lstm": (Lstm, _SEQUENCES),
    "gru": (Gru, _SEQUENCES),
    "mixer": (Mixer, _SEQUENCES),
    "experts": (Experts, _SEQUENCES),
}
NAMES = (*LINEN, "llama")


def architecture(name: str) -> Architecture:
    """One of `NAMES`.

    Raises:
        KeyError: another name.
    """
    shape = _WORDS if name == "llama" else LINEN[name][1]
    keys = jax.random.split(jax.random.key(0), 3)
    batches = [(_inputs(key, shape),) for key in keys[1:]]
    if name == "llama":
        llama = Llama(nnx.Rngs(0))
        parts = nnx.split(llama, nnx.Param, ...)
        return Architecture(
            name=name,
            source="Flax NNX",
            params=nnx.to_pure_dict(parts[1]),
            batches=batches,
            plain=lambda params, x: merged(*parts, params)(x),
            make=lambda: from_nnx(llama, *batches[0]),
        )
    module = LINEN[name][0]()
    variables: Any = module.init(keys[0], *batches[0])
    others = {kind: values for kind, values in variables.items() if kind != "params"}
    return Architecture(
        name=name,
        source="Flax linen",
        params=variables["params"],
        batches=batches,
        plain=lambda params, x: module.apply({**others, "params": params}, x),
        make=lambda: from_linen(module, variables, *batches[0]),
    )


def _inputs(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.randint(key, shape, 0, WORDS) if shape == _WORDS else jax.random.normal(key, shape, jnp.float32)
