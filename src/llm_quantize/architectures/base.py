"""What a model family is to us: data that maps a checkpoint's tensors and configuration to a runtime's.

Weights are in Hugging Face orientation, W (out, in). An output tensor is a matrix of rows; every row comes from
one row (or, transposed, one column) of one source tensor, so any row range can be produced by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedError
from .kinds import Kind

Curve = Literal["", "-exp", "log-"]
"""What is done to each value beside adding to it: nothing, -exp(x), or its inverse, log(-x)."""


@dataclass(frozen=True)
class Piece:
    """Rows of an output tensor that come from one source tensor.

    The source is seen as a matrix (rows, columns): leading dimensions flattened, 1-D = one row.
    ``start``/``count``: the block of source rows used (count None = to the end).
    ``order``: int64 (count,), which row of that block each output row is (None = as they stand).
    ``transpose``: the source is stored (in, out), as GPT-2's Conv1D: output row i is source column i. For a 3-D
    source the last two dimensions of each matrix are exchanged.
    ``columns``: int64 (columns,), which source column each output column is (None = as they stand): a bias, which
    is one row, is reordered with it as its matrix is with ``order``.
    ``deal``: (i, n), every n-th of the source's columns as it is stored, from the i-th: of a transposed source output
    rows, and in other pieces columns. Rows are counted after that.
    ``add``: added to every value in float32 (Gemma stores norm weights minus one). ``curve``: applied in float32
    (decays of a recurrent state are stored as logarithms).
    """

    source: str
    start: int = 0
    count: int | None = None
    order: npt.NDArray[np.int64] | None = None
    transpose: bool = False
    columns: npt.NDArray[np.int64] | None = None
    add: float = 0.0
    curve: Curve = ""
    deal: tuple[int, int] = (0, 1)

    @property
    def altered(self) -> bool:
        """Whether the values themselves are changed, not only where they stand."""
        return bool(self.add or self.curve)


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the artifact: its name there, its row-major shape (out, in), and where its rows come from.

    ``pieces`` are concatenated along the flattened row axis. ``constant`` (float32) is used instead where the
    values follow from the configuration (rotary frequency factors). ``float32`` marks what a runtime wants in F32
    whatever the recipe says (norms, biases, routers: the recipe still sees them, and its never-quantized list rules
    in general; this flag only records what the format's owner stores as F32 even at F16/BF16/Q8_0). ``steers``: see
    ``Kind.steers``. ``dealt``: its rows are those of all pieces, one value of each in turn.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    constant: npt.NDArray[np.float32] | None = None
    float32: bool = False
    steers: bool = False
    dealt: bool = False


@dataclass(frozen=True)
class TensorMap:
    """Every source tensor accounted for: used by ``outputs``, or in ``left_out`` with the reason. ``limits``: what
    llama.cpp has no place for."""

    outputs: tuple[OutputTensor, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[UnsupportedError, ...] = ()


@dataclass(frozen=True)
class Recurrence:
    """Layers that have no attention but gated delta rules (Gated DeltaNet): a short convolution over queries, keys and
    values, and one state (``key_dim``, ``value_dim``) for each value head, shared by neighbouring value heads' key
    head. ``layers``: which. ``kernel``: tokens under the convolution."""

    layers: frozenset[int]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def values(self) -> int:
        """Width of all value heads."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Width of the convolution: queries, keys, values."""
        return 2 * self.key_heads * self.key_dim + self.values


@dataclass(frozen=True)
class Uneven:
    """Sizes that differ from layer to layer. ``full``: the layers without a window, whose heads have ``head_dim``
    dimensions and of which there are ``n_head_kv`` for keys; ``key_is_value``: their values are their keys. From layer
    ``first_shared`` on, keys and values are those of the last layer of the same kind before it, and the feed-forward
    network is ``feed_forward_length`` wide. ``per_layer``: width of what each layer is given of an embedding of its own
    (0: there is none), which has ``per_layer_vocab`` rows."""

    full: frozenset[int]
    head_dim: int
    n_head_kv: int
    key_is_value: bool
    first_shared: int
    feed_forward_length: int
    per_layer: int
    per_layer_vocab: int


