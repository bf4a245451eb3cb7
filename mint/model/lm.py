"""A language model in the hand: weights, tokenizer, layout, identity. Text to ids, ids to logits, greedy generation.

`load_lm` (mint/loading.py) is the only loader. This module knows nothing about faults, edits or files.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mint.case import Case
from mint.errors import CaseError, ModelError
from mint.model.layout import Block, Layout
from mint.model.stop import UNENDED, Halt, Stop, rule_of


@dataclass(frozen=True)
class Template:
    """How a prompt is dressed before it is encoded: the model's own chat template, with an optional system text."""

    system: str | None = None


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
        return self.model.get_input_embeddings().weight.device

    @property
    def n_layers(self) -> int:
        return len(self.layout.blocks)

    @property
    def context(self) -> int:
        """Longest sequence in tokens; a very large number where the model states none."""
        config = self.model.config.get_text_config()
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            value = getattr(config, key, None)
            if isinstance(value, int) and value > 0:
                return value
        return 1 << 30

    def module(self, name: str) -> nn.Module:
        return self._modules[name]

    def parameter(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def block(self, layer: int) -> Block:
        return self.layout.blocks[layer]

    def layer(self, index: int) -> nn.Module:
        return self._modules[f"{self.layout.layers}.{index}"]

    def columns(self, layer: int) -> Tensor:
        """Output weights of a layer's neurons, [d_ff, d_model], a view: row j is what neuron j writes."""
        block = self.block(layer)
        weight = self.parameter(f"{block.out}.weight")
        return weight.T if block.out_axis == 1 else weight

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the architecture and of a fixed sample of weights that mint never edits (embedding, final norm)."""
        digest = hashlib.sha256()
        shapes = sorted((n, tuple(p.shape)) for n, p in self._parameters.items())
        digest.update(json.dumps([type(self.model).__name__, shapes]).encode())
        embedding = self.model.get_input_embeddings().weight
        sample = [embedding[:: max(1, embedding.shape[0] // 257)]]
        if self.layout.final_norm:
            sample.append(self.module(self.layout.final_norm).weight)
        for tensor in sample:
            digest.update(tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the vocabulary (token to id)."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    # ------------------------------------------------------------------ text and ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, BOS once where the tokenizer wants it, dressed in the chat template if there is one.

        Raises `CaseError` if the prompt leaves no room in the context, or gives no token.
        """
        if self.template is not None:
            messages = [{"role": "user", "content": text}]
            if self.template.system is not None:
                messages.insert(0, {"role": "system", "content": self.template.system})
            if not getattr(self.tokenizer, "chat_template", None):
                raise ModelError(f"{self.name} has no chat template; leave out --chat")
            dressed = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(dressed, add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(text, add_special_tokens=True).input_ids
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
                ids = ids[1:]
            bare = self.tokenizer(text, add_special_tokens=False).input_ids
            if ids and eos is not None and ids[-1] == eos and ids[-1:] != bare[-1:]:
                ids = ids[:-1]
        if not ids:
            raise CaseError("the prompt gives no token; write at least one character")
        if len(ids) >= self.context:
            raise CaseError(
                f"the prompt has {len(ids)} tokens, the context of {self.name} is {self.context}; shorten the prompt"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def continuation(self, prompt: Sequence[int], generated: Sequence[int]) -> str:
        """Text of `generated` as it stands behind `prompt` (a tokenizer may drop the blank of a lone first token)."""
        before = self.decode(prompt)
        after = self.decode([*prompt, *generated])
        return after[len(before) :] if after.startswith(before) else self.decode(generated)

    def encode_target(self, prompt: Sequence[int], target: str, prompt_text: str | None = None) -> list[int]:
        """Token ids that, behind the ids of the prompt, decode to exactly `target`.

        Raises `CaseError` if the tokenizer cannot write the target.
        """
        candidates = []
        if prompt_text is not None and self.template is None:
            joint = self.tokenizer(prompt_text + target, add_special_tokens=True).input_ids
            if joint[: len(prompt)] == list(prompt):
                candidates.append(joint[len(prompt) :])
        candidates.append(self.tokenizer(target, add_special_tokens=False).input_ids)
        for ids in candidates:
            if ids and self.continuation(prompt, ids) == target:
                return ids
        written = self.continuation(prompt, candidates[-1])
        unlike = next(
            (i for i, (a, b) in enumerate(zip(target, written, strict=False)) if a != b), len(written)
        )
        raise CaseError(
            f"the tokenizer of {self.name} cannot write the target: character {unlike} {target[unlike : unlike + 1]!r}"
            f" comes back as {written[unlike : unlike + 1]!r}; use text that the tokenizer can make"
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
        if len(prompt) + len(target) + 1 > self.context:
            raise CaseError(
                f"case '{case.id}': prompt and target have {len(prompt) + len(target)} tokens, the context of"
                f" {self.name} is {self.context}; shorten the prompt"
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
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        batch: list[int] = []
        for i in [*order, -1]:
            if batch and (i < 0 or (len(batch) + 1) * len(sequences[i]) > tokens):
                yield batch, self.logits([sequences[j] for j in batch], [positions[j] for j in batch])
                batch = []
            batch.append(i)

    def _greedy(self, max_new_tokens: int) -> GenerationConfig:
        # Everything that could bend greedy decoding is stated, since unset values come from the model's own settings.
        stops = sorted(self.stop_ids())
        pad = self.tokenizer.pad_token_id
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=pad if pad is not None else (stops[0] if stops else 0),
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            use_cache=True,
        )

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: Sequence[Stop | None] | None = None,
    ) -> list[list[int]]:
        """Plain greedy continuations, one a prompt (ids), the stop token included where one was written.

        max_new_tokens: most tokens to write. stops: per prompt, where to halt besides end-of-sequence tokens (None: not).
        Raises `CaseError` where prompt and continuation exceed the context.
        """
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self.context:
            raise CaseError(
                f"{longest} prompt tokens and {max_new_tokens} new ones exceed the context of {self.context};"
                " shorten the prompt or ask for fewer tokens"
            )
        config = self._greedy(max_new_tokens)
        ids = torch.full((len(prompts), longest), config.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
            mask[row, longest - len(prompt) :] = 1
        stopping = [Halt(self, prompts, longest, stops)] if stops is not None else None
        out = self.model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=config,
            stopping_criteria=stopping,
        )
        ends = self.stop_ids()
        return [_until(row[longest:].tolist(), ends) for row in out]

    def write(self, encoded: Encoded, case: Case) -> str:
        """What the model really writes behind the case's prompt: greedy text, up to where its stop ends it.

        Equal to `case.target` exactly if the model writes the target and stops.
        """
        return self.write_all([encoded], [case])[0]

    def write_all(self, encoded: Sequence[Encoded], cases: Sequence[Case]) -> list[str]:
        """`write` for several cases in one batch."""
        stops = [e.stop or Stop.of("none", c.target) for e, c in zip(encoded, cases, strict=True)]
        budget = max(s.budget(len(e.target)) for s, e in zip(stops, encoded, strict=True))
        room = self.context - max(len(e.prompt) for e in encoded)
        if room < min(budget, max(len(e.target) for e in encoded)) and len(encoded) > 1:
            return [self.write(e, c) for e, c in zip(encoded, cases, strict=True)]
        generated = self.generate([e.prompt for e in encoded], min(budget, room), stops)
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
