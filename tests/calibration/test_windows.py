"""Windows: full-length, seeded, from every set by its weight, no text twice, the first k whatever is asked for."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize.calibration import documents
from llm_quantize.calibration import windows as module
from llm_quantize.calibration.documents import Document, Message
from llm_quantize.calibration.enough import coverage_advice
from llm_quantize.calibration.text import Corpus, Dataset, load_texts
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.calibration.windows import Windows, exchanges, sample_windows, split_text
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.models.opening import open_source
from tests.hearing import into
from tests.oracles import drawn_windows as slow

END = 1_000_000


class Letters:
    """A tokenizer of one id per character; conversations between 7 and 8."""

    rows = 1 << 21
    directory = Path("model")

    def __init__(self, bos: int | None = None, eos: int | None = END, template: bool = True) -> None:
        self.bos, self.eos, self.has_template = bos, eos, template

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_chat(self, messages: list[Message]) -> list[int]:
        if not self.has_template or any(message["role"] == "tool" for message in messages):
            raise UnsupportedError("refused", found="no such role")
        return [id for m in messages for id in (7, *self.encode(m["content"]), 8)]


def letters(**options: Any) -> TextTokenizer:
    return cast(TextTokenizer, Letters(**options))


def numbered(start: int, count: int) -> str:
    """A text in which no character stands twice."""
    return "".join(chr(start + i) for i in range(count))


def corpus(*sizes: int, weights: tuple[float, ...] = (), documents: int = 1) -> Corpus:
    sets = []
    for i, size in enumerate(sizes):
        share = size // documents
        pieces = tuple(Document(numbered(0x1000 * (i + 1) + j * share, share)) for j in range(documents))
        sets.append(Dataset(f"set {i}", pieces, weights[i] if weights else 1.0))
    return Corpus(tuple(sets))


def sample(text: Corpus, tokenizer: TextTokenizer | None = None, **options: Any) -> Windows:
    return sample_windows(text, tokenizer or letters(), **({"samples": 8, "length": 10, "seed": 1} | options))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(30, 900), min_size=1, max_size=4),
    length=st.integers(4, 40),
    few=st.integers(1, 20),
    more=st.integers(1, 60),
    bos=st.sampled_from([None, 5]),
    part=st.sampled_from([50, 200, 1 << 20]),
)
def test_prefix_no_repeats_and_only_whole_windows(
    sizes: list[int], length: int, few: int, more: int, bos: int | None, part: int
) -> None:
    text, tokenizer = corpus(*sizes, weights=tuple(range(1, len(sizes) + 1))), letters(bos=bos)
    if sum(sizes) < length + 2:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_CHARACTERS", part)
        patch.setattr(module, "_PIECE_CHARACTERS", 40)
        one = sample(text, tokenizer, samples=few, length=length)
        many = sample(text, tokenizer, samples=few + more, length=length)
        assert one.ids.dtype == np.int64
        assert one.ids.shape == (one.samples, length)
        assert np.array_equal(many.ids[:few], one.ids)
        assert np.array_equal(one.draw(0, few + more), many.ids)
        assert np.array_equal(one.draw(few, more), many.ids[few:])
        assert one.sha256 == many.digest(few)
        every = sample(text, tokenizer, samples=10_000, length=length)
    assert every.exact
    assert every.available == every.samples
    body = every.ids if bos is None else every.ids[:, 1:]
    if bos is not None:
        assert (every.ids[:, 0] == bos).all()
    words = body[body != END]
    assert len(np.unique(words)) == len(words)
    allowed = {ord(c) for d in text.datasets for doc in d.documents for c in doc.text}
    assert set(words.tolist()) <= allowed
    for row in body:  # text stands in its order
        inside = row[row != END]
        same = np.diff(inside)[(inside[1:] // 0x1000) == (inside[:-1] // 0x1000)]
        assert (same == 1).all() or part < 1 << 20


def test_windows_come_by_weight_and_what_ends_gives_way() -> None:
    text = corpus(2000, 2000, 100, weights=(1.0, 2.0, 1.0))
    found = sample(text, samples=40)
    assert [share.windows for share in found.shares()] == [10, 20, 10]
    found = sample(text, samples=100)
    shares = found.shares()
    assert sum(share.windows for share in shares) == 100
    assert shares[2].windows == shares[2].available_windows == 10
    assert abs(shares[1].windows - 60) <= 2
    assert [share.tokens for share in found.shares(40)] == [100, 200, 100]
    assert found.datasets == ("set 0", "set 1", "set 2")
    assert found.tokens == 1000


def test_the_seed_counts_and_nothing_else() -> None:
    text = corpus(3000, documents=3)
    one, again, other = (sample(text, seed=seed) for seed in (1, 1, 2))
    assert one.sha256 == again.sha256 != other.sha256
    assert np.array_equal(one.ids, again.ids)
    assert not np.array_equal(one.ids, other.ids)
    assert one.digest(4) != one.digest(5)
    assert not np.array_equal(np.sort(one.ids[:, 0]), one.ids[:, 0])  # not merely from the front


def test_documents_end_with_the_end_token_or_a_blank_line() -> None:
    text = corpus(40, documents=2)
    ids = sample(text, samples=9, length=21).ids
    assert sorted(ids.tolist()) == [[*range(0x1000, 0x1014), END], [*range(0x1014, 0x1028), END]]
    assert (sample(text, letters(eos=None), samples=9, length=22).ids[:, -2:] == 10).all()
    chat = Corpus((Dataset("c", (Document(messages=({"role": "user", "content": "abc"},)),) * 1),))
    found = sample(chat, letters(eos=8), samples=1, length=5)
    assert found.ids.tolist() == [[7, 97, 98, 99, 8]]
    assert found.shares()[0].available_tokens == 5  # the template's own end is not written twice


def test_fewer_windows_than_asked_is_told_with_numbers() -> None:
    events: list[Any] = []
    found = sample(corpus(100), samples=50, on_event=into(events))
    assert found.samples == 10
    assert [event["event"] for event in events] == ["warning"]
    assert "10 windows of 10 tokens" in events[0]["text"]
    assert "50" in events[0]["text"]
    events.clear()
    sample(corpus(100), samples=10, on_event=into(events))
    assert events == []
    built_in = Corpus((Dataset("general", (Document(numbered(0x1000, 100)),), 1.0, built_in=True),))
    sample(built_in, samples=50, on_event=into(events))
    assert [event["event"] for event in events] == ["note"]


def test_text_shorter_than_a_window() -> None:
    events: list[Any] = []
    short = sample(corpus(30, 20), length=60, on_event=into(events))
    assert short.ids.shape == (1, 52)
    assert short.ids.tolist() == sample(corpus(30, 20), length=52).ids.tolist()
    assert "52 tokens, less than one window of 60: it is one window of 52" in events[0]["text"]
    assert events[0]["event"] == "warning"
    with pytest.raises(UsageError, match="too short to calibrate on"):
        sample(Corpus((Dataset("nothing", ()),)), length=60)
    # Small sets are joined; one that is too short beside a large one is named.
    joined = sample(corpus(30, 20, 25, 5), length=60)
    assert joined.samples == 1
    assert joined.datasets == ("set 0 + set 1 + set 2 and 1 more",)
    events.clear()
    found = sample(corpus(500, 20), length=60, on_event=into(events))
    assert found.datasets == ("set 0",)
    assert "set 1: 21 tokens are less than one window of 60" in events[0]["text"]


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 1}, {"seed": -1}])
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1 window"):
        sample(corpus(100), **wrong)


def test_large_sets_are_tokenized_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_CHARACTERS", 1000)
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 500)
    text = Corpus((Dataset("large", (Document("abcd " * 20_000),)),))
    seen = 0

    class Counting(Letters):
        def encode(self, text: str) -> list[int]:
            nonlocal seen
            seen += len(text)
            return super().encode(text)

    found = sample(text, cast(TextTokenizer, Counting()), samples=150)
    assert seen <= 4000
    assert not found.exact
    assert found.available == pytest.approx(10_000, rel=0.02)
    assert found.shares()[0].available_tokens == pytest.approx(100_000, rel=0.02)
    assert len(found.draw(0, 20_000)) > 9_900
    assert found.exact


def test_conversations_without_a_template_are_plain_text_and_told() -> None:
    talk = tuple({"role": role, "content": "word " * 20} for role in ("user", "tool"))
    text = Corpus((Dataset("chat", (Document(messages=talk),) * 3),))
    events: list[Any] = []
    found = sample(text, letters(template=False), on_event=into(events))
    assert "".join(map(chr, found.ids[0])).isprintable()
    assert events[0]["event"] == "warning"
    assert "3 conversations are laid out as plain text" in events[0]["text"]
    assert "no such role" in events[0]["text"]


def test_chat_sets_plain_text_in_the_template() -> None:
    words = "This is a sentence. " * 900
    text = Corpus((Dataset("a", (Document(words),)),))
    ids = sample(text, chat=True, samples=999, length=100).ids
    assert (ids == 7).sum() >= 8
    with pytest.raises(UnsupportedError, match="no chat template"):
        sample(text, letters(template=False), chat=True)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab \n.。", max_size=9000))
def test_exchanges_alternate_and_lose_no_word(text: str) -> None:
    found = list(exchanges(text))
    assert bool(found) == bool(text.strip())
    for messages in found:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(m["content"].strip() for m in messages)
    said = "".join(m["content"] for messages in found for m in messages)
    assert len("".join(said.split())) >= len("".join(text.split()))


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab \n.。", max_size=300), limit=st.integers(1, 40))
def test_split_text_joins_again(text: str, limit: int) -> None:
    pieces = list(split_text(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_coverage_advice() -> None:
    assert coverage_advice(4 * 2048, 2048, hessian=False) is not None
    assert coverage_advice(10_000, 14336, hessian=False) is None
    assert coverage_advice(4 * 14336, 14336) is None
    text = coverage_advice(4 * 14336 - 1, 14336)
    assert text is not None
    for number in ("57,343", "14,336", "57,344", "258,048", "10,000"):
        assert number in text


def test_the_default_mix_on_the_demo_model(demo_model: Path) -> None:
    tokenizer = TextTokenizer(open_source(str(demo_model)))
    found = sample_windows(load_texts(), tokenizer, samples=40, length=256, seed=0)
    assert {share.dataset: share.windows for share in found.shares()} == {
        "general": 12,
        "code": 8,
        "japanese": 8,
        "chat": 12,
    }
    assert found.exact
    assert 300_000 < sum(share.available_tokens for share in found.shares()) < 500_000
    assert int(found.ids.max()) < tokenizer.rows


def _files(folder: Path) -> list[str]:
    """A file of every form: repeated single letters, escapes, other keys, a conversation that the template refuses."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    random = np.random.default_rng(0)
    letter = ["abcdefgh"[i] for i in random.integers(0, 8, 900)]
    long = ["".join(chr(0x3041 + i) for i in random.integers(0, 60, size)) for size in (3, 150, 90, 700)]
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    odd = [
        {"text": "a", "id": 1},
        {"text": 'q"\\ \n'},
        {"messages": talk},
        {"messages": [{"role": "tool", "content": "x"}]},
    ]
    lines = [json.dumps(one) for one in [*letter[:300], *long, *odd, *letter[300:400]]]
    lines += [
        ' {"text" : "é"} ',
        "",
        '"\u65e5"\t',
        '""',
        "  ",
        '{"text": "  "}',
        json.dumps(long[1], ensure_ascii=False),
    ]
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    (folder / "b.txt").write_text("".join(long) + "\n\nword. " * 40, encoding="utf-8")
    (folder / "c.json").write_text(json.dumps([*letter[400:700], *long[::-1], {"text": "b"}]))
    parquet.write_table(pyarrow.table({"text": [*letter[600:], None, "", *long]}), folder / "d.parquet")
    return [
        f"{folder / name}={weight}"
        for name, weight in (("a.jsonl", 2), ("b.txt", 1), ("c.json", 1.5), ("d.parquet", 1))
    ]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("bos", "eos"), [(None, END), (5, END), (5, None)])
