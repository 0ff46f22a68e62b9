import importlib.util

if importlib.util.find_spec("sglang") is not None:
    from tests.sglang import native  # noqa: F401  before anything imports sglang
