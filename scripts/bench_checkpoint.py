"""How long `apply --in-place` and `revert` take on checkpoints of 100 MB to 10 GB, and how many bytes they touch.

    python scripts/bench_checkpoint.py [--sizes 0.1 1 10] [--out FOLDER]

The checkpoints are sparse files (all weights zero), so that 10 GB need no room. Times are within one process, after
imports; bytes are those that the process itself asked for (rchar, wchar of /proc/self/io).
"""

import argparse
import json
import struct
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mint import patch as P
from mint.model.lm import fingerprint, sampled
from mint.patch import checkpoint
from mint.patch.skeleton import read as read_skeleton


def make(folder: Path, gigabytes: float) -> Path:
    """A sparse llama checkpoint of about this size in bfloat16, one shard."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")  # a directory without a tokenizer is refused
    width = 1024 if gigabytes < 0.5 else 4096
    layer = 4 * width * width + 3 * width * 4 * width + 2 * width
    layers = max(1, round(gigabytes * 1e9 / 2 / layer))
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=1024, tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    header, at = {}, 0
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():  # the tied unembedding is named once
        shape = parameter.shape
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + at)
    return folder


def patch_for(folder: Path) -> P.Patch:
    """A rewrite of one neuron of the middle layer."""
    skeleton = read_skeleton(folder)
    config = json.loads((folder / "config.json").read_text())
    width, d_ff, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    rows = {"axis": 0, "offset": 0, "stride": 1, "bias": False}
    block = {
        "layer": 0, "out": "model.layers.{}.mlp.down_proj", "out_axis": 1, "activation": "silu",
        "gate": rows | {"module": "model.layers.{}.mlp.gate_proj"}, "up": rows | {"module": "model.layers.{}.mlp.up_proj"},
        "d_model": width, "d_ff": d_ff,
    }  # fmt: skip
    zero, new = torch.zeros(width, dtype=torch.bfloat16), torch.randn(width).bfloat16()
    edit = P.NeuronEdit(
        layers // 2,
        7,
        "rewrite",
        {r: zero for r in ("out", "gate", "up")},
        {r: new for r in ("out", "gate", "up")},
    )
    sample = [torch.zeros(len(sampled(1024)), width).bfloat16(), torch.zeros(width).bfloat16()]
    base = {
        "fingerprint": fingerprint("LlamaForCausalLM", skeleton.shapes(), sample),
        "dtype": "bfloat16", "architecture": "LlamaForCausalLM",
        "layout": {"model_type": "llama", "layers": layers, "blocks": [block], "final_norm": "model.norm"},
    }  # fmt: skip
    return P.Patch((edit,), base)


def counters() -> tuple[int, int]:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 1, 10], help="gigabytes")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the sparse files; default a temporary one"
    )
    args = parser.parse_args()
    print("| checkpoint | step | seconds | bytes read | bytes written |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.out) as home:
        for gigabytes in args.sizes:
            folder = make(Path(home) / f"m{gigabytes}", gigabytes)
            patch = patch_for(folder)
            size = (folder / "model.safetensors").stat().st_size
            for name, step in (("apply", checkpoint.apply), ("revert", checkpoint.revert)):
                before, started = counters(), time.perf_counter()
                step(folder, patch)
                seconds = time.perf_counter() - started
                read, written = (b - a for a, b in zip(before, counters(), strict=True))
                print(f"| {size / 1e9:.2f} GB | {name} | {seconds:.3f} | {read:,} | {written:,} |")


if __name__ == "__main__":
    main()
