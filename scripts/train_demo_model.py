#!/usr/bin/env python3
"""Train a small language model from scratch, so that quantization can be shown on weights that mean something.

    python scripts/train_demo_model.py TEXTS OUT --family qwen3 --tokens 5M --heldout book.txt

TEXTS is a directory of ``*.txt.xz`` (UTF-8; documents separated by a NUL byte). OUT becomes a Hugging Face model
directory: bf16 safetensors, config, tokenizer and a card with the measured perplexity. The defaults make 5 to 6
million weights. Needs the ``torch`` extra; runs on one CPU thread as well as on CUDA.

Learning rates. Matrices inside the blocks go to Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers"):
momentum, then the nearest semi-orthogonal matrix by five Newton-Schulz steps, which spends a short run's few
hundred steps on all directions of a matrix and not only on the strongest. Embeddings, norms and the
expert router are no such maps between hidden spaces; AdamW trains them.

Reproducible: seeded, and the order of windows depends on the seed alone. With ``--tokens`` the same machine gives
the same bytes again, also when the run was stopped (SIGINT, SIGTERM: exit 75) and continued by the same command.
With ``--minutes`` the learning rate follows the clock instead, so the bytes depend on the machine's speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its sums only with this

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END, PAD = "<|endoftext|>", "<|pad|>"
# The split rule of Llama 3's tokenizer, which llama.cpp knows as "llama-bpe".
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STOPPED = 75


@dataclass(frozen=True)
class Shape:
    """Sizes of one model. Row lengths stay multiples of 256, the super-block of llama.cpp's K types."""

    family: str
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    intermediate: int = 768
    experts: int = 8
    experts_used: int = 2
    expert_intermediate: int = 256
    vocabulary: int = 2048
    context: int = 1024


@dataclass
class Run:
    """What to do and how far it has come. ``tokens`` or ``minutes`` ends the run, whichever is first."""

    seed: int = 0
    batch: int = 16
    window: int = 256
    tokens: int | None = None
    minutes: float | None = None
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    steps_done: int = 0
    seconds_done: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def tokens_done(self) -> int:
        return self.steps_done * self.batch * self.window

    def progress(self, seconds: float) -> float:
        """0 at the start, 1 when the run is over."""
        by_tokens = self.tokens_done / self.tokens if self.tokens else 0.0
        by_clock = (self.seconds_done + seconds) / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_tokens, by_clock))


def default_shape(family: str, vocabulary: int = 2048) -> Shape:
    """A MoE of three layers holds as many weights as a dense model of six."""
    return Shape(family, layers=3 if family == "qwen3_moe" else 6, vocabulary=vocabulary)


# --- text ---------------------------------------------------------------------------------------------------


def read_documents(texts: Path) -> Iterator[str]:
    """Every document of every ``*.txt.xz`` below ``texts``, files in name order."""
    paths = sorted(texts.glob("*.txt.xz"))
    if not paths:
        raise SystemExit(f"no *.txt.xz in {texts}")
    for path in paths:
        # Text mode turns CR and CRLF, which some Aozora files use, into LF.
        with lzma.open(path, "rt", encoding="utf-8") as stream:
            yield from (document for document in stream.read().split("\0") if document)


