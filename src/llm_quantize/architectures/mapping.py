"""From the tensors of a checkpoint to the tensors of the artifact: nothing missing, nothing unexplained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import AccessError, MalformedInputError, UnsupportedError
from ..io.safetensors_file import TensorInfo
from .base import Family, Form, Hyper, Order, OutputTensor, Piece, TensorMap, Weight
from .config_reader import ConfigReader
from .kinds import Kind

_CHUNK = 1 << 22
_FLOAT32 = {
    Kind.FFN_GATE_INP,
    Kind.FFN_GATE_INP_SHEXP,
    Kind.POS_EMBD,
    Kind.SSM_CONV1D,
    Kind.SHORTCONV_CONV,
}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


class AbsentWeightError(MalformedInputError):
    """A weight that the configuration calls for is not there."""


def row_order(order: Order, hyper: Hyper) -> npt.NDArray[np.int64] | None:
    """int64 (rows,): which source row each output row is.

    ``rope_q``/``rope_k``: transformers rotates dimension i with i + head/2; llama.cpp, for the families that say so,
    rotates neighbours, so the halves of each head are interleaved. ``grouped_qkv``: a fused projection stored as
    groups of (queries of the group, key, value) becomes all queries, all keys, all values. The value heads of a delta
    rule stand by key head in the source, those of one key head together; llama.cpp repeats the key heads whole, so one
    of every key head comes first: of one row each (``value_heads``), of whole heads (``values``), or behind queries and
    keys (``channels``).
    """
    if order == "":
        return None
    if order == "grouped_qkv":
        shared = hyper.n_head // hyper.n_head_kv
        rows = np.arange(hyper.n_head_kv * (shared + 2) * hyper.head_dim).reshape(hyper.n_head_kv, shared + 2, -1)
        return np.concatenate([rows[:, :-2].ravel(), rows[:, -2].ravel(), rows[:, -1].ravel()])
    if order in ("value_heads", "values", "channels"):
        return _tiled(order, hyper)
    heads = hyper.n_head if order == "rope_q" else hyper.n_head_kv
    rows = np.arange(heads * hyper.head_dim).reshape(heads, 2, hyper.head_dim // 2)
    return rows.swapaxes(1, 2).ravel()


def _tiled(order: Order, hyper: Hyper) -> npt.NDArray[np.int64] | None:
    """The order of value heads, one of every key head first; None where each has one."""
    found = hyper.recurrence
    if found is None or found.value_heads == found.key_heads:
        return None
    heads = np.arange(found.value_heads).reshape(found.key_heads, -1).T.ravel()
    if order == "value_heads":
        return heads
    rows = (heads[:, None] * found.value_dim + np.arange(found.value_dim)).ravel()
    before = found.channels - found.values if order == "channels" else 0
    return np.concatenate([np.arange(before), rows + before])


def source_name(form: Form, layer: int | None, index: int) -> str:
    """The name of a source tensor of ``form``, without the family's prefix."""
    return form.name.replace("{each}", str(index)).replace("{}", str(layer))


def checkpoint_name(family: Family, weight: Weight, short: str) -> str:
    """The name that transformers gives to a tensor of ``weight``; its head stands beside the model proper."""
    old, new = family.prefixes[0] if family.prefixes else ("", "")
    bare = weight.tensor == Kind.OUTPUT or not short.startswith(new)
    return short if bare else old + short[len(new) :]


def output_name(weight: Weight, layer: int | None) -> str:
    """The name of ``weight`` in GGUF."""
    usual = ".bias" if weight.forms[0].name.endswith(".bias") else ".weight"
    return weight.tensor.of(layer, usual if weight.ending is None else weight.ending)


def layers_of(weight: Weight, hyper: Hyper) -> Sequence[int | None]:
    """The layers that have ``weight``; None stands for one outside them."""
    if "{}" not in weight.forms[0].name:
        return (None,)
    return [layer for layer in range(hyper.n_layer) if hyper.holds(weight.layers, layer)]


