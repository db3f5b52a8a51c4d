"""Small trained tokenizers of every supported kind, nasty text, and vocabularies inside tiny GGUF models."""

from __future__ import annotations

import inspect
import io
import json
import textwrap
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer

from llm_quantize.io.gguf_file import MetaValue

_PASSAGES = """
The quick brown fox jumps over the lazy dog; it's what they'll say, I'm sure, and we've 12 or 345 or 6789 reasons.
THE FOX'S DEN ISN'T FAR: WE'LL WALK, THEY'D RUN, I'VE SEEN IT. Don't stop! Isn't it 3.14159, 1,000,000 or 2024-11-05?
メロスは激怒した。必ず、かの邪智暴虐の王を除かなければならぬと決意した。メロスには政治がわからぬ。ﾊﾝｶｸもある。
吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。東京都２０２４年１１月５日、１２３円。
人工智能正在改变世界。今天的天气很好，我们去公园吧！一二三四五六七八九十，２０２４年。臺灣繁體字測試。
مرحبا بالعالم، كيف حالك اليوم؟ اللُّغَةُ العَرَبِيَّةُ جَمِيلَةٌ. ١٢٣٤٥ كتاب
สวัสดีชาวโลก วันนี้อากาศดีมาก เราไปเที่ยวกันเถอะ ที่นี่มีน้ำ ๑๒๓๔
안녕하세요 세계! 오늘 날씨가 정말 좋네요. 대한민국 만세, 한국어 형태소 분석 123개.
नमस्ते दुनिया, आज मौसम अच्छा है। हिन्दी में लिखा १२३ पाठ
Привет, мир! Сегодня хорошая погода, пойдём гулять. МОСКВА и ПетербургОнлайн
Καλημέρα κόσμε, τι κάνεις σήμερα; ΑΘΗΝΑ
Crème brûlée, naïve café, über Straße, señor año, ångström, Đặng Việt Nam, İstanbul ılık, ǅungla Ǆep
שלום עולם, מה שלומך היום?
😀😃 👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🇯🇵🇫🇷 ❤️ ✨🚀 1️⃣ © ® ™ € £ ¥ ½ ¾ ² ³ Ⅷ ① ㊗
def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)  # comment\n\nclass A(B):\n\tx = {'a': 1, "b": [2, 3]}
for (int i = 0; i < 10; ++i) {\n    printf("%d\\n", arr[i]->value);\n}\r\n<div class="x">&nbsp;</div>
"""


