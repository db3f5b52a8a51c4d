"""Which modules a directory format packs, and which tensors stay as they are.

A module is one ``nn.Linear`` of the model as its owner names it: the rows of one tensor of the checkpoint, in the
order in which they are stored (fused query-key-value and gate-up matrices stay one module), or one expert's rows of a
three-dimensional tensor, under the name that the family gives single experts. What the architecture maps to weights of
decoder blocks is packed, less what recipes never quantize (routers, norms) and the few rows that steer a recurrent
state; everything else is kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llm_quantize.architectures.base import OutputTensor, Piece, Weight
from llm_quantize.architectures.kinds import Kind
from llm_quantize.architectures.mapping import short_name
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.formats.base import Coverage
from llm_quantize.formats.gguf.levels import TensorShape, is_quantizable
from llm_quantize.io.safetensors_file import TensorInfo

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source

_BLOCK = re.compile(r"blk\.(\d+)\.")
HEAD = "output.weight"
EDGES = ("token_embd.weight", HEAD)
"""Embedding and output matrix, as the map of tensors calls them."""

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),  # of a delta rule
)


@dataclass(frozen=True)
class Module:
    """``name`` as runtimes know it; ``weight``: its rows, an OutputTensor called NAME.weight. ``seen``: a block holds
    it, so that text shows what goes into it."""

    name: str
    weight: OutputTensor
    seen: bool = True


@dataclass
class Selection:
    """Every tensor of the checkpoint accounted for.

    ``packed``: {tensor: its modules, in order}, in the order of the checkpoint. ``ignored``: names of the modules that
    the user's expressions left out. ``kept``: the tensors that stay. ``dropped``: {tensor: why it is not taken over}.
    """

    packed: dict[str, list[Module]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    kept: list[TensorInfo] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def modules(self) -> list[Module]:
        return [module for modules in self.packed.values() for module in modules]


def joined_with(name: str) -> frozenset[str]:
    """The modules that runtimes join with module ``name`` into one, it included; empty where it stands alone."""
    parent, _, last = name.rpartition(".")
    return frozenset(f"{parent}.{other}" for names in _FUSED if last in names for other in names)


def select(source: Source, ignore: Sequence[str] = (), *, edges: Collection[str] = ()) -> Selection:
    """Decide about every tensor. ``ignore``: regular expressions, searched in the names of modules. ``edges``: those
    of EDGES that are packed too.

    Raises UsageError (a bad expression), UnsupportedError (matrices stored (in, out), or experts in one tensor that no
    runtime has single names for).
    """
    if source.architecture.hyper.uneven is not None:
        family = source.architecture.family.model_type
        raise UnsupportedError(
            f"models of type {family} cannot be written as packed directories yet",
            file=source.checkpoint.config_file,
            expected="matrices in the blocks and an output matrix, all else as in its source",
            found="embeddings of layers, or experts beside a dense network",
            remedy="make a GGUF file of it",
        )
    expressions = [_compile(text) for text in ignore]
    used = [False] * len(expressions)
    found = Selection()
    for name, modules in _packable(source, expressions, edges).items():
        wanted = []
        for module in modules:
            hits = [index for index, expression in enumerate(expressions) if expression.search(module.name)]
            for index in hits:
                used[index] = True
            if hits:
                found.ignored.append(module.name)
            else:
                wanted.append(module)
        if wanted and len(wanted) < len(modules):
            raise UsageError(
                "--ignore leaves out some of the experts that the checkpoint stores in one tensor, and not others",
                tensor=name,
                found=f"{len(wanted)} of {len(modules)} are left to pack",
                remedy="give an expression that finds all of them, or none",
            )
        if wanted:
            found.packed[name] = [_checked(source, module) for module in wanted]
    for name, info in source.checkpoint.tensors.items():
        if name in found.packed:
            continue
        if not source.checkpoint.is_readable(name):
            found.dropped[name] = f"a buffer of {info.dtype}, which runtimes make by themselves"
        else:
            found.kept.append(info)
    found.warnings += [
        f"the expression {text!r} finds no module" for text, hit in zip(ignore, used, strict=True) if not hit
    ]
    found.warnings += _split_fusions(found)
    return found


def head_of(source: Source) -> str | None:
    """The module of the output matrix, where the model has one of its own; None where it is the embedding."""
    found = next((output for output in source.tensors.outputs if output.name == HEAD), None)
    return None if found is None or len(found.pieces) != 1 else found.pieces[0].source.removesuffix(".weight")


def _compile(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"{text!r} is not a regular expression: {error}", remedy="see --ignore") from error


def _packable(source: Source, ignore: Sequence[re.Pattern[str]], edges: Collection[str]) -> dict[str, list[Module]]:
    """{tensor: its modules} for everything that blocks multiply with and recipes may quantize, and with ``edges`` for
    what stands before and after them, in checkpoint order."""
    found: dict[str, dict[str, Module]] = {}
    tensors = source.checkpoint.tensors
    for output in source.tensors.outputs:
        block = _BLOCK.match(output.name)
        edge = output.name in edges
        if (block is None and not edge) or output.steers:
            continue
        if not is_quantizable(TensorShape(output.name, output.shape)):
            continue
        for piece in output.pieces:
            info = tensors[piece.source]
            modules = [_whole(info, seen=block is not None)]
            if block is not None and len(info.shape) == 3 and not _finds(ignore, modules[0]):
                modules = list(_experts(source, output, int(block[1]), piece, info))
            found.setdefault(info.name, {}).update({module.name: module for module in modules})
    transposed = {piece.source for output in source.tensors.outputs for piece in output.pieces if piece.transpose}
    return {
        name: [
            module if _finds(ignore, module) else _oriented(module, tensors[name], transposed)
            for module in found[name].values()
        ]
        for name in tensors
        if name in found
    }


def _finds(expressions: Sequence[re.Pattern[str]], module: Module) -> bool:
    return any(expression.search(module.name) for expression in expressions)


def _whole(info: TensorInfo, *, seen: bool) -> Module:
    name = info.name.removesuffix(".weight")
    return Module(name, OutputTensor(f"{name}.weight", info.shape, (Piece(info.name),)), seen)


def _oriented(module: Module, info: TensorInfo, transposed: set[str]) -> Module:
    if info.name in transposed:
        raise UnsupportedError(
            "matrices stored (in, out), as GPT-2's, cannot be packed: runtimes of these formats know nn.Linear only",
            file=info.file,
            tensor=info.name,
            expected="(out, in)",
            found=list(info.shape),
            remedy="write gguf, which has this family",
        )
    return module


def _experts(source: Source, output: OutputTensor, layer: int, piece: Piece, info: TensorInfo) -> Iterator[Module]:
    """One module for each expert whose rows ``piece`` takes from a three-dimensional tensor."""
    weight = _weight(source, output.name)
    single, number = weight.forms[0], str(layer)
    used = next((form for form in weight.forms if info.name.endswith(form.name.replace("{}", number))), None)
    if used is None or not single.each:
        raise UnsupportedError(
            "these experts are stored in one tensor, and no runtime has names for packed single ones of this family",
            file=info.file,
            tensor=info.name,
            remedy="leave them as they are with --ignore and an expression that finds this tensor, or write gguf",
        )
    prefix = info.name[: len(info.name) - len(used.name.replace("{}", number))]
    each, rows = info.shape[1], output.shape[-2]
    for start in range(0, info.shape[0] * each, each) if piece.count is None else (piece.start,):
        short = single.name.replace("{}", number).replace("{each}", str(start // each))
        name = prefix + short.removesuffix(".weight")
        yield Module(name, OutputTensor(f"{name}.weight", (rows, info.shape[2]), (Piece(info.name, start, rows),)))


def _weight(source: Source, name: str) -> Weight:
    """The family's weight behind an output of a block."""
    generic = _BLOCK.sub("blk.{bid}.", name).removesuffix(".weight")
    config = source.architecture.config
    for weight in source.architecture.family.weights:
        if weight.tensor == generic and not weight.forms[0].name.endswith("bias"):
            asked = weight.when.lstrip("!")
            if not asked or config.boolean(asked) != weight.when.startswith("!"):
                return weight
    raise ValueError(f"{name} belongs to no weight of {source.architecture.family.model_type}")


