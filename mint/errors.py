"""The one family of errors that mint raises on purpose; the command line catches `MintError` once.

    MintError                 anything a user or the machine can mend; exit 1
    ├── CaseError             a case, or a file of cases, that cannot be used
    ├── ModelError            a model that cannot be found, read or handled
    │   └── LayoutError       feed-forward neurons that cannot be located
    ├── PatchError            a patch file that cannot be read, applied or reverted
    └── NoRepair              the search ended without an acceptable repair; exit 3

Every message is one line: what was expected, what was found, what to do next.
"""


class MintError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class CaseError(MintError):
    """A case, or a file of cases, that cannot be used."""


class ModelError(MintError):
    """A model that cannot be found, read or handled."""


class LayoutError(ModelError):
    """A model whose feed-forward neurons cannot be located."""


class PatchError(MintError):
    """A patch that cannot be read, applied or reverted; nothing was changed."""


class NoRepair(MintError):
    """No acceptable repair was found; nothing was changed."""

    exit_code = 3
