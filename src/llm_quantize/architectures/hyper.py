"""The sizes of a model as its configuration has them, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UnsupportedError
from .base import Family, Hyper, Recurrence, Uneven
from .config_reader import ConfigReader
from .rope import Rope

_MOST_LAYERS, _MOST_EXPERTS, _LARGEST_HEAD = 4096, 4096, 1 << 16


def read_hyper(config: ConfigReader, family: Family, rope: Rope | None, limits: list[UnsupportedError]) -> Hyper:
    """The sizes of the model, checked against each other; those that llama.cpp derives otherwise are added to
    ``limits``.

    Raises: MalformedInputError (absent, wrong, contradictory).
    """
    heads = config.integer("num_attention_heads", high=1 << 16)
    kv = config.integer("num_key_value_heads", high=1 << 16, default=heads)
    if family.falcon_heads and not config.boolean("new_decoder_architecture"):
        kv = 1 if config.boolean("multi_query", default=True) else heads
    if heads % kv:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})", kv)
    if family.equal_heads and kv != heads:
        what = f"llama.cpp wants as many key heads as query heads for {family.model_type}"
        limits.append(UnsupportedError(what, file=config.file, expected=heads, found=kv))
    embedding = config.integer("hidden_size")
    head_dim = _head_dim(config, family, embedding, heads, limits)
    rotary = 0 if rope is None else int(head_dim * rope.share)
    if rotary % 2:
        raise config.wrong("number of rotated dimensions", "an even number", rotary)
    usual = family.feed_multiple * embedding or None
    feed = config.integer("intermediate_size", default=usual) if family.dense else 0
    feed = _two_thirds(config, feed) if family.thirds else feed
    experts = config.integer("num_experts", low=0, high=_MOST_EXPERTS, default=0)
    used = config.integer("num_experts_per_tok", low=1, high=max(1, experts)) if experts else 0
    return Hyper(
        n_layer=config.integer("num_hidden_layers", high=_MOST_LAYERS),
        n_head=heads,
        n_head_kv=kv,
        n_expert=experts,
        n_expert_used=used,
        vocab_size=config.integer("vocab_size"),
        context_length=config.integer("max_position_embeddings"),
        embedding_length=embedding,
        feed_forward_length=feed,
        expert_feed_forward_length=config.integer("moe_intermediate_size", default=feed or None) if experts else 0,
        shared_feed_forward_length=_shared(config, family) if experts else 0,
        head_dim=head_dim,
        rotary=rotary,
        tied=config.boolean("tie_word_embeddings"),
        recurrence=_recurrence(config, family) if family.recurrent_period else None,
        convolved=_convolved(config) if family.convolutions else frozenset(),
        kernel=config.integer("conv_L_cache", low=2, high=_LARGEST_HEAD) if family.convolutions else 0,
        n_dense=config.integer(family.leading, low=0) if experts and family.leading else 0,
        uneven=_uneven(config, family, heads, kv, feed) if family.uneven else None,
    )


def _uneven(config: ConfigReader, family: Family, heads: int, kv: int, feed: int) -> Uneven:
    """What differs from layer to layer. Raises MalformedInputError."""
    n_layer = config.integer("num_hidden_layers", high=_MOST_LAYERS)
    types = config.sequence("layer_types")
    if types is None:
        types = ["sliding_attention" if (i + 1) % family.layer_types else "full_attention" for i in range(n_layer)]
    full = frozenset(layer for layer, kind in enumerate(types) if kind == "full_attention")
    key_is_value = config.boolean("attention_k_eq_v")
    own = _of_full_layers(config, full)
    if own is None:  # as before transformers 5.23, which has these two for whole models
        head_dim = config.integer("global_head_dim", high=_LARGEST_HEAD)
        kv = config.integer("num_global_key_value_heads", high=_LARGEST_HEAD, default=kv) if key_is_value else kv
    else:
        head_dim = own.integer("head_dim", high=_LARGEST_HEAD, default=config.integer("head_dim"))
        kv = own.integer("num_key_value_heads", high=_LARGEST_HEAD, default=kv)
    if head_dim % 2:
        raise config.wrong("head_dim of layers without a window", "an even number", head_dim)
    if heads % kv:
        raise config.wrong(
            "num_key_value_heads of layers without a window", f"a divisor of num_attention_heads ({heads})", kv
        )
    shared = config.integer("num_kv_shared_layers", low=0, high=n_layer - 1, default=0)
    per_layer = config.integer("hidden_size_per_layer_input", low=0, default=0)
    return Uneven(
        full=full,
        head_dim=head_dim,
        n_head_kv=kv,
        key_is_value=key_is_value,
        first_shared=n_layer - shared,
        feed_forward_length=2 * feed if config.boolean("use_double_wide_mlp") else feed,
        per_layer=per_layer,
        per_layer_vocab=config.integer("vocab_size_per_layer_input") if per_layer else 0,
    )


def _two_thirds(config: ConfigReader, feed: int) -> int:
    """The feed-forward width of LFM2: of what is configured two thirds, as much of them as a factor says, rounded up to
    whole blocks; where the configuration asks for that."""
    if not config.boolean("block_auto_adjust_ff_dim"):
        return feed
    feed = int(2 * feed / 3)
    if config.get("block_ffn_dim_multiplier") is None:
        return feed
    block = config.integer("block_multiple_of")
    return -(-int(config.number("block_ffn_dim_multiplier", positive=True) * feed) // block) * block


def _convolved(config: ConfigReader) -> frozenset[int]:
    """The layers without attention. Raises MalformedInputError."""
    n_layer = config.integer("num_hidden_layers", high=_MOST_LAYERS)
    types, full = config.sequence("layer_types"), config.sequence("full_attn_idxs")
    if types is None and full is not None:
        types = ["full_attention" if layer in full else "conv" for layer in range(n_layer)]
    types = ["full_attention"] * n_layer if types is None else types
    if len(types) != n_layer or any(kind not in ("conv", "full_attention") for kind in types):
        raise config.wrong("layer_types", f"conv or full_attention for each of {n_layer} layers", list(types))
    return frozenset(layer for layer, kind in enumerate(types) if kind == "conv")


def _shared(config: ConfigReader, family: Family) -> int:
    """The width of the experts that every token sees, together; 0: there are none."""
    if not family.shared:
        return config.integer("shared_expert_intermediate_size", low=0, default=0)
    return config.integer(family.shared, low=0, default=0) * config.integer("moe_intermediate_size")


def _recurrence(config: ConfigReader, family: Family) -> Recurrence:
    """The layers without attention and the sizes of their states. Raises MalformedInputError."""
    n_layer = config.integer("num_hidden_layers", high=_MOST_LAYERS)
    types = config.sequence("layer_types")
    if types is None:
        every = config.integer("full_attention_interval", default=family.recurrent_period)
        types = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(n_layer)]
    if len(types) != n_layer or any(kind not in ("linear_attention", "full_attention") for kind in types):
        raise config.wrong("layer_types", f"linear_attention or full_attention for each of {n_layer} layers", types)
    keys, values = (config.integer(f"linear_num_{one}_heads", high=_LARGEST_HEAD) for one in ("key", "value"))
    if values % keys:
        raise config.wrong("linear_num_value_heads", f"a multiple of linear_num_key_heads ({keys})", values)
    return Recurrence(
        layers=frozenset(layer for layer, kind in enumerate(types) if kind == "linear_attention"),
        key_heads=keys,
        value_heads=values,
        key_dim=config.integer("linear_key_head_dim", high=_LARGEST_HEAD),
        value_dim=config.integer("linear_value_head_dim", high=_LARGEST_HEAD),
        kernel=config.integer("linear_conv_kernel_dim", high=_LARGEST_HEAD),
    )


def _of_full_layers(config: ConfigReader, full: frozenset[int]) -> ConfigReader | None:
    """What ``per_layer_config`` says of the layers without a window; None where there is none. Raises
    MalformedInputError: it says something of other layers, not the same of all, or of more than heads."""
    given = config.get("per_layer_config")
    if given is None:
        return None
    found = config.mapping("per_layer_config")
    values = [found.get(str(layer)) for layer in sorted(full)]
    layers = {str(layer) for layer in full}
    first = values[0] if values else {}
    known = isinstance(first, Mapping) and first.keys() <= {"head_dim", "num_key_value_heads"}
    if not isinstance(first, Mapping) or not known or set(found) != layers or any(one != first for one in values):
        expected = f"head_dim and num_key_value_heads, the same for each of the layers {sorted(full)}"
        raise config.wrong("per_layer_config", expected, given)
    return ConfigReader(first, config.file)


def _head_dim(config: ConfigReader, family: Family, embedding: int, heads: int, limits: list[UnsupportedError]) -> int:
    own = config.get("head_dim")
    if own is not None:
        head = config.integer("head_dim", high=_LARGEST_HEAD)
        if not family.own_head_dim and head * heads != embedding:
            what = f"llama.cpp derives the head size of {family.model_type} from hidden_size and num_attention_heads"
            limits.append(UnsupportedError(what, file=config.file, expected=embedding // heads, found=head))
        return head
    if embedding % heads:
        raise config.wrong("hidden_size", f"a multiple of num_attention_heads ({heads})", embedding)
    return embedding // heads