@dataclass(frozen=True)
class Hyper:
    """The sizes of a model, read from its configuration and checked. All are counts; ``rotary`` is the number of
    dimensions of a head that are rotated (0: none). ``vocab_size`` is the number of embedding rows. ``recurrence``: of
    the layers that have a state in the place of keys and values, if there are any. ``n_dense``: the first layers of a
    mixture, which have no experts. ``convolved``: layers with a short convolution of ``kernel`` tokens in the place of
    attention. ``uneven``: what of this is not the same in every layer; what stands here is then of layers with a window
    and keys of their own."""

    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int
    n_expert_used: int
    vocab_size: int
    context_length: int
    embedding_length: int
    feed_forward_length: int
    expert_feed_forward_length: int
    shared_feed_forward_length: int
    head_dim: int
    rotary: int
    tied: bool
    recurrence: Recurrence | None = None
    n_dense: int = 0
    convolved: frozenset[int] = frozenset()
    kernel: int = 0
    uneven: Uneven | None = None

    def holds(self, layers: Layers, layer: int) -> bool:
        """Whether ``layer`` is one of ``layers``."""
        if layers in ("dense", "experts"):
            return (layer < self.n_dense) == (layers == "dense")
        if layers in ("own_keys", "own_values"):
            uneven = self.uneven
            if uneven is None:
                return True
            owns = layer < uneven.first_shared
            return owns and not (layers == "own_values" and uneven.key_is_value and layer in uneven.full)
        recurrent = layer in (self.convolved if self.recurrence is None else self.recurrence.layers)
        return not layers or recurrent == (layers == "recurrent")

    def in_layer(self, layer: int | None) -> Hyper:
        """The sizes of one layer, where they differ."""
        uneven = self.uneven
        if uneven is None or layer is None:
            return self
        found = self
        if layer in uneven.full:
            found = replace(found, head_dim=uneven.head_dim, n_head_kv=uneven.n_head_kv)
        if layer >= uneven.first_shared:
            found = replace(found, feed_forward_length=uneven.feed_forward_length)
        return found

    @property
    def sizes(self) -> dict[str, int]:
        """The words that ``Weight.shape`` may use, with their values."""
        q, kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        recurrence = self.recurrence or Recurrence(frozenset(), 0, 0, 0, 0, 0)
        return {
            "channels": recurrence.channels,
            "values": recurrence.values,
            "value_heads": recurrence.value_heads,
            "value_dim": recurrence.value_dim,
            "kernel": recurrence.kernel or self.kernel,
            "3embd": 3 * self.embedding_length,
            "one": 1,
            "per_layer": self.uneven.per_layer if self.uneven else 0,
            "per_layer_all": self.uneven.per_layer * self.n_layer if self.uneven else 0,
            "per_layer_vocab": self.uneven.per_layer_vocab if self.uneven else 0,
            "embd": self.embedding_length,
            "ff": self.feed_forward_length,
            "2ff": 2 * self.feed_forward_length,
            "vocab": self.vocab_size,
            "context": self.context_length,
            "head": self.head_dim,
            "heads": self.n_head,
            "kv_heads": self.n_head_kv,
            "q": q,
            "2q": 2 * q,
            "kv": kv,
            "qkv": q + 2 * kv,
            "experts": self.n_expert,
            "expert_ff": self.expert_feed_forward_length,
            "2expert_ff": 2 * self.expert_feed_forward_length,
            "shared_ff": self.shared_feed_forward_length,
            "2shared_ff": 2 * self.shared_feed_forward_length,
        }


# How the rows of a projection are reordered; ``mapping.row_order`` gives the meaning of each word.
Order = Literal["", "rope_q", "rope_k", "grouped_qkv", "value_heads", "values", "channels"]

Layers = Literal["", "attention", "recurrent", "dense", "experts", "own_keys", "own_values"]
"""Which layers: all, those with attention, those with a recurrent state; of a mixture those without or with experts;
those with keys, or values, of their own."""


@dataclass(frozen=True)
class Form:
    """One way in which a weight may be stored in a checkpoint.

    ``name``: its name there, without the family's prefix; ``{}`` is the layer, ``{each}`` the index along ``each``.
    ``shape``: of the source tensor, in words of ``Hyper.sizes``. ``each``: the word for how many source tensors are
    stacked (experts, heads). ``part``: (i, n), the i-th of n equal row blocks of each matrix of the source.
    ``order``: of its rows; ``columns``: of its columns. ``deal``: see Piece.
    """

    name: str
    shape: tuple[str, ...]
    each: str = ""
    part: tuple[int, int] = (0, 1)
    order: Order = ""
    transpose: bool = False
    columns: Order = ""
    deal: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Weight:
    """One weight of the artifact: which it is, its shape there, and the forms in which checkpoints store it.

    ``when``: the boolean of the configuration it depends on ("!" before it negates); "" = always there.
    ``add``, ``curve``: see Piece. ``layers``: those that have it. ``ending``: of its name in GGUF; None: .bias for
    what is called so in the checkpoint, else .weight.
    """

    tensor: Kind
    shape: tuple[str, ...]
    forms: tuple[Form, ...]
    when: str = ""
    add: float = 0.0
    curve: Curve = ""
    layers: Layers = ""
    ending: str | None = None


@dataclass(frozen=True)
class Value:
    """A metadata value copied from the configuration. ``key`` is the gguf package's, with ``{arch}``.

    ``required``: the runtime would put a value of its own in the place of none; else none leaves the key out, or
    writes ``empty``.
    """

    key: str
    name: str
    kind: Literal["int", "float", "bool"]
    required: bool = False
    empty: int | None = None


@dataclass(frozen=True)
class Limit:
    """A value of the configuration that the runtime's graph cannot vary: only ``allowed`` ones can be converted."""

    name: str
    allowed: tuple[object, ...]
    default: object = None


@dataclass(frozen=True)
class Feed:
    """A norm and all that multiplies its output: attention's projections, the feed-forward block's, or both.

    ``when``: as in Weight. Without such a row a norm is taken to feed nothing, and no scale is folded into it.
    """

    norm: Kind
    readers: tuple[Literal["attention", "feed_forward"], ...]
    when: str = ""