@lru_cache
def training_lines() -> tuple[str, ...]:
    """Passages in many scripts, and English and Python from the standard library's own sources."""
    passages = [line.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t") for line in _PASSAGES.split("\n")]
    sources = "".join(inspect.getsource(module) for module in (textwrap, io, json))
    return tuple(passages * 12 + sources.splitlines(keepends=True))


@lru_cache
def nasty_texts() -> tuple[str, ...]:
    """Texts on which tokenizers disagree. All are in NFC; see ``decomposed_texts`` for the others."""
    texts = [
        "",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\n\n\n",
        "\t",
        "\t\t",
        " \n",
        "\n ",
        " \n \n  x",
        "\r\n",
        "\r\n\r\n",
        "\r",
        "\v\f",
    ]
    texts += (
        ["a" + " " * n + "b" for n in range(1, 20)]
        + [" " * n for n in (7, 31, 40)]
        + ["x" + "\n" * n for n in range(1, 9)]
    )
    texts += [str(10**n + 7)[: n + 1] for n in range(20)] + [
        "1234567 89 0",
        "v1.2.3",
        "3.14159e-10",
        "1,000,000",
        "0x1F",
        "a1b22c333d4444",
    ]
    texts += [
        "12 345",
        "٣٤٥٦",
        "１２３４",
        "½ ¾",
        "x²+y³",
        "Ⅷ④",
        "1 2  3   4",
        " 12",
        "  123",
        "\n123",
        "100%",
        "$5.00",
        "#42",
    ]
    texts += [
        "I'm",
        "I'M",
        "they'll they'LL THEY'LL",
        "don't DON'T Don'T",
        "we've'd're",
        "'s 's's",
        "'tis 'S",
        "l'été",
        "it’s",
        "x's",
    ]
    texts += [
        "Hello, world!",
        "Hello  World",
        " Hello",
        "hello_world camelCase XMLHttpRequest snake_case-kebab",
        "...!?!?",
        "«hi»",
    ]
    texts += [
        "e.g. a/b\\c",
        "a|b^c~d`e",
        "<=>",
        "(a)[b]{c}",
        "a\tb\t\tc",
        "end \n\n start",
        "word\n  indented\n\tx",
        "a \r\n b",
        "x \n",
    ]
    texts += [
        "if x:\n    y = [1, 2]\n\n\n    return {'k': \"v\"}  # c\n",
        "/* c */ int main(void) { return 0; }\n",
        "a+=b;c--;//d",
    ]
    texts += [
        "//\n/\n",
        "a/\n\nb",
        "!!\n\n!!",
        "...\n",
        "?\r\n\r\n",
        "http://example.com/a?b=c&d=%20",
        "foo@bar.com",
        "C:\\dir\\file.txt",
    ]
    texts += [
        "日本語のテキスト",
        "東京 タワー",
        "メロスは激怒した。必ず、",
        "カタカナとひらがな、漢字。",
        "ﾊﾝｶｸ",
        "今天天气很好！",
        "中文English混合123",
        "「括弧」『』",
    ]
    texts += [
        "مرحبا بالعالم",
        "العَرَبِيَّةُ",
        "؟،",
        "สวัสดีชาวโลก",
        "ที่นี่มีน้ำ",
        "안녕하세요 세계",
        "한국어123",
        "नमस्ते दुनिया।",
        "हिन्दी",
    ]
    texts += [
        "Привет, мир!",
        "МОСКВА",
        "Καλημέρα",
        "שלום עולם",
        "Crème brûlée",
        "naïve café",
        "ÉCOLE École",
        "ß ẞ",
        "Việt Nam",
        "ǅ",
    ]
    texts += [
        "😀",
        "👨‍👩‍👧‍👦",
        "👩🏽‍💻",
        "🏳️‍🌈",
        "🇯🇵🇫🇷",
        "❤️",
        "1️⃣",
        "a😀b",
        " 😀 😀",
        "😀\n",
        "✨🚀✨",
        "x\u200dy",
        "\u200b",
        "a\u00adb",
        "\ufeffx",
    ]
    texts += [
        "\u3000全角　空白\u3000",
        "a\u00a0b",
        "\u00a0\u00a0",
        "\u2003x\u2009y",
        "\u2028\u2029",
        "\u0085",
        "a\u0001b\u001fc\u007f",
        "\x1b[0m",
    ]
    texts += [
        "\ufffd",
        "\U0010fffd",
        "\ue000",
        "\U00020000𠮷野家",
        "𝔘𝔫𝔦",
        "ﬁ ﬂ",
        "ǆ ǅ Ǆ",
        "ⅷ",
        "㍿",
        "Ω K Å",
        "°C ±5 ×÷",
        "† ‡ • …",
        "—–-",
    ]
    texts += [
        "supercalifragilisticexpialidocious" * 12,
        "ー" * 50,
        "あ" * 70,
        "!" * 40,
        "=" * 64,
        "ab" * 100,
        "長" * 64,
        "١" * 10,
    ]
    texts += [
        "a\n\nb\n\n\nc",
        "\n\n  \n\n",
        "\t \t",
        " \t\n\t ",
        "end.  ",
        "end.\n",
        "The end",
        "z " * 30,
        "(1)(22)(333)(4444)",
        "「１２３４５」",
        "a  1",
        "  !",
        "  .",
    ]
    texts += [
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>",
        "a<|endoftext|>b",
        "<|endoftext|>",
        " <|im_end|> ",
        "<|im_end",
    ]
    texts += [
        "x<tool_call>y",
        " <tool_call> ",
        "<tool_call><tool_call>",
        "<|im_end|><tool_call>\n\n",
        "b  TWO c",
        "   TWO",
        "TWO",
    ]
    texts += [
        "<s>",
        "</s>",
        "<s>a</s> b",
        "x <unk> y",
        "<s><s>",
        " <s> ",
        "</s>\n",
        "<s",
        "[INST] a [/INST]",
        "<table><tr>\n\n\t",
    ]
    lines = [line for line in training_lines() if line.strip()]
    return tuple(dict.fromkeys(unicodedata.normalize("NFC", text) for text in texts + lines[:17] + lines[400:460]))


def decomposed_texts() -> tuple[str, ...]:
    """Text that NFC changes: combining accents, jamo, a compatibility-free composition."""
    return tuple(
        unicodedata.normalize("NFD", text) for text in ("Crème brûlée", "한국어", "ガギグ", "Việt Nam", "Å é ñ")
    )


def split(expression: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": behavior, "invert": invert}


def sequence(*steps: dict[str, Any], regex: bool = False) -> dict[str, Any]:
    """The steps and a closing ByteLevel, as Hugging Face repositories write them."""
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}
    return {"type": "Sequence", "pretokenizers": [*steps, last]}


DIGITS = {"type": "Digits", "individual_digits": True}
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
_U, _L = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = f"{_U}*{_L}+{CONTRACTIONS}?|{_U}+{_L}*{CONTRACTIONS}?|" + r"\p{N}{1,3}" + _O200K_END
TEKKEN = f"{_U}*{_L}+|{_U}+{_L}*|" + r"\p{N}" + _O200K_END
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
HAN = "[一-龥ࠀ-一가-\ud7ff]+"
CASED = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80"
    "-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
JAIS2 = (
    LLAMA3.removesuffix(r"|\s+(?!\S)|\s+")
    + "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s{1}"
)
EXAONE_MOE = CONTRACTIONS + (
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{M}\p{N}]+")
SEED = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|"
    "\\s+(?!\\S)|\\s+"
)
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