def checkpoint_shapes(family: Family, config: ConfigReader, hyper: Hyper) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors that a checkpoint of this configuration holds, each weight in its first form."""
    found: dict[str, tuple[int, ...]] = {}
    for weight in family.weights:
        form = weight.forms[0]
        head = weight.tensor == Kind.OUTPUT and form.name.endswith(".weight")
        if not config.holds(weight.when) or (head and hyper.tied):
            continue
        for layer in layers_of(weight, hyper):
            sizes = hyper.in_layer(layer).sizes
            for index in range(sizes[form.each] if form.each else 1):
                name = checkpoint_name(family, weight, source_name(form, layer, index))
                found[name] = tuple(sizes[word] for word in form.shape)
    return found


def artifact_shapes(family: Family, config: ConfigReader, hyper: Hyper) -> dict[str, tuple[int, ...]]:
    """{name in GGUF: shape} of the weights that this configuration calls for; no output matrix where it is tied."""
    found: dict[str, tuple[int, ...]] = {}
    for weight in family.weights:
        head = weight.tensor == Kind.OUTPUT and weight.forms[0].name.endswith(".weight")
        if config.holds(weight.when) and not (head and hyper.tied):
            for layer in layers_of(weight, hyper):
                sizes = hyper.in_layer(layer).sizes
                found[output_name(weight, layer)] = tuple(sizes[word] for word in weight.shape)
    return found


def form_of(family: Family, config: ConfigReader, name: str) -> Form | None:
    """The form in which this configuration calls for a tensor that a checkpoint calls ``name``, of any layer; None
    where it does not."""
    short = short_name(family, name)
    for weight in family.weights:
        for form in weight.forms if config.holds(weight.when) else ():
            pattern = re.escape(form.name).replace(re.escape("{each}"), r"\d+").replace(re.escape("{}"), r"\d+")
            if re.fullmatch(pattern, short):
                return form
    return None


def short_name(family: Family, name: str) -> str:
    """``name`` of a checkpoint's tensor with the family's own prefix."""
    for old, new in family.prefixes:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def head_of(family: Family, names: Iterable[str]) -> str | None:
    """The first of ``names``, a checkpoint's, that is the head of its own; None where there is none."""
    heads = {
        form.name
        for weight in family.weights
        if weight.tensor == Kind.OUTPUT
        for form in weight.forms
        if form.name.endswith(".weight")
    }
    return next((name for name in names if short_name(family, name) in heads), None)


