"""Options that several commands share, declared once, and the few steps every command that loads a model takes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mint import console
from mint.case import STOPS
from mint.console import Say
from mint.errors import CaseError, MintError

if TYPE_CHECKING:
    from mint.model.lm import LM
    from mint.patch import Patch

Model = Annotated[
    str, typer.Option("--model", "-m", help="Directory, hub id, .gguf file, or the built-in smollm2-135m.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto to spread over GPUs.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Adapter = Annotated[
    str | None, typer.Option(help="PEFT adapter, a directory or hub id, to merge into the model first.")
]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="Text before the fault, taken as is.")]
Target = Annotated[
    str | None, typer.Option("--target", "-t", help="Text the model should write, taken as is.")
]
PromptFile = Annotated[Path | None, typer.Option(help="File that holds the prompt, taken as is.")]
TargetFile = Annotated[Path | None, typer.Option(help="File that holds the target, taken as is.")]
Suffix = Annotated[
    str | None,
    typer.Option(
        help="Text behind the gap, taken as is: the prompt is what stands before it, and the model fills in, asked with its"
        " own fill-in-the-middle tokens."
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's own chat template.")]
System = Annotated[str | None, typer.Option(help="System text for --chat.")]
Stop = Annotated[
    str,
    typer.Option(
        help="How a target ends: line (end of line), block (end of an indented block), eos (end of sequence),"
        " none (not checked); auto: as the case says, else eos with --chat and line without."
    ),
]
Patches = Annotated[list[Path] | None, typer.Option("--patch", help="Patch to apply first; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace output that exists.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


def load(
    model: str,
    device: str,
    dtype: str,
    revision: str | None = None,
    chat: bool = False,
    system: str | None = None,
    patches: list[Path] | None = None,
    say: Say = lambda _: None,
    prepare: Callable[["LM"], object] | None = None,
    adapter: str | None = None,
) -> tuple["LM", tuple["Patch", ...]]:
    """Load a model, say what the user should know about it, and apply patches to it in memory; returns both.

    prepare: called before patches are applied, for what is measured once on the clean model and cached.
    """
    if system is not None and not chat:
        raise MintError("--system is for chat models; add --chat")
    from mint.patch import apply
    from mint.patch import load as load_patch

    # Patches are read first: a bad file is told at once, not after loading a model.
    read = tuple(load_patch(path) for path in patches or [])
    say("importing")
    from mint.model.lm import Template
    from mint.model.loading import load_lm

    lm = load_lm(
        model,
        device=device,
        dtype=dtype,
        revision=revision,
        template=Template(system) if chat else None,
        adapter=adapter,
        say=say,
    )
    for line in lm.notes:
        console.note(f"note: {line}")
    if read and prepare is not None:
        prepare(lm)
    for patch in read:
        apply(lm, patch)
    return lm, read


def text(value: str | None, file: Path | None, name: str) -> str:
    """The text of `--NAME` or `--NAME-file`. Raises `CaseError` unless exactly one is given and it can be used."""
    if (value is None) == (file is None):
        found = "none" if value is None else "both"
        raise typer.BadParameter(f"give one of --{name} and --{name}-file, found {found}")
    if file is not None:
        try:
            value = file.read_bytes().decode("utf-8")
        except OSError as error:
            raise CaseError(f"{file}: cannot be read ({error.strerror}); give a text file") from None
        except UnicodeDecodeError as error:
            raise CaseError(f"{file}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    return value or ""


def filled(lm: "LM", prompt: str, suffix: str | None) -> str:
    """The prompt, or with a suffix the one that asks for what stands between the two. Raises as `mint.model.infill`."""
    if suffix is None:
        return prompt
    if lm.template is not None:
        raise MintError(
            "--suffix asks for code between two texts, --chat for an answer; leave one of them out"
        )
    from mint.model.infill import infill

    return infill(lm.tokenizer, prompt, suffix, lm.name)


def check_free(path: Path | None, force: bool) -> None:
    """Raise `MintError` early, before minutes of work, if an output file cannot be written in the end."""
    if path is None:
        return
    if path.is_dir():
        raise MintError(f"{path} is a directory; give the name of a file")
    if path.exists() and not force:
        raise MintError(f"{path} exists; give another name, or --force to replace it")
    if path.exists() and _belongs_to_a_model(path):
        raise MintError(
            f"{path} belongs to the model in {path.parent}, and --force does not replace it; give another name"
        )
    if not path.parent.is_dir():
        raise MintError(f"cannot write {path}: {path.parent} is no directory; make it first")


def _belongs_to_a_model(path: Path) -> bool:
    """Whether a file is a part of the model directory that it lies in: a page of mint's is none, and a patch is none."""
    if not (path.parent / "config.json").is_file() or path.suffix == ".html":
        return False
    from mint.errors import PatchError
    from mint.patch import load as load_patch

    try:
        load_patch(path)
    except PatchError:
        return True
    return False


def check_stop(stop: str) -> None:
    """Raise a usage error for an unknown stop rule."""
    known = ("auto", *STOPS)
    if stop not in known:
        raise typer.BadParameter(f"unknown stop rule '{stop}'; known are {', '.join(known)}")
