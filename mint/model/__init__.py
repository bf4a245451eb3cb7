"""Models: how they are saved, loaded, laid out and run."""

from importlib import metadata

from mint.errors import ModelError

_OLDEST = (5, 23)
"""The oldest transformers that mint is tested with; pyproject.toml says the same."""


def check_transformers(version: str) -> None:
    """Raise `ModelError` for a transformers that is older than what mint is tested with.

    Some older ones lose the blanks and line ends of prompts, and load models under other names.
    """
    found = tuple(int(p) if p.isdigit() else 0 for p in version.split(".")[:2])
    if found < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ModelError(
            f"mint needs transformers {oldest} or newer, found {version}; pip install -U 'transformers>={oldest}'"
        )


# Here, before the modules beside this one import names that older ones do not have.
check_transformers(metadata.version("transformers"))
