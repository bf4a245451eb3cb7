"""Optional libraries: which extra of mint brings which, and the one line that is said where one is missing.

Knows nothing about what they are used for. Checked before a run starts, never in the middle of one.
"""

from importlib import import_module

from mint.errors import MintError

EXTRAS = {
    "plots": {"matplotlib": "matplotlib"},
    "judges": {
        "keystone": "keystone-engine",
        "ruff": "ruff",
        "tree_sitter": "tree-sitter",
        "tree_sitter_bash": "tree-sitter-bash",
    },
    "evaluate": {"datasets": "datasets", "sacrebleu": "sacrebleu"},
    "baselines": {"captum": "captum", "peft": "peft"},
    "sentencepiece": {"google.protobuf": "protobuf", "sentencepiece": "sentencepiece"},
    "llamacpp": {"llama_cpp": "llama-cpp-python"},
}
"""Extra of pyproject.toml -> {module: package} that it brings; what the core brings is not listed."""


def install_command(module: str) -> str:
    """The command that installs the extra which brings a module, as it is typed into a shell."""
    return f"pip install 'mint-repair[{_extra_of(module)}]'"


def need(what: str, *modules: str) -> None:
    """Raise `MintError` where one of these modules cannot be imported: what needs it, and how to install it.

    what: opens the sentence, such as `mint evaluate` or `--plot`. Modules: names in `EXTRAS`, imported here.
    """
    missing: list[str] = []
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module + ".").startswith(error.name + "."):
                raise _broken(what, module, error) from None
            missing.append(module)
        except (ImportError, OSError) as error:  # OSError: a shared library that cannot be loaded
            raise _broken(what, module, error) from None
    if missing:
        packages = [EXTRAS[_extra_of(module)][module] for module in missing]
        extras = ",".join(dict.fromkeys(_extra_of(module) for module in missing))
        raise MintError(
            f"{what} needs {_listed(packages)}, which {'is' if len(packages) == 1 else 'are'} not installed;"
            f" pip install 'mint-repair[{extras}]'"
        )


def _extra_of(module: str) -> str:
    return next(extra for extra, brought in EXTRAS.items() if module in brought)


def _broken(what: str, module: str, error: Exception) -> MintError:
    package = EXTRAS[_extra_of(module)][module]
    said = " ".join(str(error).split())[:200]
    return MintError(
        f"{what} needs {package}, which is installed but cannot be imported ({said});"
        f" pip install --force-reinstall {package}"
    )


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
