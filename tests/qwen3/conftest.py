from tests.qwen3.hf_folders import folder, sharded  # noqa: F401  fixtures