# Most blocks: one norm before attention, one before the feed-forward block.
TWO_FEEDS = (
    Feed(Kind.ATTN_NORM, ("attention",)),
    Feed(Kind.FFN_NORM, ("feed_forward",)),
)


@dataclass(frozen=True)
class Family:
    """A model family as one row of data.

    ``arch``: its name in GGUF. ``generator``: transformers' class of its model that generates text; ``auto``: the
    automatic class that finds it. ``words``:
    {the name of a value here: the one that its configuration has for it} where these differ ("": none); the names here
    are those of ``config_reader.ALIASES``. ``weights``: everything a checkpoint holds. ``prefixes``: (old, new) pairs
    that bring source names to the ones used here; the first that fits is taken.
    ``left_out``: (regular expression, reason). ``defaults``: configuration values that transformers fills in where
    config.json has none.
    ``layer_types``: the period of full attention among sliding layers that the runtime has built in (0: no check).
    ``sliding_at``: layers slide in models of so many layers alone (0: whatever their number).
    ``sliding_pattern``: instead, the runtime reads which layers slide; ``layer_types`` is then the default period.
    ``rope``: which rope scalings the runtime computes for this family. ``rope_default``: rope_theta, or None where
    positions are not rotated. ``partial_default``: rotated share of a head; ``partial``: whether it may be less than 1.
    ``count_rope``: write rope.dimension_count always. ``needs_output``: the runtime wants output.weight although the
    embedding is tied; ``output``: False where the runtime cannot have one. ``nested``: the configuration stands under
    ``text_config``. ``notes``: (name, text) pairs said to the user where the configuration has a value for name.
    ``feed_multiple``: the feed-forward width where the configuration has none, in embedding widths.
    ``score_layers``: the runtime scales scores by the head size, but by embedding / heads in models of so many layers.
    ``rope_period``: the runtime leaves every so-manieth layer without rotation.
    ``ramp``: the runtime reads YaRN's ramp and magnitude, which it has built in otherwise. ``temperature``: the name,
    among the rotary numbers, of how much queries grow with the logarithm of their position.
    ``falcon_heads``: key heads follow from multi_query and new_decoder_architecture, as in Falcon.
    ``text_prefix``: what stands before the names of the language model in transformers, where checkpoints have another.
    ``dense``: its configuration has the width of a feed-forward network that is no expert.
    ``equal_heads``: the runtime wants as many key heads as query heads.
    ``recurrent_period``: layers have a recurrent state but for every so-manieth, as the runtime has it where nothing
    says otherwise (0: all have attention). ``sections``: usual numbers of rotated pairs for time, height and width.
    ``leading``: the configuration's word for how many first layers of a mixture have no experts; ``shared``: for how
    many experts see every token, as one of their width together. ``fixed``: {key with ``{arch}``: its one value}.
    ``convolutions``: layers that are not called full_attention have a short convolution instead, and no key heads in
    GGUF; ``thirds``: their configuration may have the feed-forward width before it is cut to two thirds.
    ``plain_gate``: what lies between up and down is a product with the gate, so that scales may move through it.
    ``rounds_ramp``: the runtime rounds the ends of YaRN's ramp where models of the family do not, and runs them so.
    ``uneven``: sizes differ from layer to layer, as in Gemma 4.
    ``feeds``: which norm's output goes where, for scales that are folded into norms (see architectures/scaling.py).
    """

    model_type: str
    arch: str
    generator: str
    weights: tuple[Weight, ...]
    activations: tuple[str, ...]
    defaults: Mapping[str, object] = field(default_factory=dict)
    prefixes: tuple[tuple[str, str], ...] = (("model.", ""),)
    left_out: tuple[tuple[str, str], ...] = ()
    values: tuple[Value, ...] = ()
    limits: tuple[Limit, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    norm: Literal["rms", "layer"] = "rms"
    layer_types: int = 0
    sliding_at: int = 0
    rope: frozenset[str] = frozenset({"linear", "dynamic", "yarn"})
    rope_default: float | None = 10000.0
    rope_local_default: float | None = None
    partial_default: float = 1.0
    partial: bool = False
    count_rope: bool = False
    own_head_dim: bool = False
    needs_output: bool = False
    output: bool = True
    nested: bool = False
    feed_multiple: int = 0
    falcon_heads: bool = False
    equal_heads: bool = False
    sliding_pattern: bool = False
    score_layers: int = 0
    rope_period: int = 0
    ramp: bool = False
    temperature: str = ""
    recurrent_period: int = 0
    sections: tuple[int, ...] = ()
    text_prefix: str = ""
    auto: str = "AutoModelForCausalLM"
    uneven: bool = False
    dense: bool = True
    leading: str = ""
    shared: str = ""
    fixed: Mapping[str, int] = field(default_factory=dict)
    convolutions: bool = False
    thirds: bool = False
    plain_gate: bool = True
    rounds_ramp: bool = False
    feeds: tuple[Feed, ...] = TWO_FEEDS
    words: Mapping[str, str] = field(default_factory=dict)
