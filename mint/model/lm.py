"""A language model in the hand: weights, tokenizer, layout, identity. Text to ids, ids to logits, greedy generation.

`load_lm` (mint/loading.py) is the only loader. This module knows nothing about faults, edits or files.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from mint.batches import alike
from mint.case import Case
from mint.errors import CaseError, ModelError
from mint.model import text as texts
from mint.model.layout import Block, Layout, weight_of
from mint.model.saved import Saved
from mint.model.settings import Settings
from mint.model.stop import UNENDED, Halt, Stop, rule_of
from mint.model.text import Template


@dataclass(frozen=True)
class Encoded:
    """A case as token ids."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    """The tokens to write; the last `n_stop` of them end the text and are not part of it."""
    n_stop: int = 0
    stop: Stop | None = None
    """How the text ends; None: it is compared as far as the target goes."""

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.target]

    @property
    def positions(self) -> list[int]:
        """Positions of prompt + target whose next token is a token of the target, in order."""
        return list(range(len(self.prompt) - 1, len(self.prompt) + len(self.target) - 1))


def sampled(rows: int) -> range:
    """The rows of the embedding that the fingerprint is taken from."""
    return range(0, rows, max(1, rows // 257))


def fingerprint(
    architecture: str, shapes: Iterable[tuple[str, tuple[int, ...]]], sample: Iterable[Tensor]
) -> str:
    """SHA-256 of a class name, parameter shapes and sampled weights, in the dtype in which the model is loaded."""
    digest = hashlib.sha256(json.dumps([architecture, sorted(shapes)]).encode())
    for tensor in sample:
        digest.update(tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_vocabulary(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 of a vocabulary (token to id)."""
    entries = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