def train_tokenizer(texts: Path, vocabulary: int) -> Tokenizer:
    """Byte-level BPE over Llama 3's split rule; ids 0 and 1 are the end-of-text and padding tokens."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_documents(texts), trainer)
    return tokenizer


def encode_corpus(texts: Path, tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one uint16 stream, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END)
    pieces = [
        np.array([*tokenizer.encode(text, add_special_tokens=False).ids, end], np.uint16)
        for text in read_documents(texts)
    ]
    return np.concatenate(pieces)


def batch_at(corpus: np.ndarray, run: Run, step: int) -> torch.Tensor:
    """Tokens of one step, (batch, window + 1) int64.

    An epoch is a seeded permutation of all windows; each epoch cuts the corpus at another offset.
    """
    per_epoch = (len(corpus) - run.window - 1) // run.window
    if per_epoch < run.batch:
        raise SystemExit(f"the corpus has {len(corpus)} tokens: too few for one batch")
    rows = []
    for index in range(step * run.batch, (step + 1) * run.batch):
        epoch, position = divmod(index, per_epoch)
        order, offset = _epoch(run.seed, epoch, per_epoch, run.window)
        start = offset + int(order[position]) * run.window
        rows.append(corpus[start : start + run.window + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


_EPOCHS: dict[tuple[int, ...], tuple[np.ndarray, int]] = {}


def _epoch(seed: int, epoch: int, windows: int, window: int) -> tuple[np.ndarray, int]:
    key = (seed, epoch, windows, window)
    if key not in _EPOCHS:
        random = np.random.default_rng([seed, epoch])
        _EPOCHS[key] = random.permutation(windows), int(random.integers(window))
    return _EPOCHS[key]


# --- model and optimizer ------------------------------------------------------------------------------------


def make_model(shape: Shape, seed: int) -> torch.nn.Module:
    """A transformers model with random float32 weights."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import LlamaConfig
    from transformers.models.qwen3 import Qwen3Config
    from transformers.models.qwen3_moe import Qwen3MoeConfig

    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "max_position_embeddings": shape.context,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if shape.family == "llama":
        config = LlamaConfig(**common, rms_norm_eps=1e-5, tie_word_embeddings=False)
    elif shape.family == "qwen3":
        config = Qwen3Config(**common, tie_word_embeddings=True)
    elif shape.family == "qwen3_moe":
        config = Qwen3MoeConfig(
            **common,
            tie_word_embeddings=True,
            moe_intermediate_size=shape.expert_intermediate,
            num_experts=shape.experts,
            num_experts_per_tok=shape.experts_used,
            norm_topk_prob=True,  # llama.cpp's graph of this family always does
            output_router_logits=True,
            router_aux_loss_coef=0.01,
        )
    else:
        raise SystemExit(f"unknown family {shape.family!r}")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: (n, r, c) to (n, r, c), singular values near 1.

    Five steps of X <- aX + b(XX')X + c(XX')^2 X with the coefficients of Jordan et al.; bf16 is enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices.bfloat16() if wide else matrices.bfloat16().mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).float()


class Optimizer:
    """Muon for the matrices of the blocks, AdamW for everything else; state is a flat dict of tensors."""

    def __init__(self, model: torch.nn.Module, run: Run) -> None:
        self.run = run
        self.parameters = dict(model.named_parameters())
        outside = ("embed_tokens", "lm_head", "mlp.gate.weight")
        self.matrices = [
            name
            for name, parameter in self.parameters.items()
            if parameter.ndim >= 2 and not any(word in name for word in outside)
        ]
        self.state: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            self.state[f"first.{name}"] = torch.zeros_like(parameter)
            if name not in self.matrices:
                self.state[f"second.{name}"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the gradients; ``rate`` scales both learning rates."""
        groups: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            first = self.state[f"first.{name}"]
            if name not in self.matrices:
                self._adam(parameter, first, self.state[f"second.{name}"], rate)
                continue
            first.lerp_(parameter.grad, 0.05)
            update = parameter.grad.lerp(first, 0.95)
            # Stacked experts hold gate and up in one tensor: they are two maps, orthogonal each for itself.
            parts = 2 if name.endswith("gate_up_proj") else 1
            rows, columns = parameter.shape[-2] // parts, parameter.shape[-1]
            pair = (parameter.view(-1, rows, columns), update.reshape(-1, rows, columns))
            groups.setdefault(pair[0].shape[1:], []).append(pair)
        for (rows, columns), pairs in groups.items():
            step = self.run.muon_rate * rate * math.sqrt(max(1.0, rows / columns))
            directions = orthogonalize(torch.cat([update for _, update in pairs]))
            for target, direction in zip(
                (target for target, _ in pairs),
                directions.split([len(target) for target, _ in pairs]),
                strict=True,
            ):
                target.mul_(1 - 0.01 * step).sub_(direction, alpha=step)

    def _adam(self, parameter: Any, first: torch.Tensor, second: torch.Tensor, rate: float) -> None:
        count = self.run.steps_done + 1
        first.lerp_(parameter.grad, 0.1)
        second.lerp_(parameter.grad.square(), 0.05)
        scale = math.sqrt(1 - 0.95**count) / (1 - 0.9**count)
        parameter.addcdiv_(first, second.sqrt().add_(1e-8), value=-self.run.adam_rate * rate * scale)


def rate_at(progress: float) -> float:
    """Learning rate over the run: up over 2 %, level to 30 %, then straight down to nothing."""
    return min(progress / 0.02 + 0.01, 1.0, max(0.0, (1 - progress) / 0.7) + 1e-3)


# --- training -----------------------------------------------------------------------------------------------


class Stop:
    """Set by SIGINT or SIGTERM: finish the step, save, leave."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def save_state(path: Path, model: torch.nn.Module, optimizer: Optimizer, run: Run) -> None:
    """Weights, moments and position, replaced in one rename."""
    tensors = {f"weight.{name}": value.detach() for name, value in optimizer.parameters.items()}
    tensors.update(optimizer.state)
    temporary = path.with_suffix(".new")
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary, {"run": json.dumps(asdict(run))})
    temporary.replace(path)


