"""Text in and out: tokenizers of every checkpoint format and chat templates."""

__all__ = ["Tokenizer", "load_tokenizer"]


def __getattr__(name: str):
    if name in __all__:
        from . import tokenizer

        return getattr(tokenizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
