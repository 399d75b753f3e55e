"""The peers of experiments.bench. This file imports nothing, so that --help and wrong flags are answered at once."""

# Peer: its package, its script, and its additions to the job.
PEERS = {
    "transformers": ("transformers", "torch_qwen3.py", {"compile": False}),
    "compile": ("transformers", "torch_qwen3.py", {"compile": True}),
    "jax": ("jax", "jax_qwen3.py", {}),
}
