"""What is run: quantizations of the models of models.py, and the commands that print JSON.

A plain case rounds, or is given its importance in a file: the same bytes everywhere. A calibrated one runs the model
in torch, whose sums depend on the processor. harness.py says how each kind is compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

TEXT = "--calibration-data text.txt --calibration-samples 6 --sequence-length 64"


@dataclass(frozen=True)
class Case:
    """One quantization: ``llm-quantize quantize MODEL WORDS``."""

    model: str
    name: str
    words: str
    calibrated: bool = False

    @property
    def id(self) -> str:
        return f"{self.model}-{self.name}" + ("-calibrated" if self.calibrated else "")


@dataclass(frozen=True)
class Command:
    """A command that prints one JSON object, after quantizations that make what it reads. All run where the models
    lie; OUT in the words is the folder for what they write. ``measures``: torch takes part. ``volatile``: more keys
    of the JSON that are of this run or machine; where there are any, files are not looked into, as they say so too."""

    id: str
    words: str
    before: tuple[str, ...] = field(default=())
    measures: bool = False
    volatile: tuple[str, ...] = ()


def _plain(model: str, **words: str) -> list[Case]:
    return [Case(model, name.replace("_", "-"), text) for name, text in words.items()]


def _calibrated(model: str, **words: str) -> list[Case]:
    return [Case(model, name.replace("_", "-"), f"{text} {TEXT}", True) for name, text in words.items()]


def _levels(names: str) -> str:
    return "gguf " + " ".join(f"-q {name}" for name in names.split())


_FLOATS = _levels("F32 F16 BF16")
_LEGACY = _levels("Q8_0 Q5_1 Q5_0 Q4_1 Q4_0")
_K_QUANTS = _levels("Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q3_K_L Q3_K_M Q3_K_S Q2_K")
_CODEBOOKS = _levels("IQ4_NL IQ4_XS IQ3_M IQ3_S")
_OTHERS = _levels("TQ2_0 TQ1_0 MXFP4_MOE")
_SMALL = _levels("Q2_K_S IQ3_XS IQ3_XXS IQ2_M IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S")
_RTN = "--method rtn --transform none"
_PLAIN_FLOATS = "safetensors -q BF16 -q F16 -q F32"

PLAIN = tuple(
    chain(
        _plain(
            "dense",
            gguf_floats=_FLOATS,
            gguf_legacy=_LEGACY,
            gguf_k=_K_QUANTS,
            gguf_codebooks=_CODEBOOKS,
            gguf_others=_OTHERS,
            gguf_few_bits=_levels("Q2_0 Q1_0"),
            gguf_nvfp4="gguf -q Q8_0 --tensor-type blk\\.=nvfp4",
            gguf_fallback="gguf -q Q2_K -q Q4_K_M --fallback best --imatrix dense.dat",
            gguf_imatrix_legacy=f"{_LEGACY} --imatrix dense.dat",
            gguf_imatrix_k=f"{_K_QUANTS} --imatrix dense.dat",
            gguf_imatrix_codebooks=f"{_CODEBOOKS} --imatrix dense.dat",
            gguf_imatrix_small=f"{_SMALL} --imatrix dense.dat",
            gguf_pure="gguf -q Q4_K_S -q Q3_K_M --pure",
            gguf_types="gguf -q Q4_K_M --output-type q8_0 --embedding-type q5_1 --tensor-type ffn_down=q6_k "
            "--tensor-type blk\\.0\\.attn=bf16 --name named",
            gguf_recipe="gguf --recipe mix.recipe.json",
            gguf_split="gguf -q Q4_K_M -q Q8_0 --split-max-size 200k",
            gptq_4bit=f"gptq -q 4bit {_RTN}",
            gptq_4bit_asym_g64=f"gptq -q 4bit --asym --group-size 64 {_RTN}",
            gptq_4bit_channel=f"gptq -q 4bit --group-size -1 {_RTN}",
            gptq_3bit=f"gptq -q 3bit {_RTN}",
            gptq_2bit_asym=f"gptq -q 2bit --asym --group-size 32 {_RTN}",
            gptq_8bit=f"gptq -q 8bit {_RTN}",
            gptq_ignore=f"gptq -q 4bit --ignore down_proj --ignore layers\\.0\\.self_attn {_RTN}",
            awq_4bit=f"awq -q 4bit {_RTN}",
            awq_4bit_g64=f"awq -q 4bit --group-size 64 {_RTN}",
            awq_4bit_symmetric=f"awq -q 4bit --no-zero-point {_RTN}",
            ct_symmetric="compressed-tensors -q W2A16 -q W3A16 -q W4A16 -q W5A16 -q W6A16 -q W7A16 -q W8A16 " + _RTN,
            ct_asymmetric="compressed-tensors -q W2A16_ASYM -q W3A16_ASYM -q W4A16_ASYM -q W5A16_ASYM -q W6A16_ASYM "
            f"-q W7A16_ASYM -q W8A16_ASYM {_RTN}",
            ct_channel=f"compressed-tensors -q W4A16 -q W8A16 --group-size -1 {_RTN}",
            ct_recipe=f"compressed-tensors --recipe bits.recipe.json {_RTN}",
            safetensors=_PLAIN_FLOATS,
            safetensors_shards=f"{_PLAIN_FLOATS} --output-shard-size 300k",
        ),
        _plain(
            "mixture",
            gguf_floats=_FLOATS,
            gguf_legacy=_LEGACY,
            gguf_k=_K_QUANTS,
            gguf_codebooks=_CODEBOOKS,
            gguf_others=_OTHERS,
            gguf_imatrix_k=f"{_K_QUANTS} --imatrix mixture.dat",
            gguf_imatrix_small=f"{_SMALL} --imatrix mixture.dat",
            gguf_split="gguf -q Q5_K_M --split-max-size 150k",
            gptq_4bit=f"gptq -q 4bit --group-size 64 {_RTN}",
            gptq_4bit_groups=f"gptq -q 4bit {_RTN}",
            gptq_8bit_channel=f"gptq -q 8bit --group-size -1 {_RTN}",
            awq_4bit=f"awq -q 4bit --group-size 32 {_RTN}",
            ct_shards=f"compressed-tensors -q W4A16 -q W6A16_ASYM --group-size 64 --output-shard-size 200k {_RTN}",
            ct_ignore=f"compressed-tensors -q W3A16 --group-size 32 --ignore experts\\.[01] {_RTN}",
            safetensors=_PLAIN_FLOATS,
            safetensors_shards=f"{_PLAIN_FLOATS} --output-shard-size 200k",
        ),
        _plain(
            "odd",
            gguf_floats=_FLOATS,
            gguf_legacy=_LEGACY,
            gguf_k=_levels("Q6_K Q4_K_M Q2_K"),
            gguf_codebooks=_CODEBOOKS,
            gguf_others=_OTHERS,
            gptq_4bit=f"gptq -q 4bit --group-size 8 {_RTN}",
            gptq_4bit_asym_channel=f"gptq -q 4bit --asym --group-size -1 {_RTN}",
            gptq_3bit=f"gptq -q 3bit --group-size 32 --ignore mlp {_RTN}",
            awq_4bit=f"awq -q 4bit --group-size 8 {_RTN}",
            ct_groups=f"compressed-tensors -q W3A16 -q W5A16_ASYM -q W8A16 --group-size 8 {_RTN}",
            ct_channel=f"compressed-tensors -q W2A16_ASYM -q W7A16 -q W8A16_ASYM --group-size -1 {_RTN}",
            safetensors=_PLAIN_FLOATS,
            safetensors_shards=f"{_PLAIN_FLOATS} --output-shard-size 20k",
        ),
        _plain("turned", gguf_floats=_FLOATS, gguf_legacy=_LEGACY, gguf_k=_levels("Q6_K Q4_K_M Q2_K")),
        _plain(
            "broken",
            gguf_zero="gguf -q F16 -q Q8_0 -q Q4_K_M --nonfinite zero",
            gguf_keep="gguf -q F16 -q BF16 -q Q4_0 --nonfinite keep",
            gguf_refused="gguf -q Q8_0",
        ),
    )
)

CALIBRATED = tuple(
    chain(
        _calibrated(
            "dense",
            gguf_importance=_levels("IQ3_XXS Q4_K_M"),
            gguf_gptq=f"{_levels('Q4_K_M')} --method gptq",
            gguf_gptq_q4_0=f"{_levels('Q4_0')} --method gptq --inputs block",
            gguf_gptq_words=f"{_levels('IQ2_XS IQ3_XXS IQ1_M')} --method gptq",
            gptq_4bit="gptq -q 4bit",
            gptq_3bit_source="gptq -q 3bit --inputs source --asym",
            awq_4bit="awq -q 4bit",
            awq_awq_rtn="awq -q 4bit --method rtn",
        ),
        _calibrated(
            "mixture",
            gguf_importance=_levels("IQ2_XS"),
            gptq_4bit="gptq -q 4bit --group-size 64",
            awq_4bit="awq -q 4bit --group-size 64",
            ct_block="compressed-tensors -q W4A16 --group-size 64 --inputs block --correction 0.5",
        ),
        _calibrated(
            "odd",
            gptq_8bit_channel="gptq -q 8bit --group-size -1 --correction 0",
            awq_4bit="awq -q 4bit --group-size 8",
            ct_awq="compressed-tensors -q W3A16_ASYM --group-size 8 --transform awq",
        ),
        _calibrated("turned", gguf_gptq=f"{_levels('Q4_0')} --method gptq"),
        # The built-in mix of texts: which windows are drawn.
        [
            Case(
                "dense",
                "ct-builtin-text",
                "compressed-tensors -q W4A16 --calibration-samples 8 --sequence-length 32",
                True,
            )
        ],
    )
)

_GGUF = "quantize dense gguf -q Q4_K_M -o OUT"
_SPLIT = "quantize mixture gguf -q Q8_0 --split-max-size 200k -o OUT"
_GPTQ = f"quantize dense gptq -q 4bit {_RTN} -o OUT"
_AWQ = f"quantize odd awq -q 4bit --group-size 8 {_RTN} -o OUT"
_CT = f"quantize mixture compressed-tensors -q W4A16 --group-size 64 {_RTN} -o OUT"
_PLAIN = "quantize mixture safetensors -q F16 --output-shard-size 200k -o OUT"
_QUALITY = "--text text.txt --context 64 --windows 4 --threads 2 --max-ram 8G"

COMMANDS = (
    Command("info-dense", "info dense"),
    Command("info-mixture", "info mixture"),
    Command("info-turned", "info turned"),
    Command("info-gguf", "info OUT/dense-Q4_K_M.gguf", (_GGUF,)),
    Command("info-gptq", "info OUT/dense-GPTQ-4bit", (_GPTQ,)),
    Command("info-awq", "info OUT/odd-AWQ-4bit-g8", (_AWQ,)),
    Command("info-ct", "info OUT/mixture-W4A16-g64", (_CT,)),
    Command("info-safetensors", "info OUT/mixture-F16", (_PLAIN,)),
    Command("recipe-of-gguf", "info OUT/dense-Q4_K_M.gguf --recipe", (_GGUF,)),
    Command("recipe-of-gptq", "info OUT/dense-GPTQ-4bit --recipe", (_GPTQ,)),
    Command("plan-gguf", "plan dense gguf -q Q4_K_M -q IQ4_XS --threads 2"),
    Command("plan-gguf-small", "plan dense gguf -q IQ2_XS --threads 2"),
    Command("plan-gguf-gptq", "plan mixture gguf -q Q4_K_M --method gptq --threads 2"),
    Command("plan-gptq", "plan dense gptq -q 4bit --threads 2"),
    Command("plan-awq", "plan odd awq -q 4bit --group-size 8 --threads 2"),
    Command("plan-ct", "plan mixture compressed-tensors -q W4A16 --group-size 64 --output-shard-size 300k --threads 2"),
    Command("plan-dry-run", "quantize turned gguf -q Q8_0 --dry-run --threads 2"),
    Command("plan-refused", "plan odd gptq -q 4bit"),
    Command("recommend-cpu", "recommend dense --ram 16G --device cpu"),
    Command("recommend-gpu", "recommend mixture --ram 1G --vram 620M --device cuda --context 128 --priority speed"),
    Command("recommend-apple", "recommend odd --ram 8G --device apple --priority size"),
    Command("verify-gguf", "verify OUT/dense-Q4_K_M.gguf --source dense", (_GGUF,)),
    Command("verify-split", "verify OUT/mixture-Q8_0 --source mixture", (_SPLIT,)),
    Command("verify-gptq", "verify OUT/dense-GPTQ-4bit --source dense", (_GPTQ,)),
    Command("verify-awq", "verify OUT/odd-AWQ-4bit-g8", (_AWQ,)),
    Command("verify-ct", "verify OUT/mixture-W4A16-g64 --source mixture", (_CT,)),
    Command("verify-safetensors", "verify OUT/mixture-F16 --source mixture", (_PLAIN,)),
    Command("rederive-gguf", "verify OUT/dense-Q4_K_M.gguf --rederive --source dense --threads 2", (_GGUF,)),
    Command("rederive-refused", "verify OUT/dense-Q4_K_M.gguf --rederive --source mixture --threads 2", (_GGUF,)),
    Command("verify-refused", "verify OUT/dense-Q4_K_M.gguf --source mixture", (_GGUF,)),
    Command(
        "quality-dense",
        f"analyze quality OUT/dense-Q4_K_M.gguf OUT/dense-GPTQ-4bit --reference dense {_QUALITY}",
        (_GGUF, _GPTQ),
        measures=True,
    ),
    Command(
        "quality-mixture-refused",
        f"analyze quality OUT/mixture-Q8_0 OUT/mixture-W4A16-g64 --reference mixture --max-kld 1e-9 {_QUALITY}",
        (_SPLIT, _CT),
        measures=True,
    ),
    Command("importance-gguf", f"analyze importance dense -o OUT/x.gguf --threads 2 {TEXT}", measures=True),
    Command(
        "importance-all",
        f"analyze importance mixture --collect imatrix,hessian,absmax -o OUT/x.safetensors --threads 2 {TEXT}",
        measures=True,
    ),
    Command("importance-dat", f"analyze importance odd -o OUT/x.dat --threads 2 {TEXT}", measures=True),
    Command("importance-json", f"analyze importance odd -o OUT/x.json --threads 2 {TEXT}", measures=True),
    Command("quantize-again", _GGUF, (_GGUF,)),
    Command("quantized-source-gguf", "quantize OUT/dense-GPTQ-4bit gguf -q F32 --threads 2 -o OUT", (_GPTQ,)),
    Command(
        "quantized-source-safetensors", "quantize OUT/dense-GPTQ-4bit safetensors -q F32 --threads 2 -o OUT", (_GPTQ,)
    ),
    Command(
        "gguf-source-safetensors", "quantize OUT/dense-Q4_K_M.gguf safetensors -q BF16 --threads 2 -o OUT", (_GGUF,)
    ),
    Command("gguf-source-gptq", f"quantize OUT/dense-Q4_K_M.gguf gptq -q 4bit {_RTN} --threads 2 -o OUT", (_GGUF,)),
    Command(
        "quantize-imatrix-gguf",
        "quantize dense gguf -q IQ3_XXS --imatrix OUT/x.gguf --threads 2 -o OUT",
        (f"analyze importance dense -o OUT/x.gguf --threads 2 {TEXT}",),
        measures=True,
    ),
    Command(
        "quantize-statistics-gguf",
        "quantize mixture gguf -q Q4_K_M --statistics OUT/x.safetensors --threads 2 -o OUT",
        (f"analyze importance mixture -o OUT/x.safetensors --threads 2 {TEXT}",),
        measures=True,
    ),
    Command(
        "quantize-statistics-gptq",
        "quantize dense gptq -q 4bit --statistics OUT/x.safetensors --inputs source --threads 2 -o OUT",
        (f"analyze importance dense --collect imatrix,hessian -o OUT/x.safetensors --threads 2 {TEXT}",),
        measures=True,
    ),
    Command(
        "compare",
        "compare turned --variants gguf:Q8_0,gguf:Q4_0 --no-speed --text text.txt --context 64 --windows 2 --threads 2 "
        "--keep -o OUT/report",
        measures=True,
        volatile=("machine", "versions", "quantize_cpu_seconds", "created"),
    ),
    Command(
        "profile",
        "analyze profile turned --types q8_0,q4_0 --bpw 12 --text text.txt --windows 2 --context 32 --threads 2 "
        "-o OUT/turned.recipe.json --profile OUT/turned.profile.json",
        measures=True,
    ),
)