@dataclass
class LM:
    """A causal language model that mint can look into and edit. Made by `load_lm`; the model stays in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    name: str
    """What the user asked for: a directory, a hub id, a file or an alias."""
    revision: str | None = None
    template: Template | None = None
    settings: Settings = Settings()
    """What the model's own generation settings would change; plain greedy text knows nothing of them."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the model was read, one line each."""
    saved: Saved = Saved("a model made in memory", None, {}, {})
    """What the model's files say."""
    served: str | None = None
    """The dtype in which servers load the model, where config.json asks for another than the files hold."""
    expert_maps: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    """Linear maps of single experts, by the names that the layout's blocks give them (experts.py)."""
    _modules: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    _parameters: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.model.eval()
        self.model.requires_grad_(False)
        self._modules = dict(self.model.named_modules())
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))

    # ------------------------------------------------------------------ parts

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embedding."""
        return self.embedding.device

    @property
    def embedding(self) -> Tensor:
        """[vocab, width], the weight of the input embedding."""
        return weight_of(self.model.get_input_embeddings())

    @property
    def n_layers(self) -> int:
        return self.layout.n_layers

    @property
    def context(self) -> int:
        """Longest sequence in tokens; a very large number where the model states none."""
        config = self.model.config.get_text_config()
        for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"):
            value = getattr(config, key, None)
            if isinstance(value, int) and value > 0:
                return value
        return 1 << 30

    def module(self, name: str) -> nn.Module:
        return self.expert_maps[name] if name in self.expert_maps else self._modules[name]

    def parameter(self, name: str) -> nn.Parameter:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.expert_maps[owner], leaf) if owner in self.expert_maps else self._parameters[name]

    def block(self, layer: int) -> Block:
        """The feed-forward block of a layer. Raises `LayoutError` where the layer has none."""
        return self.layout.block(layer)

    def layer(self, index: int) -> nn.Module:
        return self._modules[f"{self.layout.layers}.{index}"]

    def d_ff(self, layer: int) -> int:
        """Number of neurons of a layer; 0 where it has no block."""
        return sum(block.d_ff for block in self.layout.blocks_of(layer))

    def columns(self, layer: int) -> Tensor:
        """Output weights of a layer's neurons, [d_ff, d_model]: row j is what neuron j writes. A view, of one block."""
        found = []
        for block in self.layout.blocks_of(layer):
            weight = self.parameter(f"{block.out}.weight")
            found.append(weight.T if block.out_axis == 1 else weight)
        if not found:
            return self.embedding.new_zeros(0, self.layout.width)
        return found[0] if len(found) == 1 else torch.cat(found)

    def place(self, layer: int, number: int) -> tuple[int | None, int]:
        """(expert or None, index in its block) of a neuron numbered through all blocks of a layer."""
        for block in self.layout.blocks_of(layer):
            if number < block.d_ff:
                return block.expert, number
            number -= block.d_ff
        raise IndexError(f"layer {layer} has {self.d_ff(layer)} neurons")

    def number(self, layer: int, index: int, expert: int | None = None) -> int:
        """The number of a neuron through all blocks of its layer, the inverse of `place`."""
        before = 0
        for block in self.layout.blocks_of(layer):
            if block.expert == expert:
                return before + index
            before += block.d_ff
        raise IndexError(f"layer {layer} has no block of expert {expert}")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the architecture and of a fixed sample of weights that mint never edits (embedding, final norm)."""
        shapes = [(n, tuple(p.shape)) for n, p in self._parameters.items()]
        embedding = self.embedding
        sample = [embedding[list(sampled(embedding.shape[0]))]]
        if self.layout.final_norm:
            sample.append(weight_of(self.module(self.layout.final_norm)))
        return fingerprint(type(self.model).__name__, shapes, sample)

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the vocabulary (token to id)."""
        return hash_vocabulary(self.tokenizer.get_vocab())

    # ------------------------------------------------------------------ text and ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, BOS once where the tokenizer wants it, dressed in the chat template if there is one.

        Raises `CaseError` if the prompt leaves no room in the context, gives no token, holds a token that the embedding
        lacks, or cannot be read back: the model would see another text.
        """
        tokenizer = self.tokenizer
        if self.template is not None:
            shown = self.dressed(text)
            ids = list(tokenizer(shown, add_special_tokens=False).input_ids)
        else:
            shown = text
            ids = texts.encode_plain(tokenizer, text)
        if not ids:
            raise CaseError("the prompt gives no token; write at least one character")
        texts.check_read_back(tokenizer, shown, self.name)
        self._check_ids(ids, "the prompt")
        if len(ids) >= self.context:
            raise CaseError(
                f"the prompt has {len(ids)} tokens, the context of {self.name} is {self.context}; shorten the prompt"
            )
        return ids

    def dressed(self, text: str) -> str:
        """A prompt as the model sees it: in its chat template where one was asked for, else as it is."""
        return (
            text if self.template is None else texts.dressed(self.tokenizer, self.template, text, self.name)
        )

    def decode(self, ids: Sequence[int]) -> str:
        return texts.decode(self.tokenizer, ids)

    def continuation(self, prompt: Sequence[int], generated: Sequence[int]) -> str:
        """Text of `generated` as it stands behind `prompt` (a tokenizer may drop the blank of a lone first token)."""
        return texts.continuation(self.tokenizer, prompt, generated)

    def encode_target(self, prompt: Sequence[int], target: str, prompt_text: str | None = None) -> list[int]:
        """Token ids that, behind the ids of the prompt, decode to exactly `target`.

        prompt_text: what the user wrote as the prompt. Raises `CaseError` if the tokenizer cannot write the target, or
        only with tokens that the embedding lacks.
        """
        behind = None if prompt_text is None else self.dressed(prompt_text)
        ids = texts.encode_target(self.tokenizer, prompt, target, behind, self.name)
        self._check_ids(ids, "the target")
        return ids

    @cached_property
    def n_embedded(self) -> int:
        """How many token ids the input embedding has rows for."""
        return self.embedding.shape[0]

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        beyond = max(ids, default=0)
        if beyond >= self.n_embedded:
            raise CaseError(
                f"{what} holds the token {self.decode([beyond])!r} (id {beyond}), and the embedding of {self.name} has"
                f" {self.n_embedded} rows; leave the token out, or use the tokenizer that belongs to the model"
            )
        rows = self.embedding[sorted(set(ids))]
        if rows.device.type != "meta" and not rows.isfinite().all():
            broken = next(i for i in ids if not self.embedding[i].isfinite().all())
            raise CaseError(
                f"{what} holds the token {self.decode([broken])!r} (id {broken}), whose row in the embedding of {self.name} is"
                " not made of finite numbers; leave the token out, or copy the weights again"
            )

    def stop_ids(self) -> set[int]:
        """Ids that end generation: the model's and the tokenizer's end-of-sequence (end-of-turn) tokens."""
        ids: set[int] = set()
        for value in (
            getattr(self.model.generation_config, "eos_token_id", None),
            self.tokenizer.eos_token_id,
        ):
            if isinstance(value, int):
                ids.add(value)
            elif value is not None:
                ids.update(int(v) for v in value)
        return ids

    def encode(self, case: Case, stop: str = "auto") -> Encoded:
        """A case as ids, the stop included.

        stop: `none` adds nothing; `eos` ends the target with the end-of-sequence token; `line` ends it at the end of
        the line: a target that ends in a newline is its own stop, any other is followed by a newline token (or by what
        the model already writes there, if that ends the line); `block` ends it where an indented block is left; `auto`
        (default) is the case's own rule, else `eos` in a chat template, else `line`.
        Raises `CaseError` where prompt and target do not fit the context or the tokenizer cannot write the target.
        """
        if not case.target:
            raise CaseError(f"case '{case.id}': the target is empty; write what the model should produce")
        prompt = self.encode_prompt(case.prompt)
        target = self.encode_target(prompt, case.target, case.prompt)
        if len(prompt) + len(target) > self.context:
            raise CaseError(
                f"case '{case.id}': prompt and target have {len(prompt) + len(target)} tokens ({len(prompt)} and"
                f" {len(target)}), the context of {self.name} is {self.context}; shorten the prompt"
            )
        early = next((t for t in target[:-1] if t in self.stop_ids()), None)
        if early is not None:
            raise CaseError(
                f"case '{case.id}': {self.name} ends its text at {self.decode([early])!r}, which the target has in the"
                " middle; end the target there"
            )
        rule = rule_of(case, stop, self.template is not None)
        ends = Stop.of(rule, case.target)
        last = ends.encode(self, [*prompt, *target], case.target)[: self.context - len(prompt) - len(target)]
        return Encoded(tuple(prompt), (*target, *last), len(last), ends)

    # ------------------------------------------------------------------ logits and generation

    @contextmanager
    def only_at(self, rows: Tensor, columns: Tensor) -> Iterator[None]:
        """Within: the unembedding sees only positions (rows[i], columns[i]); the model's logits are [1, n, vocab]."""

        def select(_module, args):
            return (args[0][rows.to(args[0].device), columns.to(args[0].device)][None],)

        handle = self.module(self.layout.unembedding).register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    def pad(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[batch, longest] ids, padded on the right: causal attention keeps the padding away from real tokens."""
        longest = max(map(len, sequences))
        for sequence in sequences:
            self._check_ids(sequence, "the text")
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        return ids.to(self.device)

    def logits(self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Tensor:
        """Raw next-token logits in float32, [total positions, vocab], sequence by sequence.

        positions[i] are the positions of sequence i to read. One forward for all; keeps the caller's gradient mode.
        """
        rows = torch.tensor([i for i, p in enumerate(positions) for _ in p])
        columns = torch.tensor([c for p in positions for c in p])
        with self.only_at(rows, columns):
            out = self.model(input_ids=self.pad(sequences), use_cache=False)
        return out.logits[0].float()

    @torch.no_grad()
    def batched_logits(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], tokens: int = 1024
    ) -> Iterator[tuple[list[int], Tensor]]:
        """`logits` in batches of about `tokens` padded tokens, like lengths together: yields (indices, logits)."""
        for batch in alike([len(s) for s in sequences], tokens):
            yield batch, self.logits([sequences[i] for i in batch], [positions[i] for i in batch])

    def _greedy(self, max_new_tokens: int) -> dict:
        """What every generation states, whatever else it keeps to."""
        stops = sorted(self.stop_ids())
        # Any row of the embedding does: the mask hides padding in front, and what follows a stop is cut off.
        pads = [self.tokenizer.pad_token_id, *stops, 0]
        pad = next(p for p in pads if p is not None and p < self.n_embedded)
        return {"max_new_tokens": max_new_tokens, "eos_token_id": stops or None, "pad_token_id": pad}

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[Stop | None] | None = None,
        own_settings: bool = False,
    ) -> list[list[int]]:
        """Plain greedy continuations, one a prompt (ids), the stop token included where one was written.

        max_new_tokens: most tokens to write. stops: per prompt, where to halt besides end-of-sequence tokens (None: not).
        own_settings: keep to the model's own generation settings, greedily. Raises `CaseError` where prompt and
        continuation exceed the context, `ModelError` where the model's own settings cannot be run.
        """
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self.context:
            raise CaseError(
                f"{longest} prompt tokens and {max_new_tokens} new ones exceed the context of {self.context};"
                " shorten the prompt or ask for fewer tokens"
            )
        stated = self._greedy(max_new_tokens)
        ids = torch.full((len(prompts), longest), stated["pad_token_id"], dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            self._check_ids(prompt, "the prompt")
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
            mask[row, longest - len(prompt) :] = 1
        model = cast(
            Any, self.model
        )  # the library asks of `generate` a protocol that its own models do not meet
        stopping = StoppingCriteriaList([Halt(self, prompts, longest, stops)] if stops is not None else [])
        config = (
            self.settings.config(**stated) if own_settings else GenerationConfig(do_sample=False, **stated)
        )
        ends = self.stop_ids()
        with self._no_settings(), self._nothing_left():
            try:
                out = model.generate(
                    ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    generation_config=config,
                    stopping_criteria=stopping,
                )
            except (
                Exception
            ) as error:  # settings that transformers refuses, or that need what is not installed
                if not own_settings:
                    raise
                raise ModelError(
                    f"the generation settings of {self.name} cannot be run ({' '.join(str(error).split())[:160]}); mend its"
                    " generation_config.json, or leave out --verify-settings"
                ) from error
        return [_until(row[longest:].tolist(), ends) for row in out]

    @contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """Within: text models inside wrappers may remember a batch; behind it they have forgotten it.

        transformers keeps the shift of image positions of the last batch on the module (`rope_deltas`), and takes it for that
        of the next forward, whatever its size.
        """
        try:
            yield
        finally:
            for module in self.model.modules():
                if getattr(module, "rope_deltas", None) is not None:
                    module.__dict__["rope_deltas"] = None

    @contextmanager
    def _no_settings(self) -> Iterator[None]:
        """Within: the model has no generation settings, from which transformers would take what a call leaves open."""
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            self.model.generation_config = own

    def write(self, encoded: Encoded, case: Case, own_settings: bool = False) -> str:
        """What the model really writes behind the case's prompt: greedy text, up to where its stop ends it.

        Equal to `case.target` exactly if the model writes the target and stops. own_settings: as for `generate`.
        """
        return self.write_all([encoded], [case], own_settings)[0]

    def write_all(
        self, encoded: Sequence[Encoded], cases: Sequence[Case], own_settings: bool = False
    ) -> list[str]:
        """`write` for several cases in one batch."""
        stops = [e.stop or Stop.of("none", c.target) for e, c in zip(encoded, cases, strict=True)]
        budget = max(s.budget(len(e.target)) for s, e in zip(stops, encoded, strict=True))
        room = self.context - max(len(e.prompt) for e in encoded)
        if room < min(budget, max(len(e.target) for e in encoded)) and len(encoded) > 1:
            return [self.write(e, c, own_settings) for e, c in zip(encoded, cases, strict=True)]
        generated = self.generate([e.prompt for e in encoded], min(budget, room), stops, own_settings)
        return [
            self._text(e, s, ids, c.target)
            for e, s, ids, c in zip(encoded, stops, generated, cases, strict=True)
        ]

    def _text(self, encoded: Encoded, stop: Stop, ids: list[int], target: str) -> str:
        """The text of what was generated for a target, as far as it counts."""
        ended = bool(ids) and ids[-1] in self.stop_ids()
        # A newline may be an end-of-sequence token: where the target's text holds it, it belongs to what was written.
        own = ended and not encoded.n_stop and ids[-1] == encoded.target[-1]
        text = self.continuation(encoded.prompt, ids[:-1] if ended and not own else ids)
        text, whole = stop.cut(text, ended)
        return text if whole or text != target else text + UNENDED


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Ids up to and with the first of `ends`."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)