class Mapper:
    """One checkpoint's tensors, under the family's names, being used up by the weights of the family."""

    def __init__(self, family: Family, config: ConfigReader, hyper: Hyper, tensors: Mapping[str, TensorInfo]) -> None:
        self.family, self.config, self.hyper = family, config, hyper
        self.sizes = hyper.sizes
        self.orders: dict[Order, npt.NDArray[np.int64] | None] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.names: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.used: set[str] = set()
        reasons = [(re.compile(pattern), reason) for pattern, reason in family.left_out]
        for name, info in tensors.items():
            reason = next((reason for pattern, reason in reasons if pattern.search(name)), None)
            if reason is not None:
                self.left_out[name] = reason
                continue
            short = short_name(family, name)
            if short in self.tensors:
                raise MalformedInputError(
                    "two tensors of the checkpoint have the same meaning",
                    file=info.file,
                    tensor=name,
                    found=self.names[short],
                )
            self.tensors[short], self.names[short] = info, name

    def has(self, name: str) -> bool:
        return name in self.tensors

    def wanted(self, weight: Weight) -> bool:
        """Whether the configuration calls for this weight."""
        return self.config.holds(weight.when)

    def output(self, weight: Weight, layer: int | None) -> OutputTensor:
        """The artifact's tensor for ``weight``. Raises MalformedInputError: absent, or of another shape."""
        form = next((f for f in weight.forms if self.has(source_name(f, layer, 0))), weight.forms[0])
        count = self.sizes[form.each] if form.each else 1
        pieces: list[Piece] = []
        for index in range(count):
            short = source_name(form, layer, index)
            pieces += self._pieces(form, self._check(short, weight, form, layer), weight)
            self.used.add(short)
        sizes = self.hyper.in_layer(layer).sizes
        shape = tuple(sizes[word] for word in weight.shape)
        return output_tensor(weight, layer, shape, tuple(pieces))

    def _check(self, short: str, weight: Weight, form: Form, layer: int | None) -> TensorInfo:
        sizes = self.hyper.in_layer(layer).sizes
        expected = tuple(sizes[word] for word in form.shape)
        info = self.tensors.get(short)
        if info is None:
            n_layer = self.hyper.n_layer
            anything = layer is None or any(
                (found := _LAYER.search(name)) is not None and int(found[1]) == layer for name in self.tensors
            )
            what = "a weight that the configuration calls for is not in the checkpoint"
            if not anything:
                what = f"the configuration has {n_layer} layers, but there are no weights for layer {layer}"
            raise AbsentWeightError(
                what,
                file=self.config.file,
                tensor=checkpoint_name(self.family, weight, short),
                expected=f"{form.shape} = {list(expected)}",
                found="no such tensor",
                remedy="download the checkpoint again; all its shards must be there",
            )
        if info.shape != expected:
            raise MalformedInputError(
                f"the shape of a weight disagrees with the configuration ({', '.join(form.shape)})",
                file=info.file,
                tensor=info.name,
                expected=list(expected),
                found=list(info.shape),
                remedy="config.json and the weights must come from the same model",
            )
        return info

    def _order(self, order: Order) -> npt.NDArray[np.int64] | None:
        if order not in self.orders:  # one array serves all layers
            self.orders[order] = row_order(order, self.hyper)
        return self.orders[order]

    def _pieces(self, form: Form, info: TensorInfo, weight: Weight) -> list[Piece]:
        order, add = self._order(form.order), weight.add
        if len(info.shape) == 1:
            return [Piece(info.name, columns=order, add=add, curve=weight.curve)]
        index, parts = form.part
        if parts == 1:
            columns = self._order(form.columns)
            return [Piece(info.name, order=order, transpose=form.transpose, columns=columns, add=add, deal=form.deal)]
        rows = info.shape[-2] // parts
        matrices = info.shape[0] if len(info.shape) == 3 else 1
        return [Piece(info.name, start=m * info.shape[-2] + index * rows, count=rows, add=add) for m in range(matrices)]

    def _idle(self, short: str, layer: int) -> bool:
        """Whether this is a weight that only layers with keys of their own use, of a layer that has none."""
        uneven = self.hyper.uneven
        if uneven is None or not uneven.first_shared <= layer < self.hyper.n_layer:
            return False
        own = [w for w in self.family.weights if w.layers in ("own_keys", "own_values") and self.wanted(w)]
        return any(source_name(form, layer, 0) == short for weight in own for form in weight.forms)

    def finish(self) -> dict[str, str]:
        """What was left out and why. Raises MalformedInputError for a tensor that nothing explains."""
        for short, info in self.tensors.items():
            if short in self.used:
                continue
            found = _LAYER.search(short)
            layer, n_layer = (int(found[1][:9]), self.hyper.n_layer) if found else (-1, 0)
            extra = self.config.integer("num_nextn_predict_layers", low=0, default=0)
            if found and n_layer <= layer < n_layer + extra:
                self.left_out[info.name] = "a head that predicts several tokens at once, not part of the model proper"
                continue
            if self._idle(short, layer):
                self.left_out[info.name] = "keys and values of a layer that takes those of an earlier one: not used"
                continue
            what = f"the checkpoint holds a tensor that {self.family.model_type} with this configuration does not have"
            if layer >= n_layer:
                what = f"the configuration has {n_layer} layers, but there are weights for layer {layer}"
            raise MalformedInputError(
                what,
                file=info.file,
                tensor=info.name,
                found=f"{info.dtype} {list(info.shape)}",
                remedy="config.json and the weights must come from the same model",
            )
        return self.left_out