def _checked(source: Source, module: Module) -> Module:
    """``module``, whose source can be read as numbers. Raises UnsupportedError."""
    source.checkpoint.check_readable(module.weight.pieces[0].source)
    return module


def coverage(source: Source, found: Selection) -> Coverage:
    """The linear modules of the model by what became of them, for a format's configuration."""
    short = next(weight for weight in source.architecture.family.weights if weight.tensor == Kind.OUTPUT)
    usual = short.forms[0].name.removesuffix(".weight")
    head = next(
        (info.name.removesuffix(".weight") for info in found.kept if info.name.endswith(f"{usual}.weight")), usual
    )
    inside = {piece.source for output in source.tensors.outputs for piece in output.pieces if _BLOCK.match(output.name)}
    edges = {piece.source for output in source.tensors.outputs for piece in output.pieces} - inside
    linear = [info for info in found.kept if len(info.shape) == 2 and info.name.endswith(".weight")]
    names = {info.name: info.name.removesuffix(".weight") for info in linear if info.name not in edges}
    routers = [name for tensor, name in names.items() if tensor in inside and name not in found.ignored]
    outside = [name for tensor, name in names.items() if tensor not in inside and name != head]
    kept = spellings(source, [*routers, *found.ignored])
    if head != usual:  # transformers has it beside the parts of a model, wherever the checkpoint has it
        kept.append(usual)
    return Coverage([module.name for module in found.modules], kept, outside, head)


def spellings(source: Source, names: Sequence[str]) -> list[str]:
    """``names`` of modules, and behind them what transformers calls them, where that is something else."""
    family = source.architecture.family
    if not family.text_prefix:
        return list(names)
    others = [family.text_prefix + short_name(family, name) for name in names]
    return list(dict.fromkeys([*names, *others]))


def _split_fusions(found: Selection) -> list[str]:
    """A warning where --ignore parts what vLLM fuses: queries, keys, values; gate and up."""
    packed = {module.name for module in found.modules}
    warnings = []
    for names in _FUSED:
        parted = []
        for ignored in found.ignored:
            parent, _, last = ignored.rpartition(".")
            if last in names and any(f"{parent}.{other}" in packed for other in names):
                parted.append(ignored)
        if parted:
            warnings.append(
                f"{parted[0]} stays as it is, but not all of {', '.join(names)} do ({len(parted)} such modules): vLLM "
                "fuses them and refuses a mixture"
            )
    return warnings