@torch.no_grad()
def load_state(path: Path, model: torch.nn.Module, optimizer: Optimizer, run: Run) -> None:
    """Continue from ``path``; refuses the state of a run with other settings."""
    from safetensors import safe_open

    with safe_open(path, "pt") as stream:
        saved = json.loads(stream.metadata()["run"])
    for name in ("seed", "batch", "window", "tokens", "minutes", "muon_rate", "adam_rate"):
        if saved[name] != getattr(run, name):
            raise SystemExit(f"{path} is of a run with {name}={saved[name]}, not {getattr(run, name)}: delete it")
    tensors = load_file(path)
    expected = {f"weight.{name}": value.shape for name, value in optimizer.parameters.items()}
    expected |= {name: value.shape for name, value in optimizer.state.items()}
    if {name: value.shape for name, value in tensors.items()} != expected:
        raise SystemExit(f"{path} is of a model with other tensors: delete it")
    for name, value in optimizer.parameters.items():
        value.copy_(tensors[f"weight.{name}"])
    for name, value in optimizer.state.items():
        value.copy_(tensors[name])
    for name in ("steps_done", "seconds_done", "losses"):
        setattr(run, name, saved[name])


def train(model: Any, corpus: np.ndarray, run: Run, state: Path, stop: Stop, save_every: float = 300.0) -> bool:
    """Train to the end of ``run``; True when it is reached, False when stopped. Prints one line in 20 steps."""
    device = next(model.parameters()).device
    optimizer = Optimizer(model, run)
    if state.exists():
        load_state(state, model, optimizer, run)
        print(f"continued at step {run.steps_done}", flush=True)
    model.train()
    before, start = run.seconds_done, time.monotonic()
    saved = start
    while (progress := run.progress(time.monotonic() - start)) < 1 and not stop.asked:
        tokens = batch_at(corpus, run, run.steps_done).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            output = model(input_ids=tokens[:, :-1], use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        auxiliary = getattr(output, "aux_loss", None)
        total = loss if auxiliary is None else loss + model.config.router_aux_loss_coef * auxiliary
        total.backward()
        optimizer.step(rate_at(progress))
        model.zero_grad(set_to_none=True)
        run.losses.append(float(loss.detach()))
        run.steps_done += 1
        now = time.monotonic()
        if run.steps_done % 20 == 0:
            recent = float(np.mean(run.losses[-20:]))
            speed = run.tokens_done / (before + now - start)
            print(f"step {run.steps_done} {100 * progress:.1f} % loss {recent:.4f} {speed:.0f} tokens/s", flush=True)
        if now - saved > save_every:
            run.seconds_done, saved = before + now - start, now
            save_state(state, model, optimizer, run)
            # progress() adds the time since the start of this process
            run.seconds_done = before
    run.seconds_done = before + time.monotonic() - start
    save_state(state, model, optimizer, run)
    return not stop.asked


@torch.no_grad()
def perplexity(model: Any, tokenizer: Tokenizer, text: str, window: int = 256) -> tuple[float, float]:
    """Perplexity per token and bits per byte; windows without overlap, every token but a window's first."""
    device = next(model.parameters()).device
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    windows = ids[: len(ids) // window * window].view(-1, window)
    if not len(windows):
        raise SystemExit(f"a held-out text of {len(ids)} tokens is shorter than one window of {window}")
    model.eval()
    total, count = 0.0, 0
    for rows in windows.split(16):
        logits = model(input_ids=rows[:, :-1].to(device), use_cache=False).logits.float()
        target = rows[:, 1:].flatten().to(device)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), target, reduction="sum"))
        count += target.numel()
    mean = total / count
    return math.exp(mean), mean / math.log(2) * len(ids) / len(text.encode())


# --- output -------------------------------------------------------------------------------------------------


def write_model(model: Any, out: Path) -> None:
    """bf16 safetensors and config, into ``out``."""
    model = model.to(torch.bfloat16)
    if getattr(model.config, "output_router_logits", None):
        model.config.output_router_logits = False  # only training wants them
    model.save_pretrained(out)