def output_tensor(weight: Weight, layer: int | None, shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> OutputTensor:
    """An output under its GGUF name, marked where GGUF keeps F32 (as convert_hf_to_gguf: vectors, norms, routers)."""
    name = output_name(weight, layer)
    float32 = len(shape) < 2 or name.endswith(("_norm.weight", ".bias")) or weight.tensor in _FLOAT32
    return OutputTensor(name, shape, pieces, float32=float32, steers=weight.tensor.steers)


def map_tensors(
    family: Family,
    config: ConfigReader,
    hyper: Hyper,
    tensors: Mapping[str, TensorInfo],
    constants: Mapping[Kind, npt.NDArray[np.float32]],
    same: Callable[[TensorInfo, TensorInfo], bool] | None = None,
) -> TensorMap:
    """Every tensor of the checkpoint accounted for. Order: as the network runs, whatever the order of the source. An
    output matrix of its own where llama.cpp can have none is among its limits.

    Raises: MalformedInputError (a weight absent, of another shape, or unexplained; layers that do not fit the
    configuration).
    """
    mapper = Mapper(family, config, hyper, tensors)
    whole = [w for w in family.weights if "{}" not in w.forms[0].name and mapper.wanted(w)]
    layered = [w for w in family.weights if "{}" in w.forms[0].name and mapper.wanted(w)]
    first = [w for w in whole if w.tensor in (Kind.TOKEN_EMBD, Kind.POS_EMBD)]
    outputs = [mapper.output(weight, None) for weight in first]
    for tensor, values in constants.items():
        name = tensor.of(None)
        outputs.append(OutputTensor(name, values.shape, constant=values, float32=True))
    for layer in range(hyper.n_layer):
        outputs += [mapper.output(weight, layer) for weight in layered if hyper.holds(weight.layers, layer)]
    head = [w for w in whole if w.tensor == Kind.OUTPUT]
    outputs += [mapper.output(weight, None) for weight in whole if weight not in first and weight not in head]
    limits: list[UnsupportedError] = []
    for weight in head:
        outputs += _head(mapper, weight, first[0], same or same_bytes, limits)
    return TensorMap(tuple(outputs), mapper.finish(), tuple(limits))


def _head(
    mapper: Mapper,
    weight: Weight,
    embedding: Weight,
    same: Callable[[TensorInfo, TensorInfo], bool],
    limits: list[UnsupportedError],
) -> list[OutputTensor]:
    """output.weight (and its bias): the checkpoint's own, or the embedding where it is tied and the runtime asks."""
    family, short = mapper.family, weight.forms[0].name
    if not mapper.hyper.tied or weight.forms[0].name.endswith(".bias"):
        if not family.output:
            info = mapper.tensors.get(short)
            limits.append(
                UnsupportedError(
                    f"llama.cpp ties the output of {family.model_type} to its embedding; this checkpoint does not",
                    file=info.file if info else mapper.config.file,
                    tensor=info.name if info else "lm_head.weight",
                    expected="tie_word_embeddings true",
                    found="tie_word_embeddings false",
                )
            )
        return [mapper.output(weight, None)]
    table = mapper.tensors[embedding.forms[0].name]
    if mapper.has(short):
        own = mapper.output(weight, None)
        info = mapper.tensors[short]
        if not same(info, table):
            if not family.output:
                what = f"llama.cpp ties the output of {family.model_type} to its embedding; this checkpoint has another"
                limits.append(UnsupportedError(what, file=info.file, tensor=info.name))
            return [own]
        mapper.left_out[info.name] = f"the same values as {table.name}, to which the configuration ties it"
    if not family.needs_output:
        return []
    shape = tuple(mapper.sizes[word] for word in weight.shape)
    return [output_tensor(weight, None, shape, (Piece(table.name),))]


def same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same bytes in the same type. Raises AccessError if they cannot be read."""
    if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    if (one.file, one.offset) == (other.file, other.offset):
        return True
    try:
        with one.file.open("rb") as left, other.file.open("rb") as right:
            left.seek(one.offset)
            right.seek(other.offset)
            for start in range(0, one.nbytes, _CHUNK):
                size = min(_CHUNK, one.nbytes - start)
                if left.read(size) != right.read(size):
                    return False
    except OSError as problem:
        raise AccessError("a weight cannot be read", file=one.file, tensor=one.name, found=problem) from problem
    return True