@pytest.mark.parametrize(("part", "piece"), [(4 << 20, 1 << 18), (200, 64), (40, 100)])
def test_draws_are_those_of_the_slow_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chat: bool,
    bos: int | None,
    eos: int | None,
    part: int,
    piece: int,
) -> None:
    """However documents are packed, batched and remembered."""
    items = _files(tmp_path)
    for name, value in (("PART_CHARACTERS", part), ("_PIECE_CHARACTERS", piece), ("_BATCH", 7), ("_KNOWN", 4)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(documents, "SHORT", 100)
    text, tokenizer = load_texts(items), letters(bos=bos, eos=eos)
    found = sample(text, tokenizer, samples=10_000, length=10, seed=3, chat=chat)
    sets = [(one.weight, slow.documents(tmp_path / one.name)) for one in text.datasets]
    wanted = slow.drawn(sets, tokenizer, samples=10_000, length=10, seed=3, chat=chat, part=part, piece=piece)
    assert len(wanted) > 200
    assert np.array_equal(found.ids, wanted)
    assert found.shares()[0].available_windows == found.shares()[0].windows


def test_a_million_short_documents_take_little_more_than_their_letters() -> None:
    tracemalloc.start()
    try:
        packed = documents.Documents(Document("é" * (1 + i % 3)) for i in range(100_000))
        held = tracemalloc.get_traced_memory()[0]
        pieces = module._Pieces(packed, letters(), chat=False)
        beside = tracemalloc.get_traced_memory()[0] - held
    finally:
        tracemalloc.stop()
    assert held < 20 * len(packed)
    assert beside < len(packed)
    assert [document.text for document in packed[:4]] == ["é", "éé", "ééé", "é"]
    assert packed.characters == sum(part.characters for part in pieces.parts) == sum(d.characters for d in packed)