def write_tokenizer(tokenizer: Tokenizer, out: Path, context: int) -> None:
    """tokenizer.json and the class that reads it."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=context
    ).save_pretrained(out)


def write_card(model: Any, shape: Shape, run: Run, texts: Path, note: str, scores: dict[str, Any], out: Path) -> None:
    """README.md: what it is, how it was made, what it measures."""
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    experts = (
        f"{shape.experts} experts of {shape.expert_intermediate}, {shape.experts_used} used"
        if shape.family == "qwen3_moe"
        else f"intermediate {shape.intermediate}"
    )
    lines = [
        "---\nlicense: apache-2.0\nlanguage: [en, ja]\ntags: [test-model]\n---",
        f"# {out.name}\n",
        f"A {config.model_type} of {count / 1e6:.2f} M weights, trained from scratch by "
        "`scripts/train_demo_model.py` of llm-quantize, so that quantization can be shown and measured on weights "
        "that mean something. It writes grammatical nonsense; it is not for use.\n",
        f"hidden {shape.hidden} · {experts} · {shape.layers} layers · {shape.heads} heads of {shape.head}, "
        f"{shape.kv_heads} KV heads · vocabulary {shape.vocabulary} (byte-level BPE, Llama 3's split rule) · "
        f"{'tied' if config.tie_word_embeddings else 'untied'} · context {shape.context} "
        f"(trained on windows of {run.window}) · bf16\n",
        f"Trained for {run.seconds_done / 60:.0f} minutes on {run.tokens_done / 1e6:.1f} M tokens "
        f"({run.steps_done} steps of {run.batch} windows; seed {run.seed}; Muon for matrices, AdamW for the rest); "
        f"training loss at the end {float(np.mean(run.losses[-50:])):.3f} nats per token.",
        *([note] if note else []),
        "\n| training text | bytes (uncompressed, sha256 of the file) |\n| --- | --- |",
    ]
    for path in sorted(texts.glob("*.txt.xz")):
        packed = path.read_bytes()
        digest = hashlib.sha256(packed).hexdigest()[:16]
        lines.append(f"| {path.name} | {len(lzma.decompress(packed)):,} ({digest}…) |")
    if scores:
        lines.append("\n| held-out text (first 300 kB) | perplexity (windows of 256) | bits per byte |")
        lines.append("| --- | ---: | ---: |")
        lines += [f"| {name} | {ppl:.1f} | {bits:.3f} |" for name, (ppl, bits) in scores.items()]
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def count_of(text: str) -> int:
    """``5M``, ``200k`` or plain digits."""
    scale = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    return int(float(text.rstrip("kM")) * scale)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small language model on public texts.")
    parser.add_argument("texts", type=Path, help="directory of *.txt.xz, documents separated by NUL")
    parser.add_argument("out", type=Path, help="directory of the finished model")
    parser.add_argument("--family", choices=["llama", "qwen3", "qwen3_moe"], default="llama")
    parser.add_argument("--tokenizer", type=Path, help="use this model's tokenizer instead of training one")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--tokens", type=count_of, help="length of the run, such as 5M")
    parser.add_argument("--minutes", type=float, help="length of the run by the clock")
    parser.add_argument("--heldout", type=Path, nargs="*", default=[], help="texts to measure on (first 300 kB)")
    parser.add_argument("--note", default="", help="a sentence for the card: where the texts come from")
    parser.add_argument("--batch", type=int, default=16, help="windows in one step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.tokens is None and options.minutes is None:
        parser.error("say how long: --tokens or --minutes")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train, measure, write; 75 when stopped half way."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.out.mkdir(parents=True, exist_ok=True)
    stop = Stop()
    stop.listen()
    if options.tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(options.tokenizer / name, options.out / name)
        tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    elif (options.out / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(options.texts, options.vocabulary)
        write_tokenizer(tokenizer, options.out, Shape("").context)
    corpus = encode_corpus(options.texts, tokenizer)
    print(f"{len(corpus) / 1e6:.2f} M tokens in the corpus", flush=True)

    shape = default_shape(options.family, tokenizer.get_vocab_size())
    run = Run(options.seed, options.batch, tokens=options.tokens, minutes=options.minutes)
    model = make_model(shape, options.seed).to(options.device)
    state = options.out / "training-state.safetensors"
    if not train(model, corpus, run, state, stop):
        print(f"stopped at step {run.steps_done}; the same command continues", flush=True)
        return STOPPED
    write_model(model, options.out)
    model = model.float()  # measured as it will be read: bf16 weights, float32 arithmetic
    scores = {}
    for path in options.heldout:
        text = path.read_bytes()[:300_000].decode("utf-8", errors="ignore").replace("\r\n", "\n")
        scores[path.stem] = perplexity(model, tokenizer, text)
        print(f"{path.name}: perplexity {scores[path.stem][0]:.2f}, {scores[path.stem][1]:.3f} bits per byte")
    write_card(model, shape, run, options.texts, options.note, scores, options.out)
    state.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
