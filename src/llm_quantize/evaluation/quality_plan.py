"""What an evaluation of quality holds in memory, from sizes alone, and what of it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_quantize import memory
from llm_quantize.artifacts.decoded import Decoded
from llm_quantize.errors import ResourceError, UsageError
from llm_quantize.measures.perplexity import Tokens
from llm_quantize.memory import TORCH_BYTES, Fitted, Sizes
from llm_quantize.models.opening import Source
from llm_quantize.streams.sizes import from_network

if TYPE_CHECKING:
    from llm_quantize.streams.network import Network

_RUNTIME_BYTES = 16 << 20  # tokenizer, graph and threads of one model in llama.cpp


class QualityPlan:
    """Memory of an evaluation from sizes alone."""

    def __init__(
        self, source: Source, network: Network, decoded: Sequence[Decoded], windows: Tokens, runtime: bool
    ) -> None:
        from llm_quantize.evaluation import streamed

        hyper, (count, length) = source.architecture.hyper, windows.shape
        self._artifacts = len(decoded)
        self._network = from_network(source, network)
        rows = min(windows.size, network.vocab_size) * network.width * 4
        self._embedding = min(2 * rows, 2 * self._network.embedding)
        self._hidden, self._window = self._network.hidden(count, length), self._network.hidden(1, length)
        self._step = self._network.workspace(length)
        # Logits of the source, of the artifacts and of the noise stream, one copy more while a model scales them.
        self._logits = streamed.POSITIONS * network.vocab_size * 4
        self._slice = 10 * 8 * max(streamed.SLICE_VALUES, network.vocab_size)
        self._scratch = max(one.scratch for one in decoded)
        # A runtime maps the file and keeps keys and values in float32; logits of a window in it and here.
        cache = 2 * length * hyper.n_layer * hyper.n_head_kv * hyper.head_dim * 4
        own = cache + 3 * length * network.vocab_size * 4 + self._step + _RUNTIME_BYTES
        self._runtime = [one.size + own for one in decoded] if runtime else [0]

    def fit(self, again: int, *, threads: int | None, max_ram: int | None, device: str) -> tuple[Fitted, int]:
        """What fits, and the heads of how many artifacts stand together. Raises ResourceError where one does not."""
        for together in range(self._artifacts, 0, -1):
            heads = (1 + together) * self._network.head + sum(sorted(self._runtime)[-together:])
            beside = self._scratch + again * self._window
            sizes = Sizes(
                libraries=TORCH_BYTES,
                ends=max(self._embedding, heads) + beside,
                block=self._network.block + beside,
                each=max(self._step, (3 + together) * self._logits + self._slice)
                + 2 * self._window
                + self._network.scratch,
                hidden=self._hidden,
                copies=1 + self._artifacts,
                device=device,
            )
            try:
                fitted = memory.fit(sizes, threads=threads, max_ram=max_ram)
            except ResourceError:
                if together == 1:
                    raise
                continue
            return fitted, together
        raise UsageError("no artifact to measure")