# llama.cpp's name -> (pre_tokenizer as published tokenizer.json files spell it, ignore_merges)
PRE_TOKENIZERS: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt-2": ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}, False),
    "smollm": (sequence(DIGITS, regex=True), False),
    "llama-bpe": (sequence(split(LLAMA3)), True),
    "dbrx": (sequence(split(LLAMA3, "Removed", True)), False),
    "qwen2": (sequence(split(QWEN2)), False),
    "qwen35": (sequence(split(QWEN35)), False),
    "tekken": (sequence(split(TEKKEN)), True),
    "gpt-4o": (sequence(split(GPT4O)), False),
    "granite-embed-multi-97m": (sequence(split(GPT4O)), True),
    "falcon": (
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Punctuation", "behavior": "Contiguous"},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                {"type": "Digits", "individual_digits": False},
                split("[0-9][0-9][0-9]"),
            ],
        },
        False,
    ),
    "deepseek-v3": (sequence(split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"), split(DEEPSEEK_V3)), False),
    "deepseek-coder": (
        sequence(split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(HAN), DIGITS),
        False,
    ),
    "deepseek-llm": (
        sequence(
            split("[\r\n]"),
            split(rf"\s?[{CASED}]+"),
            split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            split(r"\s+$"),
            split(HAN),
            DIGITS,
        ),
        False,
    ),
    "bloom": (sequence(split(BLOOM)), False),
    "viking": (sequence(split(BLOOM), DIGITS), False),
    "jais-2": (sequence(split(JAIS2)), False),
    "seed-coder": (sequence(split(SEED)), False),
    "bailingmoe": (sequence(split(BAILING)), False),
    "ufakzeka": (sequence(split(QWEN2.removeprefix(CONTRACTIONS + "|"))), False),
    "exaone-moe": (sequence(split(EXAONE_MOE)), False),
    "minicpm5": (sequence(split(r"\p{N}{1,3}"), split(LLAMA3.replace("{1,3}", "+"))), True),
    "laguna": (sequence(split(r"(?:\r?\n)+(?!\r?\n)", "MergedWithNext"), split(QWEN2)), False),
}

SPECIAL = [
    AddedToken("<|endoftext|>", special=True, normalized=False),
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
]
PLAIN = [
    AddedToken("<tool_call>", special=False, normalized=False),
    AddedToken("  TWO", special=False, normalized=False),
]


def byte_level_json(
    pre_tokenizer: Mapping[str, Any], *, ignore_merges: bool = False, normalizer: object = None, size: int = 3000
) -> dict[str, Any]:
    """A byte-level BPE tokenizer.json trained with ``pre_tokenizer``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(pre_tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=ByteLevel.alphabet(), special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(training_lines(), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(PLAIN)
    data = json.loads(tokenizer.to_str())
    data["pre_tokenizer"], data["normalizer"] = dict(pre_tokenizer), normalizer
    data["model"]["ignore_merges"] = ignore_merges
    return data


def _pre_tokenizer(steps: Mapping[str, Any]) -> PreTokenizer:
    bare = json.loads(Tokenizer(models.BPE()).to_str())
    bare["pre_tokenizer"] = steps
    return Tokenizer.from_str(json.dumps(bare)).pre_tokenizer


def save_tokenizer(directory: Path, data: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Tokenizer:
    """Write tokenizer.json (and tokenizer_config.json) into ``directory``; the tokenizer as Hugging Face loads it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_file(str(path))


def hugging_face_ids(tokenizer: Tokenizer, text: str, *, parse_special: bool, add_special: bool = False) -> list[int]:
    """Ids as ``tokenizers`` gives them; without ``parse_special`` special tokens in the text are plain text."""
    tokenizer.encode_special_tokens = not parse_special
    return list(tokenizer.encode(text, add_special_tokens=add_special).ids)


def sentencepiece_model(directory: Path, **options: Any) -> Path:
    """A trained tokenizer.model in ``directory``; ``options`` go to SentencePieceTrainer."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [line for text in training_lines() for line in text.splitlines() if line.strip()]
    buffer = io.BytesIO()
    settings = {
        "vocab_size": 1600,
        "character_coverage": 0.99,
        "minloglevel": 2,
        "num_threads": 1,
        "hard_vocab_limit": False,
    } | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=buffer, **settings)
    path = directory / "tokenizer.model"
    path.write_bytes(buffer.getvalue())
    return path


def spaces_rules(style: str) -> dict[str, Any]:
    """normalizer and pre_tokenizer of the SentencePiece-like families as their tokenizer.json files have them."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": style, "split": False}
    if style == "llama":
        steps = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
        return {"normalizer": steps, "pre_tokenizer": None}
    if style == "gemma":
        cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        return {"normalizer": replace, "pre_tokenizer": cut}
    return {"normalizer": None, "pre_tokenizer": metaspace}


def character_bpe_json(model: Path, style: str, **options: Any) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE model, its merges made by transformers' own converter."""
    from transformers.convert_slow_tokenizer import generate_merges

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(processor.get_piece_size())
    vocab = {processor.id_to_piece(i): i for i in ids}
    merges = generate_merges(vocab, [(processor.id_to_piece(i), processor.get_score(i)) for i in ids])
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in options.get("plain", ())])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return json.loads(tokenizer.to_str()) | spaces_rules(style)


def write_model(path: Path, metadata: Mapping[str, MetaValue], *, name: str = "tiny") -> Path:
    """A one-layer llama of 32 columns with this vocabulary: the least that llama.cpp loads."""
    width, rows = 32, len(metadata[gguf.Keys.Tokenizer.LIST].value)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(rows)
    for key, value in metadata.items():
        writer.add_key_value(key, value.value, value.type, value.item)
    square, line = np.zeros((width, width), np.float32), np.ones(width, np.float32)
    writer.add_tensor("token_embd.weight", np.zeros((rows, width), np.float32))
    writer.add_tensor("output_norm.weight", line)
    for part in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{part}.weight", line)
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{part}.weight", square)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
